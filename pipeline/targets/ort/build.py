"""Making the model files, and finding out what they do here.

Two files come out of one graph: `model.onnx`, which every ONNX Runtime takes, and, for float32 on a
CPU with a blocked layout, `model.blocked.onnx`, which is written in that layout and runs only on
CPUs with the same width of blocks and the same ONNX Runtime. For CPUs with the other width there is
a third. What is opened on CPUs of this class, and how, is decided here, by measuring; elsewhere the
blocked file that fits is opened as it was asked for, if it answers as the portable one does, else
the portable one. ONNX Runtime's own saved optimization is not used: it ties the file to a CPU as
well, keeps the reorders, and its bytes differ from run to run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.kept import Kept
from pipeline.core import contention, machine
from pipeline.core.errors import ArtifactError, BuildError
from pipeline.core.figures import compare
from pipeline.core.machine import cpu_name
from pipeline.core.network import Images, Logits, Network
from pipeline.core.preprocess import Preprocess
from pipeline.targets.base import BuildJob
from pipeline.targets.ort import certificate
from pipeline.targets.ort.layout import (
    BLOCKED,
    OTHER_BLOCKED,
    PHOTO,
    PORTABLE,
    PROBE,
    block_size,
    write_probe,
)
from pipeline.targets.ort.profile import counts, trace
from pipeline.targets.ort.providers import NAMES, missing
from pipeline.targets.ort.session import Settings, errors, runtime, start
from pipeline.targets.ort.tune import Candidate, Trial, choose
from pipeline.targets.ort.waiting import choose_beside_others, other_waits

if TYPE_CHECKING:
    import onnx_ir as ir

    from pipeline.graphs.passes import Applied

BLOCKS = (8, 16)

TOLERANCE = 1e-4
"""Relative error that rewriting float32 may bring; rounding brings about 1e-6."""

LEAST_NARROW = 1e-5
"""Relative error below which nothing was computed in a narrow type: bfloat16 brings 1e-3."""

BESIDE_OTHERS = 4
"""Times as long may be measured beside other processes, where one sample is the mean of nine calls:
CARE-S2, which takes 80 ms there, has its six samples in ten seconds."""

_BATCH = 2
"""Images to try a dynamic batch with: more than one, so that a mix-up of axes shows."""


def write_models(job: BuildJob, folder: Path, *, rewrite: bool, provider: str) -> dict[str, Any]:
    """Write the model files and say what was done to the graph.

    Args:
        job: The graph, and what the model carries with it.
        folder: Where to write.
        rewrite: The graph is float32, so that the passes for it apply.
        provider: Only ONNX Runtime's own kernels have the blocked layout.

    Raises:
        BuildError: The graph cannot be read.
    """
    from pipeline.graphs.passes import finish_blocked, finish_portable, for_ort, optimize

    assert job.graph is not None
    block = None
    if rewrite and provider == "cpu":
        write_probe(folder / PROBE)
        block = block_size(folder / PROBE)
    model = read_graph(job.graph)
    passes = [*for_ort(block), *finish_portable()] if rewrite else []
    applied = optimize(model, passes)
    _save(model, folder / PORTABLE, job)
    facts: dict[str, Any] = {"passes": [asdict(step) for step in applied]}
    if block is None:
        (folder / PROBE).unlink(missing_ok=True)
    else:
        model = read_graph(job.graph)
        blocked = optimize(model, [*for_ort(block), *finish_blocked(block)])
        _save(model, folder / BLOCKED, job)
        # The portable file alone is what goes elsewhere.
        facts["alternatives"] = [BLOCKED, PROBE]
        facts["layout"] = {
            "block": block,
            "onnxruntime": runtime().__version__,
            "passes": [asdict(step) for step in blocked],
        }
        other = next((width for width in BLOCKS if width != block), None)
        if block in BLOCKS and other is not None:
            model = read_graph(job.graph)
            optimize(model, [*for_ort(other), *finish_blocked(other)])
            _save(model, folder / OTHER_BLOCKED, job)
            facts["layout"]["other"] = other
            facts["alternatives"].append(OTHER_BLOCKED)
    _log(job, applied)
    return facts


def write_photo(job: BuildJob, folder: Path) -> dict[str, Any]:
    """Put preprocessing before the portable model, in a file of its own; returns facts about it.

    Raises:
        BuildError: It cannot be said in this graph, or ONNX Runtime resizes otherwise than Pillow.
    """
    import onnx

    from pipeline.graphs import photo

    preprocess = Preprocess.from_dict(job.network.preprocess)
    photo.require_pillows(preprocess)
    onnx.save(photo.with_photo_input(onnx.load(folder / PORTABLE), preprocess), folder / PHOTO)
    return {"file": PHOTO, "input": f"{photo.PHOTO}: uint8 (height, width, 3), RGB, upright"}


def by_tanh(job: BuildJob, folder: Path) -> BuildJob:
    """The same job with a graph whose GELUs are computed by tanh.

    Args:
        job: What is to be built.
        folder: Where the other graph shall lie.

    Raises:
        BuildError: The graph cannot be read, or has no GELU.
    """
    import onnx_ir as ir

    assert job.graph is not None
    model = read_graph(job.graph)
    gelus = [node for node in model.graph if node.op_type == "Gelu" and not node.domain]
    if not gelus:
        raise BuildError(f"{job.network.name} has no GELU to compute by tanh: set gelu: exact")
    for node in gelus:
        node.attributes["approximate"] = ir.AttrString("approximate", "tanh")
    ir.save(model, folder / "tanh.onnx")
    job.log(f"{len(gelus)} GELUs by tanh, as asked for")
    return replace(job, graph=folder / "tanh.onnx")


def _log(job: BuildJob, applied: list[Applied]) -> None:
    for step in applied:
        job.log(f"{step.name}: {step.nodes_before} -> {step.nodes_after} nodes")


def read_graph(graph: Path) -> ir.Model:
    """Read an ONNX file.

    Raises:
        BuildError: It is none.
    """
    import onnx_ir as ir

    try:
        return ir.load(graph)
    except Exception as error:  # protobuf's and onnx_ir's errors have no common base
        raise BuildError(f"{graph} is no ONNX graph: {error}; run the export again") from error


def _save(model: ir.Model, path: Path, job: BuildJob) -> None:
    import onnx_ir as ir

    if job.batch is not None:
        fix_batch(model, job.batch)
    model.metadata_props.update(_about(job.network, job.precision))
    ir.save(model, path)


def fix_batch(model: ir.Model, batch: int) -> None:
    """State the batch in all shapes of a graph that takes any."""
    import onnx_ir as ir

    graph = model.graph
    shape = graph.inputs[0].shape
    symbol = shape[0] if shape is not None else None
    if not isinstance(symbol, ir.SymbolicDim):
        return
    inside = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *inside):
        if value.shape is not None:
            value.shape = ir.Shape([batch if dim == symbol else dim for dim in value.shape])


def _about(network: Network, precision: str) -> Mapping[str, str]:
    """The model's own metadata: what is needed to use the file alone."""
    return {
        **network.description,
        "name": network.name,
        "precision": precision,
        "labels": json.dumps(network.labels, ensure_ascii=False),
        "preprocess": json.dumps(dict(network.preprocess), sort_keys=True),
        "input_shape": json.dumps(network.input_shape),
    }


def try_models(
    job: BuildJob, folder: Path, settings: Settings, *, tune_seconds: float, allow_fallback: bool
) -> dict[str, Any]:
    """Run the models: check their answers, choose the faster one, and count what ran where.

    Args:
        job: What they were made from.
        folder: Where they lie.
        settings: How to open them.
        tune_seconds: How long to measure the ways of running them; 0 to take the first.
        allow_fallback: Nodes may run on another provider than the one asked for.

    Raises:
        BuildError: ONNX Runtime refuses the model, its answers are wrong, nodes ran elsewhere, or
            in another precision.
    """
    threads = machine.resolve_threads(settings.threads)
    batch = _BATCH if job.batch is None else job.batch
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, *job.network.input_shape), np.float32)
    failures: tuple[type[Exception], ...] = (ArtifactError, *errors())
    try:
        notes = _check_answers(job, folder, images)
        if settings.precision != "fp32":
            why = missing(settings.provider, runtime(), settings.precision)
            if why is not None:
                # Nothing in the file is narrow: another machine can run what is built here.
                job.log(f"not run here: {why}")
                return {**notes, **_opening(PORTABLE, settings, settings), "not_run": why}
            _check_precision(job, folder / PORTABLE, images, settings)
        chosen, tuning = _choose(job, folder, settings, threads, images, tune_seconds)
        begin = time.perf_counter()
        start(folder / chosen.model, chosen.settings, threads)
        opening = time.perf_counter() - begin
        ran = counts(trace(folder / chosen.model, chosen.settings, threads, images, runs=1))
    except failures as error:
        raise BuildError(
            f"onnxruntime cannot run the {job.precision} graph of {job.network.name}: {error}"
        ) from error
    fallback = _check_providers(ran, NAMES[chosen.settings.provider], allow_fallback)
    return {
        **notes,
        **_opening(chosen.model, settings, chosen.settings),
        "tuning": tuning,
        "nodes": ran,
        "fallback": fallback,
        "opening_ms": round(1e3 * opening, 1),
        "device": f"{cpu_name()}, {threads} {'thread' if threads == 1 else 'threads'}",
    }


def _opening(model: str, asked: Settings, chosen: Settings) -> dict[str, Any]:
    """Facts of how a file is to be opened, here and elsewhere."""
    return {
        "decided_on": certificate.here(),
        "asked": asked.to_dict(),
        "model": model,
        "session": chosen.to_dict(),
    }


_PLAIN = Settings(level="basic")
"""Settings under which a graph's answers are what its operators say."""


def _run(path: Path, images: Images, settings: Settings = _PLAIN) -> Logits:
    session = start(path, settings, 1)
    logits: Logits = session.run(None, {session.get_inputs()[0].name: images})[0]
    return logits


def _check_answers(job: BuildJob, folder: Path, images: Images) -> dict[str, Any]:
    """Every model file must answer as the graph that it was made from.

    The file in the blocked layout is an addition: it goes where it does not, and the facts say why.
    """
    assert job.graph is not None
    expected = _run(job.graph, images)
    wrong = _difference(job, folder / PORTABLE, images, expected)
    if wrong is not None:
        raise BuildError(
            f"{PORTABLE} of {job.network.name} {wrong}: a graph pass is wrong for this network; "
            "please report it"
        )
    if not (folder / BLOCKED).exists():
        return {}
    failures: tuple[type[Exception], ...] = (ArtifactError, *errors())
    try:
        wrong = _difference(job, folder / BLOCKED, images, expected)
    except failures as error:
        wrong = f"does not run: {' '.join(str(error).split())}"
    if wrong is None:
        return {}
    for name in (BLOCKED, OTHER_BLOCKED, PROBE):
        (folder / name).unlink(missing_ok=True)
    job.log(f"{BLOCKED} {wrong}; only the portable file is kept")
    return {"blocked_layout": f"dropped, because it {wrong}"}


def _check_precision(job: BuildJob, path: Path, images: Images, settings: Settings) -> None:
    """What is asked for in a narrow type must be computed in it; validation judges how well."""
    found = compare(_run(path, images, settings), _run(path, images))
    job.log(f"{path.name}: relative error {found.relative_error:.1e} in {settings.precision}")
    if not found.finite:
        raise BuildError(f"{job.network.name} overflows in {settings.precision}")
    if found.relative_error < LEAST_NARROW:
        raise BuildError(
            f"{NAMES[settings.provider]} answers as in float32, though {settings.precision} was "
            "asked for: build fp32"
        )


def same_answers(path: Path, portable: Path) -> bool:
    """Whether a file runs here and gives the answers of the portable one, on noise."""
    failures: tuple[type[Exception], ...] = (ArtifactError, *errors())
    try:
        shape = start(portable, _PLAIN, 1).get_inputs()[0].shape
        sides = [side if isinstance(side, int) else _BATCH for side in shape]
        images = np.random.default_rng(0).standard_normal(sides, np.float32)
        found = compare(_run(path, images), _run(portable, images))
    except failures:
        return False
    return found.finite and found.relative_error <= TOLERANCE


def _difference(
    job: BuildJob, path: Path, images: Images, expected: Logits, settings: Settings = _PLAIN
) -> str | None:
    """What is wrong with a model's answers, if anything."""
    found = compare(_run(path, images, settings), expected)
    job.log(f"{path.name}: relative error {found.relative_error:.1e} to its graph")
    if found.finite and found.relative_error <= TOLERANCE:
        return None
    return (
        f"differs from its graph by a relative error of {found.relative_error:.1e}, more than "
        f"{TOLERANCE:.0e}"
    )


def _choose(
    job: BuildJob, folder: Path, settings: Settings, threads: int, images: Images, seconds: float
) -> tuple[Candidate, dict[str, Any]]:
    """The way to run the model here, and how it was chosen.

    The blocked file is the default where there is one, and settings as they were asked for; only
    what is faster beyond doubt takes their place: a measurement on a busy machine decides nothing.
    """
    files = {"portable": Candidate(PORTABLE, settings)}
    if (folder / BLOCKED).exists():
        files = {"blocked": Candidate(BLOCKED, settings), **files}
    if seconds <= 0:
        name = next(iter(files))
        return files[name], {"chosen": name, "why": "tune is off"}
    one = images[:1] if job.batch is None else images
    kept = Kept(job.evaluations)
    tuning: dict[str, Any] = {}
    name = next(iter(files))
    if len(files) > 1:
        layout = choose(Trial(folder, files, threads, one, seconds / 2), kept=kept)
        name = layout.name
        tuning["files"] = {**layout.to_dict(), "chosen": name}
    ways = _other_settings(name, files[name], threads)
    ways |= _other_provider(job, folder, settings, images, tuning)
    quiet = choose(Trial(folder, ways, threads, one, seconds / 2), kept=kept)
    tuning["settings"] = quiet.to_dict()
    doubt = f", as asked for: {quiet.doubt}" if quiet.doubt else ""
    job.log(f"chosen: {quiet.name}, {quiet.medians[quiet.name]:.2f} ms{doubt}")
    chosen = ways[quiet.name]
    if threads == 1 or chosen.settings.provider != "cpu" or quiet.doubt:
        return chosen, {**tuning, "chosen": quiet.name}
    trial = Trial(folder, ways, threads, one, BESIDE_OTHERS * seconds, contention.rivals())
    name, chosen, found = choose_beside_others(trial, quiet, job.log, kept)
    return chosen, {**tuning, **({"contended": found} if found else {}), "chosen": name}


def _other_settings(name: str, asked: Candidate, threads: int) -> dict[str, Candidate]:
    """Ways to run one file; what was asked for is the first."""
    return {name: asked, **(other_waits(name, asked) if threads > 1 else {})}


def _other_provider(
    job: BuildJob, folder: Path, settings: Settings, images: Images, tuning: dict[str, Any]
) -> dict[str, Candidate]:
    """OpenVINO, where it is installed and offers this CPU, if it answers right; else, why not."""
    if settings.provider != "cpu" or missing("openvino", runtime()) is not None:
        return {}
    assert job.graph is not None
    other = replace(settings, provider="openvino")
    failures: tuple[type[Exception], ...] = (ArtifactError, BuildError, *errors())
    try:
        wrong = _difference(job, folder / PORTABLE, images, _run(job.graph, images), other)
        ran = counts(trace(folder / PORTABLE, other, 1, images, runs=1))
        _check_providers(ran, NAMES["openvino"], allow_fallback=False)
    except failures as error:
        wrong = f"does not run: {' '.join(str(error).split())}"
    if wrong is not None:
        tuning["openvino"] = f"not taken, because {PORTABLE} {wrong}"
        return {}
    return {"portable, openvino": Candidate(PORTABLE, other)}


def _check_providers(
    ran: Mapping[str, Mapping[str, int]], provider: str, allow_fallback: bool
) -> bool:
    """True if nodes ran on another provider than `provider`; refuses that unless allowed."""
    elsewhere = {name: sum(types.values()) for name, types in ran.items() if name != provider}
    if elsewhere and not allow_fallback:
        raise BuildError(
            f"{sum(elsewhere.values())} nodes ran on {', '.join(elsewhere)} instead of {provider}: "
            "set allow_fallback: true to accept that, or choose another provider"
        )
    return bool(elsewhere)
