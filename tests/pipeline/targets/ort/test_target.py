"""The ONNX Runtime target: build, open, run, and everything that can be wrong with it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from pipeline.core import machine
from pipeline.core.cpu_classes import CLASSES
from pipeline.core.errors import ArtifactError, BuildError, InputError, UnavailableError
from pipeline.core.network import Images, Logits, Network
from pipeline.steps import artifact
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import BuildJob
from pipeline.targets.ort import build as ort_build
from pipeline.targets.ort import certificate, providers, target
from pipeline.targets.ort.layout import BLOCKED, OTHER_BLOCKED, PORTABLE, PROBE
from pipeline.targets.ort.options import OrtOptions
from pipeline.targets.ort.runner import OrtRunner
from pipeline.targets.ort.session import Settings
from pipeline.targets.ort.target import OrtTarget, how_to_open, profile

NETWORK = Network("small", ("cat", "dög"), (3, 16, 16), {"size": 16}, {"license": "MIT"})
TARGET = OrtTarget()

Build = Callable[..., Artifact]


def network() -> onnx.ModelProto:
    """Convolutions, a split and a classifier; 32 channels, so that blocks of 16 fit."""
    rng = np.random.default_rng(4)

    def weight(name: str, *shape: int) -> TensorProto:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["x1"], strides=[4, 4]),
        helper.make_node("Gelu", ["x1"], ["x2"]),
        helper.make_node("Conv", ["x2", "w2"], ["x3"], group=32, pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["x3", "x1"], ["x4"]),
        helper.make_node("GlobalAveragePool", ["x4"], ["x5"]),
        helper.make_node("Flatten", ["x5"], ["x6"]),
        helper.make_node("Gemm", ["x6", "w3"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            weight("w1", 32, 3, 4, 4),
            weight("b1", 32),
            weight("w2", 32, 1, 3, 3),
            weight("w3", 32, 2),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def cpu_vendor() -> str:
    """Such as "GenuineIntel", of x86 CPUs on Linux; "unknown" elsewhere."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    found = re.search(r"vendor_id\s*:\s*(\w+)", text)
    return found[1] if found else "unknown"


def reference(images: Images) -> Logits:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(network().SerializeToString(), options)
    logits: Logits = session.run(None, {"image": images})[0]
    return logits


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds the small network: (options by name; graph, log)."""

    def make(
        graph: bytes | None = None,
        log: Callable[[str], None] = lambda line: None,
        batch: int | None = None,
        precision: str = "fp32",
        photo: bool = False,
        **options: Any,
    ) -> Artifact:
        folder = tmp_path_factory.mktemp("ort")
        source = folder / "source.onnx"
        source.write_bytes(network().SerializeToString() if graph is None else graph)
        job = BuildJob(
            network=NETWORK,
            precision=precision,
            options=OrtOptions(**{"tune": False, **options}),
            graph=source,
            module=lambda: pytest.fail("this target builds from the graph"),
            calibration=lambda n: pytest.fail("float32 needs no calibration"),
            batch=batch,
            photo=photo,
            log=log,
        )
        return artifact.make(
            folder / "built",
            kind="build",
            name=f"ort/{precision}",
            key="key",
            made_from={},
            tools=TARGET.versions(),
            build=lambda into: TARGET.build(job, into),
        )

    return make


@pytest.fixture(scope="module")
def built(build: Build) -> Artifact:
    """The small network, built once."""
    return build()


@pytest.fixture
def pictures() -> Images:
    return np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 3])
def test_it_answers_as_the_graph(built: Artifact, pictures: Images, batch: int) -> None:
    with TARGET.open(built, threads=1) as runner:
        logits = runner(pictures[:batch])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference(pictures[:batch]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", [True, False])
def test_memory_is_moved_only_if_that_is_asked_for(
    build: Build, pictures: Images, asked: bool
) -> None:
    with TARGET.open(build(huge_pages=asked), threads=1) as runner:
        runner(pictures)
        runner(pictures)
        assert (runner.device_state() is not None) is asked


def test_a_fixed_batch_is_stated_and_kept(build: Build, pictures: Images) -> None:
    fixed = build(batch=2)
    names = [PORTABLE, *({BLOCKED} & set(fixed.files))]
    for graph in (onnx.load(fixed.path(name)).graph for name in names):
        for value in (*graph.input, *graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_value == 2
    with TARGET.open(fixed, threads=1) as runner:
        assert (runner.smallest, runner.largest) == (2, 2)
        np.testing.assert_allclose(
            runner(pictures[:2]), reference(pictures[:2]), rtol=1e-4, atol=1e-5
        )
        with pytest.raises(InputError, match=r"shape \(2, 3, 16, 16\)"):
            runner(pictures)


def test_openvino_runs_every_node(build: Build, pictures: Images) -> None:
    vendor = cpu_vendor()
    if vendor != "GenuineIntel":
        pytest.skip(f"OpenVINO's plugin offers Intel's devices alone, and this CPU is {vendor}")
    pytest.importorskip(providers.PLUGIN, reason="pip install onnxruntime-ep-openvino")
    made = build(provider="openvino")
    assert set(made.facts["nodes"]) == {providers.NAMES["openvino"]}
    assert made.facts["fallback"] is False
    assert "layout" not in made.facts, "the blocked layout is that of ONNX Runtime's own kernels"
    with TARGET.open(made, threads=1) as runner:
        for batch in (1, 3):
            logits = runner(pictures[:batch])
            np.testing.assert_allclose(logits, reference(pictures[:batch]), rtol=1e-3, atol=1e-4)
    fixed = build(provider="openvino", batch=2)
    with TARGET.open(fixed, threads=2) as runner:
        assert (runner.smallest, runner.largest) == (2, 2)
        logits = runner(pictures[:2])
    np.testing.assert_allclose(logits, reference(pictures[:2]), rtol=1e-3, atol=1e-4)


def test_bfloat16_is_computed_by_openvino(build: Build, pictures: Images) -> None:
    if why := machine.why_no_bfloat16():
        pytest.skip(why)
    if cpu_vendor() != "GenuineIntel":
        pytest.skip("OpenVINO's plugin offers Intel's devices alone")
    pytest.importorskip(providers.PLUGIN, reason="pip install onnxruntime-ep-openvino")
    made = build(precision="bf16")
    assert set(made.facts["nodes"]) == {providers.NAMES["openvino"]}
    assert set(made.files) == {PORTABLE}
    with TARGET.open(made, threads=1) as runner:
        logits = runner(pictures)
    wrong = np.abs(logits - reference(pictures)).max() / np.abs(logits).max()
    assert 1e-5 < wrong < 0.02


def test_bfloat16_is_built_where_no_cpu_has_it_and_says_why_it_does_not_run(
    build: Build, pictures: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "instructions", lambda: ("avx2", "fma"))
    lines: list[str] = []
    # The other form of GELU is one of fp32 alone, and so is the file for photographs.
    made = build(precision="bf16", gelu="tanh", photo=True, log=lines.append)
    why = "this CPU has no amx_bf16 and no avx512_bf16"
    assert TARGET.missing(made) == made.facts["not_run"] == why
    assert f"not run here: {why}" in lines
    assert made.facts["gelu"] == "exact"
    assert set(made.files) == {PORTABLE}
    with pytest.raises(UnavailableError, match="no amx_bf16"):
        TARGET.open(made)
    session = onnxruntime.InferenceSession(str(made.path(PORTABLE)))
    np.testing.assert_allclose(
        session.run(None, {"image": pictures})[0], reference(pictures), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("narrow", "said"),
    [
        (lambda logits: logits * (1 + 1e-6), "answers as in float32, though bf16 was asked for"),
        (lambda logits: logits * np.inf, "small overflows in bf16"),
        (lambda logits: logits * 1.003, None),
    ],
)
def test_what_is_asked_for_in_bfloat16_is_computed_in_it(
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
    narrow: Callable[[Logits], Logits],
    said: str | None,
) -> None:
    run = ort_build._run

    def pretended(path: Path, images: Images, settings: Settings = ort_build._PLAIN) -> Logits:
        logits = run(path, images)
        return narrow(logits) if settings.precision == "bf16" else logits

    monkeypatch.setattr(ort_build, "_run", pretended)
    monkeypatch.setattr(ort_build, "missing", lambda *arguments: None)
    monkeypatch.setattr(providers, "missing", lambda *arguments: None)
    monkeypatch.setattr(providers, "add", lambda *arguments: [])
    monkeypatch.setitem(providers.NAMES, "openvino", "CPUExecutionProvider")
    if said is None:
        assert build(precision="bf16").facts["fallback"] is False
        return
    with pytest.raises(BuildError, match=said):
        build(precision="bf16")


def test_no_class_of_cpus_has_bfloat16(
    build: Build, built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "instructions", lambda: ("avx2", "fma"))
    narrow = build(precision="bf16")
    for cls in CLASSES.values():
        assert TARGET.missing_on(built, cls) is None
        assert TARGET.missing_on(narrow, cls) == f"CPUs with {cls.title} have no bfloat16"


def test_the_portable_file_answers_alike(built: Artifact, pictures: Images) -> None:
    session = onnxruntime.InferenceSession(str(built.path(PORTABLE)))
    logits = session.run(None, {"image": pictures})[0]
    np.testing.assert_allclose(logits, reference(pictures), rtol=1e-4, atol=1e-5)
    assert {entry.domain for entry in onnx.load(built.path(PORTABLE)).opset_import} == {""}


def test_files_carry_labels_and_preprocessing(built: Artifact) -> None:
    about = {p.key: p.value for p in onnx.load(built.path(PORTABLE)).metadata_props}
    assert json.loads(about["labels"]) == ["cat", "dög"]
    assert json.loads(about["preprocess"]) == {"size": 16}
    assert (about["license"], about["precision"]) == ("MIT", "fp32")


def test_two_builds_give_the_same_bytes(build: Build, built: Artifact) -> None:
    assert build().digest == built.digest


def test_facts_say_what_ran(built: Artifact) -> None:
    facts = built.facts
    assert set(facts["nodes"]) == {"CPUExecutionProvider"}
    assert facts["nodes"]["CPUExecutionProvider"]["float"] > 3
    assert facts["fallback"] is False
    assert facts["tuning"] == {"chosen": facts["tuning"]["chosen"], "why": "tune is off"}


def test_device_says_runtime_provider_and_threads(built: Artifact) -> None:
    with TARGET.open(built, threads=1) as runner:
        assert runner.device.startswith(f"ONNX Runtime {onnxruntime.__version__}, CPUExecution")
        assert "1 thread," in runner.device


def test_tuning_is_recorded_with_its_alternatives(build: Build) -> None:
    lines: list[str] = []
    facts = build(log=lines.append, tune=True, tune_seconds=0.05).facts
    candidates = facts["tuning"]["settings"]["candidates"]
    assert facts["tuning"]["chosen"] in candidates
    assert len(candidates) >= 2
    assert all(c["interval"][0] <= c["interval"][1] for c in candidates.values())
    assert any(line.startswith("chosen: ") for line in lines)


def test_another_runtime_version_gets_the_portable_file(built: Artifact) -> None:
    if built.facts["model"] != BLOCKED:
        pytest.skip("this CPU's ONNX Runtime has no blocked layout")
    assert how_to_open(built)[0].name == BLOCKED
    for change in ({"onnxruntime": "1.0"}, {"block": 4, "other": 4}):
        layout = {**built.facts["layout"], **change}
        other = Artifact(**{**vars(built), "facts": {**built.facts, "layout": layout}})
        assert how_to_open(other)[0].name == PORTABLE


def test_both_widths_of_blocks_are_there(built: Artifact) -> None:
    if built.facts["model"] != BLOCKED:
        pytest.skip("this CPU's ONNX Runtime has no blocked layout")
    layout = built.facts["layout"]
    assert {layout["block"], layout["other"]} == {8, 16}
    assert set(built.files) == {PORTABLE, BLOCKED, OTHER_BLOCKED, PROBE}
    # One of the three is shipped, and its size is the artifact's.
    assert set(built.facts["alternatives"]) == {BLOCKED, OTHER_BLOCKED, PROBE}
    assert built.facts["decided_on"] == certificate.here()


def test_a_file_for_the_other_width_is_opened_only_if_it_answers_right(
    built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    if built.facts["model"] != BLOCKED:
        pytest.skip("this CPU's ONNX Runtime has no blocked layout")
    other = built.facts["layout"]["other"]
    monkeypatch.setattr(target, "block_size", lambda probe: other)
    monkeypatch.setattr(target, "_ALIKE", {})
    # In truth this CPU has the width of the first file: the other one's answers are wrong here.
    assert how_to_open(built)[0].name == PORTABLE
    monkeypatch.setattr(target, "_ALIKE", {})
    monkeypatch.setattr("pipeline.targets.ort.build.same_answers", lambda path, portable: True)
    assert how_to_open(built)[0].name == OTHER_BLOCKED


def test_what_was_decided_on_one_class_is_not_taken_for_another(
    built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    if built.facts["model"] != BLOCKED:
        pytest.skip("this CPU's ONNX Runtime has no blocked layout")
    portable = Artifact(**{**vars(built), "facts": {**built.facts, "model": PORTABLE}})
    assert how_to_open(portable)[0].name == PORTABLE
    monkeypatch.setattr(certificate, "here", lambda: "another")
    assert how_to_open(portable)[0].name == BLOCKED


def chosen_otherwise(built: Artifact, **session: Any) -> Artifact:
    """The artifact as if a measurement on the class "measured" had chosen these settings."""
    facts = built.facts
    chosen = {**facts["session"], **session}
    return Artifact(**{**vars(built), "facts": {**facts, "session": chosen, "model": PORTABLE}})


def test_settings_that_were_measured_hold_for_that_class_alone(
    built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = chosen_otherwise(built, spinning=False, entries={"session.set_denormal_as_zero": "1"})
    assert how_to_open(other)[1].spinning is False
    monkeypatch.setattr(certificate, "here", lambda: "another")
    asked = how_to_open(other)[1]
    assert (asked.spinning, dict(asked.entries)) == (True, {})
    # An artifact of an older build does not say what was asked for.
    older = Artifact(**{**vars(other), "facts": {k: v for k, v in other.facts.items()
                                                 if k != "asked"}})  # fmt: skip
    assert how_to_open(older)[1].spinning is False


def test_a_provider_that_was_measured_to_be_faster_is_taken_only_where_it_is(
    built: Artifact, pictures: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, there = chosen_otherwise(built, provider="openvino"), {"openvino": "not here"}
    monkeypatch.setattr(providers, "missing", lambda name, *more: there.get(name))
    assert TARGET.missing(other) is None
    file, settings = how_to_open(other)
    assert settings.provider == "cpu"
    if built.facts["model"] == BLOCKED:
        assert file.name == BLOCKED
    with TARGET.open(other, threads=1) as runner:
        assert "CPUExecutionProvider" in runner.device
    # Asked for, it is needed.
    needed = Artifact(**{**vars(other), "facts": {**other.facts, "asked": other.facts["session"]}})
    assert TARGET.missing(needed) == "not here"
    there.clear()
    assert how_to_open(other)[1].provider == "openvino"
    assert how_to_open(other)[0].name == PORTABLE
    # On another class nobody measured it.
    monkeypatch.setattr(certificate, "here", lambda: "another")
    assert how_to_open(other)[1].provider == "cpu"


def test_a_measurement_in_doubt_chooses_nothing(
    build: Build, built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    if built.facts["model"] != BLOCKED:
        pytest.skip("this CPU's ONNX Runtime has no blocked layout")

    def times(sessions: Any, images: Images, seconds: float) -> dict[str, list[float]]:
        # "portable" has the smaller median of enough samples, on an interval that holds 1.
        return {name: 3 * ([9.0, 9.9, 10.0] if name == "portable" else [9.1, 10.0, 10.1])
                for name in sessions}  # fmt: skip

    monkeypatch.setattr("pipeline.targets.ort.tune.interleave", times)
    files = build(tune=True, tune_seconds=0.01).facts["tuning"]["files"]
    assert files["candidates"]["portable"]["p50_ms"] < files["candidates"]["blocked"]["p50_ms"]
    assert files["chosen"] == "blocked"


def test_opening_an_artifact_that_is_not_certified_warns(
    built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "visible_instructions", lambda: ("avx2", "fma"))
    facts = {**built.facts, "model": PORTABLE, "decided_on": "avx2"}
    for certified, warned in ((["avx2-vnni"], True), (["avx2-vnni", "avx2"], False)):
        stated = {**facts, "certificate": {"certified_for": certified}}
        artifact = Artifact(**{**vars(built), "facts": stated})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            TARGET.open(artifact, threads=1).close()
        assert bool(caught) is warned
        assert ("is certified for AVX2 + VNNI, not for" in TARGET.doubt(artifact)) is warned
    assert TARGET.doubt(built) == ""


def test_gelu_by_tanh_is_asked_for_and_named(build: Build, pictures: Images) -> None:
    exact, tanh = build(), build(gelu="tanh")
    assert (exact.facts["gelu"], tanh.facts["gelu"]) == ("exact", "tanh")
    assert ("approximates" in exact.facts, tanh.facts["approximates"]) == (False, "gelu: tanh")
    kinds = [
        [a.s for node in onnx.load(made.path(PORTABLE)).graph.node for a in node.attribute
         if a.name == "approximate"]
        for made in (exact, tanh)
    ]  # fmt: skip
    assert b"tanh" not in kinds[0]
    assert kinds[1] == [b"tanh"]
    with TARGET.open(exact, threads=1) as one, TARGET.open(tanh, threads=1) as other:
        first, second = one(pictures), other(pictures)
    assert 0 < np.abs(first - second).max() < 1e-2 * np.abs(first).max()


def test_gelu_by_tanh_needs_a_gelu(build: Build) -> None:
    graph = network()
    graph.graph.node[1].op_type = "Relu"
    with pytest.raises(BuildError, match="has no GELU to compute by tanh: set gelu: exact"):
        build(graph.SerializeToString(), gelu="tanh")


def test_inspect_says_what_it_saw(built: Artifact) -> None:
    assert "input (batch, 3, 16, 16), 2 labels" in TARGET.inspect(built)


def test_profile_lists_operators_by_time(built: Artifact, pictures: Images) -> None:
    rows = profile(built, pictures[:1], threads=1, runs=3)
    assert [r.milliseconds for r in rows] == sorted((r.milliseconds for r in rows), reverse=True)
    assert sum(r.share for r in rows) == pytest.approx(1)
    assert sum(r.nodes for r in rows) == built.facts["nodes"]["CPUExecutionProvider"]["float"]
    assert any(row.operator.endswith("Conv") and "(1,32,4,4)" in row.shapes for row in rows)
    if built.facts["model"] == BLOCKED:
        assert any(row.layout == "NCHWc" for row in rows)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 3, 16, 15), np.float32),
        np.zeros((3, 16, 16), np.float32),
        np.zeros((0, 3, 16, 16), np.float32),
        np.zeros((1, 3, 16, 16), np.float64),
        np.zeros((1, 3, 16, 16), np.uint8),
    ],
)
def test_images_that_do_not_fit(built: Artifact, images: Any) -> None:
    with (
        TARGET.open(built, threads=1) as runner,
        pytest.raises(InputError, match=r"takes float32 images of shape \(batch, 3, 16, 16\)"),
    ):
        runner(images)


def test_what_is_judged_answers_the_same_without_waiting_actively(
    built: Artifact, pictures: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Settings] = []

    class Watched(OrtRunner):
        def __init__(self, model: Path, settings: Settings, threads: int) -> None:
            opened.append(settings)
            super().__init__(model, settings, threads)

    monkeypatch.setattr(target, "OrtRunner", Watched)
    with TARGET.open(built) as timed, TARGET.open_to_judge(built) as judged:
        assert judged(pictures).tobytes() == timed(pictures).tobytes()
        assert judged.device == timed.device
    assert opened[1] == replace(opened[0], spinning=False)


def test_a_damaged_artifact_is_not_judged(build: Build) -> None:
    damaged = build()
    damaged.path(PORTABLE).write_bytes(b"no graph")
    with pytest.raises(ArtifactError):
        TARGET.open_to_judge(damaged)


def test_a_closed_runner_says_so(built: Artifact, pictures: Images) -> None:
    runner = TARGET.open(built, threads=1)
    runner.close()
    with pytest.raises(InputError, match="closed"):
        runner(pictures)


def test_more_threads_than_granted(built: Artifact) -> None:
    with pytest.raises(InputError, match="10000 threads are asked for, this process may use 1 to"):
        TARGET.open(built, threads=10000)
    with pytest.raises(InputError, match="0 threads"):
        TARGET.open(built, threads=0)


def test_a_changed_file_is_refused(build: Build) -> None:
    made = build()
    path = made.path(PORTABLE)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="has changed"):
        TARGET.open(made, threads=1)


@pytest.mark.parametrize("graph", [b"", b"no model at all", network().SerializeToString()[:500]])
def test_a_graph_that_is_none(build: Build, graph: bytes) -> None:
    with pytest.raises(BuildError):
        build(graph)


def test_an_operator_that_the_runtime_lacks(build: Build) -> None:
    model = network()
    model.graph.node[1].op_type = "NoSuchOperator"
    with pytest.raises(BuildError, match="NoSuchOperator"):
        build(model.SerializeToString())


def test_nodes_elsewhere_fail_the_build(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = {"CPUExecutionProvider": {"float": 3}, "SomeExecutionProvider": {"float": 2}}
    monkeypatch.setattr("pipeline.targets.ort.build.counts", lambda nodes: ran)
    with pytest.raises(BuildError, match="2 nodes ran on SomeExecutionProvider"):
        build()
    assert build(allow_fallback=True).facts["fallback"] is True


def test_wrong_answers_fail_the_build(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.targets.ort.build.TOLERANCE", -1.0)
    with pytest.raises(BuildError, match="differs from its graph"):
        build()


def test_a_blocked_layout_that_fails_is_dropped(
    build: Build, built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    if built.facts["model"] != BLOCKED:
        pytest.skip("this CPU's ONNX Runtime has no blocked layout")
    monkeypatch.setattr(
        "pipeline.graphs.passes.nchwc.block_filters", lambda filters, block: filters * 2
    )
    monkeypatch.setattr(
        "pipeline.graphs.passes.nchwc.block_outputs", lambda filters, block: filters * 2
    )
    other = build()
    assert set(other.files) == {PORTABLE}
    assert "differs from its graph" in other.facts["blocked_layout"]


def test_a_provider_that_is_not_there(build: Build) -> None:
    if "OpenVINOExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has OpenVINO")
    with pytest.raises(UnavailableError, match="has no OpenVINOExecutionProvider"):
        build(provider="openvino")


def test_a_faster_provider_is_not_taken_if_nodes_run_elsewhere(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO seems to be there, but the CPU provider does the work."""
    monkeypatch.setattr(providers, "missing", lambda *arguments: None)
    monkeypatch.setattr("pipeline.targets.ort.build.missing", lambda *arguments: None)
    monkeypatch.setattr(providers, "add", lambda *arguments: ["CPUExecutionProvider"])
    facts = build(tune=True, tune_seconds=0.1).facts
    assert "instead of OpenVINOExecutionProvider" in facts["tuning"]["openvino"]
    assert facts["session"]["provider"] == "cpu"


def test_options_are_strict() -> None:
    for wrong in ({"thread": 2}, {"threads": 0}, {"provider": "gpu"}):
        with pytest.raises(ValidationError):
            OrtOptions.model_validate(wrong)


def test_requirements_name_what_is_there() -> None:
    found = {requirement.name: requirement.found for requirement in TARGET.requirements()}
    assert found["onnxruntime"] == onnxruntime.__version__


# Threads.
