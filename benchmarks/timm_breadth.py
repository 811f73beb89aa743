"""Does a network of each of timm's families come through, to all three targets?

    python benchmarks/timm_breadth.py --lines breadth.jsonl --docs docs/breadth.md
    python benchmarks/timm_breadth.py --lines breadth.jsonl --only resnet vgg --again
    python benchmarks/timm_breadth.py --lines breadth.jsonl --limit 10 --seconds 900
    python benchmarks/timm_breadth.py --lines breadth.jsonl --names resnet18 levit_128s
    python benchmarks/timm_breadth.py --lines breadth.jsonl --int8 --names resnet18

A family is a module of timm; its smallest classifier stands for it, at the smallest size that it
takes, with random weights that are settled (see `care.settle`). Each goes through `pipeline.run`,
from the export to the validation, in a process of its own, and leaves a line of JSON; a line that
is there is not made again. Networks may be named instead; one that stands for its family is not run
again. With `--int8`, ONNX Runtime's 8 bits are looked at alone, in a table of their own. Logits on
a few images are held against PyTorch's by the relative error of each image: noise with the spectrum
and the colours of photographs. What half precision breaks is run once more with `repair: true`, and
counted apart. The tables between the markers of the document are made of the lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.process
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from documents import fill
from PIL import Image
from torch.overrides import TorchFunctionMode

import pipeline
from care.settle import noise
from pipeline.core.errors import PipelineError
from pipeline.core.figures import relative_errors
from pipeline.core.words import in_short
from pipeline.report.model import Run
from pipeline.steps.keys import versions
from pipeline.steps.step import State

ASKED_OF_REPAIR = 0.008
"""Largest relative error over all calibration images that a repair is asked for: each single one of
the validation images shall stay within `LIMITS`."""

WAY = 2
"""Since 2: noise like photographs, weights that magnify nothing (see `care.settle`), and a repair.
Before: white noise for BatchNorms, and the images of Fashion-MNIST."""

LIMITS = {"ort/fp32": 1e-3, "trt/fp16": 2e-2, "coreml/fp16": 2e-2}
"""Largest relative error of the logits of an image, by artifact."""

INT8_LIMITS = {"ort/fp32": 1e-3, "ort/int8": 0.5}
"""The same with `--int8`: random weights magnify what 8 bits round, and have no margins between
classes to lose. The limit tells a network that comes through from one that is broken; how accurate
8 bits are, trained weights tell."""

SIZES = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448)
"""Of images, beside the smallest and the usual one that timm states."""

PASSES = "passes"
REPAIRED = "passes after repair"
STAGES = ("export", "simplify", "calibrate", "precision", "build", "validate")
"""Calibration is for repairs alone: where nothing asks for its images, there is no such step."""

IMAGES, CALIBRATION_IMAGES, CLASSES = 16, 32, 10
VALIDATION, CALIBRATION = "validation", "calibration"
STD = 0.25
PACKAGES = ("timm", "torch", "onnxruntime", "coremltools", "tensorrt-rtx-cu13")


@dataclass
class Line:
    """What became of one family, or of a network that was named.

    Attributes:
        family: Module of timm.
        name: The network that stands for it; "" where none could be made.
        size: Height and width of its images.
        parameters: How many numbers it holds.
        outcome: By artifact, `PASSES`, `REPAIRED` and what was raised, or the first step that
            fails and why.
        errors: By artifact, the largest relative error of an image.
        versions: Of the packages that decide.
        seconds: How long it took.
        named: It was named, rather than its family.
        way: By which way of settling weights and making images; see `WAY`.
    """

    family: str
    name: str = ""
    size: int = 0
    parameters: int = 0
    outcome: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    named: bool = False
    way: int = 1


class Unfilled(TorchFunctionMode):
    """Leaves weights as they are: where they are counted alone, filling them takes the time."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Skip what works in place."""
        name = getattr(function, "__name__", "")
        if name.endswith("_") and not name.startswith("_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def families() -> list[str]:
    """Modules of timm that hold networks; `care` registers its own networks with timm, too."""
    found = {name: timm.list_models(module=name) for name in timm.list_modules()}
    return [
        family
        for family, names in found.items()
        if names and timm.model_entrypoint(names[0]).__module__.startswith("timm.")
    ]


def family_of(name: str) -> str:
    """The module of timm that holds a network."""
    module: str = timm.model_entrypoint(name).__module__
    return module.rpartition(".")[2]


def parameters(name: str) -> int:
    """How many numbers a classifier holds."""
    with torch.device("meta"), Unfilled():
        model = timm.create_model(name, num_classes=CLASSES)
    return sum(p.numel() for p in model.parameters())


def members(family: str) -> list[tuple[int, str]]:
    """Parameters and name of the classifiers of a family that can be made, the smallest first."""
    found = []
    for name in timm.list_models(module=family):
        try:
            found.append((parameters(name), name))
        except Exception:  # some compute with values while they are made
            continue
    return sorted(found)


def kwargs_of(name: str, size: int) -> dict[str, Any]:
    """What the constructor needs to be told of the size of images."""
    stated = timm.get_pretrained_cfg(name, allow_unregistered=False)
    own = stated.input_size[-1] if stated else size
    return {"img_size": size} if stated and stated.fixed_input_size and own != size else {}


class NoLogitsError(ValueError):
    """What a network gives is no logits."""


def unfilled(name: str, size: int, device: str) -> torch.nn.Module:
    """A classifier for images of a size, to see shapes: filling its weights would take the time."""
    with torch.device(device), Unfilled() if device == "meta" else contextlib.nullcontext():
        model: torch.nn.Module = timm.create_model(
            name, num_classes=CLASSES, **kwargs_of(name, size)
        )
    return model.eval()


def single_positions(model: torch.nn.Module, size: int, device: str = "cpu") -> set[str]:
    """BatchNorms that see a single position of an image.

    Raises:
        NoLogitsError: It gives something else.
    """
    found = set()

    def note(name: str, given: Any) -> None:
        if given[0].ndim == 4 and given[0].shape[-2:] == (1, 1):
            found.add(name)

    norms = [
        part.register_forward_pre_hook(lambda _, given, name=name: note(name, given))
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.BatchNorm2d)
    ]
    with torch.no_grad(), torch.device(device):
        shape = tuple(model(torch.zeros(1, 3, size, size)).shape)
    for norm in norms:
        norm.remove()
    if shape != (1, CLASSES):
        raise NoLogitsError(f"it gives {shape}")
    return found


def smallest_size(name: str) -> int:
    """The smallest sensible one of `SIZES` or of those that timm states: it gives logits.

    A size is not sensible at which BatchNorms see a single position of an image that see more at
    the network's own: statistics are not those that they were made for.

    Raises:
        ValueError: At none.
    """
    stated = timm.get_pretrained_cfg(name)
    own = stated.input_size[-1] if stated else SIZES[-1]
    least = stated.min_input_size[-1] if stated and stated.min_input_size else SIZES[0]
    device, always = _at_its_own(name, own)
    reason = ""
    for size in (*sorted({least, *(size for size in SIZES if least < size < own)} - {own}), own):
        try:
            single = single_positions(unfilled(name, size, device), size, device)
        except Exception as error:  # networks refuse sizes in ways of their own
            reason = in_short(error)
            continue
        if single <= always:
            return size
    raise ValueError(f"it takes images of no size: {reason}")


def _at_its_own(name: str, own: int) -> tuple[str, set[str]]:
    """Where a network's shapes can be seen, and its `single_positions` at its own size.

    Shapes alone cost nothing; networks that compute with values on the way need their weights.
    """
    for device in ("meta", "cpu"):
        try:
            return device, single_positions(unfilled(name, own, device), own, device)
        except NoLogitsError:
            return device, set()
        except Exception:  # networks fail in ways of their own
            continue
    return "cpu", set()


def write_images(folder: Path, size: int, count: int, seed: int) -> None:
    """Save images of noise, a folder for each class, the same for each network of a size."""
    levels = noise(count, (3, size, size), seed) * 255 * STD + 127.5
    pixels = levels.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i, each in enumerate(pixels):
        path = folder / str(i % CLASSES) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(path)


def settings(
    name: str,
    size: int,
    folder: Path,
    repaired: Sequence[str] = (),
    limits: Mapping[str, float] = LIMITS,
) -> dict[str, Any]:
    """The configuration of one network.

    Args:
        name: Of timm.
        size: Of images.
        folder: Where images lie and results go.
        repaired: Targets that are repaired.
        limits: The artifacts that are judged.
    """
    repair = {"repair": True}
    precisions = [a.removeprefix("ort/") for a in limits if a.startswith("ort/")]
    coreml = {**repair, "max_error": ASKED_OF_REPAIR, "calibration_images": CALIBRATION_IMAGES}
    return {
        "name": "breadth",
        "output": str(folder),
        "model": {
            "name": f"timm/{name}",
            "checkpoint": "random",
            "kwargs": kwargs_of(name, size),
        },
        "data": {
            "validation": f"folder:{folder / VALIDATION}",
            "calibration": f"folder:{folder / CALIBRATION}",
        },
        "preprocess": {"size": size, "crop": 1.0, "mean": [0.5] * 3, "std": [STD] * 3},
        "calibration": {"images": CALIBRATION_IMAGES, "max_error": ASKED_OF_REPAIR},
        "targets": {
            target: options
            for target, options in {
                "ort": {"precisions": precisions, "tune": False},
                "trt": {
                    "precisions": ["fp16"],
                    "compute_capabilities": ["8.9"],
                    **(repair if "trt" in repaired else {}),
                },
                "coreml": {"precisions": ["fp16"], **(coreml if "coreml" in repaired else {})},
            }.items()
            if any(artifact.startswith(f"{target}/") for artifact in limits)
        },
        "validation": {"images": IMAGES, "batch": IMAGES},
    }


def look(
    family: str,
    *,
    name: str | None = None,
    size: int | None = None,
    limits: Mapping[str, float] = LIMITS,
) -> Line:
    """Send the smallest network of a family through the pipeline.

    Args:
        family: Module of timm.
        name: Another network than the smallest.
        size: Another size than the smallest.
        limits: Largest relative error of the logits of an image, by artifact.
    """
    start = time.monotonic()
    line = Line(family, versions=versions(*PACKAGES), named=name is not None, way=WAY)
    try:
        line.parameters, line.name = (parameters(name), name) if name else members(family)[0]
        line.size = size or smallest_size(line.name)
    except (IndexError, ValueError) as error:
        why = str(error) if line.name else "no classifier of it can be made"
        line.outcome = dict.fromkeys(limits, f"create: {why}")
        return line
    with tempfile.TemporaryDirectory(prefix="breadth-") as folder:
        try:
            _run(line, Path(folder), limits)
        except PipelineError as error:
            line.outcome = dict.fromkeys(limits, f"create: {in_short(error)}")
    line.seconds = round(time.monotonic() - start, 1)
    return line


def _run(line: Line, folder: Path, limits: Mapping[str, float]) -> None:
    """Run a network, and what half precision broke once more with a repair."""
    write_images(folder / VALIDATION, line.size, IMAGES, seed=2)
    write_images(folder / CALIBRATION, line.size, CALIBRATION_IMAGES, seed=3)
    pipeline.run(settings(line.name, line.size, folder, limits=limits), only=STAGES)
    _judge(line, folder / "breadth", limits)
    broken = {each: limit for each, limit in limits.items() if _is_broken(line, each)}
    if broken:
        targets = [artifact.partition("/")[0] for artifact in broken]
        pipeline.run(settings(line.name, line.size, folder, targets), only=STAGES)
        _judge_repair(line, folder / "breadth", broken)


def _is_broken(line: Line, artifact: str) -> bool:
    """Whether half precision broke it: not where it cannot be converted or is wrong in float32."""
    outcome = line.outcome[artifact]
    if line.outcome["ort/fp32"] != PASSES or artifact.startswith("ort/") or outcome == PASSES:
        return False
    return outcome.startswith("validate: ") or "arithmetic" in outcome


def _judge_repair(line: Line, results: Path, artifacts: Mapping[str, float]) -> None:
    """Fill in what a repair did; where it did not help, why is added to what broke."""
    before = dict(line.outcome)
    _judge(line, results, artifacts)
    built = {each.name: each for each in Run.read(results / "results.json").artifacts}
    for artifact in artifacts:
        facts = built[artifact].repair
        if line.outcome[artifact] == PASSES and facts is not None:
            line.outcome[artifact] = f"{REPAIRED}: {facts.counts}; before: {before[artifact]}"
        else:
            line.outcome[artifact] = f"{before[artifact]}; repaired: {line.outcome[artifact]}"


def _judge(line: Line, results: Path, artifacts: Mapping[str, float]) -> None:
    """Fill in what a run left of some artifacts, by their limits."""
    run = Run.read(results / "results.json")
    ended = {end.name: end for end in run.steps}
    failed = {name: end.why for name, end in ended.items() if end.state is State.FAILED}
    for artifact, limit in artifacts.items():
        own = f"validate/{artifact.replace('/', '-')}"
        logits, judged = results / own / "logits.npy", ended.get(own)
        # What an earlier run left, such as one without a repair, is no result of this one.
        is_old = judged is not None and judged.state in (State.FAILED, State.SKIPPED)
        if is_old or not logits.is_file():
            line.outcome[artifact] = _first_failure(run, artifact, failed)
            continue
        reference = np.load(results / "validate/pytorch/logits.npy")
        found = np.load(logits)
        line.errors[artifact] = float(relative_errors(found, reference).max())
        line.outcome[artifact] = verdict(found, reference, limit, _beyond(run))


def _first_failure(run: Run, artifact: str, failed: Mapping[str, str]) -> str:
    """The first step on the way to an artifact's logits that failed, and why."""
    own = f"validate/{artifact.replace('/', '-')}"
    for name in (end.name for end in run.steps):
        shared = name in ("export", "onnx", "calibration") or name.startswith(
            ("precision/", "validate/pytorch")
        )
        if name in failed and (shared or name in (artifact, own)):
            return f"{name}: {failed[name]}"
    (built,) = (each for each in run.artifacts if each.name == artifact)
    return f"validate: {built.accuracy.top1.why or 'not judged'}"


def _beyond(run: Run) -> str:
    """That the network itself leaves the range of float16, and where; "" if it does not."""
    layers = run.reference.facts.range if run.reference else None
    return layers.words if layers else ""


def verdict(
    found: npt.NDArray[np.floating[Any]],
    reference: npt.NDArray[np.floating[Any]],
    limit: float,
    beyond: str = "",
) -> str:
    """`PASSES`, or what is wrong with logits.

    That an image whose margin exceeds the error by 1.5 keeps its class follows from it: no two
    logits move against each other by more than the square root of 2 times the norm.

    Args:
        found: Of the artifact, (images, classes).
        reference: PyTorch's.
        limit: Largest relative error of an image.
        beyond: That the network itself leaves the range of float16, if it does.
    """
    if not np.isfinite(found).all():
        return "validate: its logits are not finite" + (f": {beyond}" if beyond else "")
    errors = relative_errors(found, reference)
    if not errors.max() <= limit:
        return f"validate: relative error {errors.max():.1e}, {limit:.0e} allowed"
    return PASSES


def read_lines(path: Path) -> list[Line]:
    """What was run, the last line of each; half a line of a killed process is passed over."""
    found: dict[tuple[str, str, frozenset[str]], Line] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = Line(**json.loads(text))
        except (ValueError, TypeError):
            continue
        found[line.family, line.name if line.named else "", frozenset(line.outcome)] = line
    return list(found.values())


def apart(
    family: str, seconds: float, name: str | None = None, limits: Mapping[str, float] = LIMITS
) -> Line:
    """The line of a family or of a named network by a process of its own, which may die or hang.

    It is forked from this one, which has imported what takes longest and started no thread.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="breadth-") as folder:
        answer, words = Path(folder) / "line.json", Path(folder) / "words.txt"
        child = multiprocessing.get_context("fork").Process(
            target=_answer, args=(family, name, limits, answer, words)
        )
        child.start()
        child.join(seconds)
        if child.exitcode is None:
            why = f"it took more than {seconds:g} s"
            _end(child)
        elif answer.exists():
            return Line(**json.loads(answer.read_text()))
        else:
            text = words.read_text(errors="replace") if words.exists() else ""
            last = (text.strip().splitlines() or ["no message"])[-1]
            why = f"its process ended with code {child.exitcode}: {last[:200]}"
    return Line(
        family,
        name or "",
        outcome=dict.fromkeys(limits, why),
        versions=versions(*PACKAGES),
        seconds=round(time.monotonic() - start, 1),
        named=name is not None,
        way=WAY,
    )


def _answer(
    family: str, name: str | None, limits: Mapping[str, float], answer: Path, words: Path
) -> None:
    """Write a line, and what is said on the way, to files."""
    os.setsid()
    tempfile.tempdir = str(answer.parent)
    said = os.open(words, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    line = json.dumps(asdict(look(family, name=name, limits=limits)))
    part = answer.with_suffix(".part")
    part.write_text(line)
    part.rename(answer)


def _end(child: multiprocessing.process.BaseProcess) -> None:
    """End a process, and those that it started."""
    assert child.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.join()


def warm() -> None:
    """Import and make what every family would."""
    import coremltools  # noqa: F401
    import onnxruntime  # noqa: F401
    from torch.onnx._internal.exporter import _registration

    _registration.ONNXRegistry.from_torchlib()


def table(
    lines: Sequence[Line],
    total: int,
    what: str = "families",
    limits: Mapping[str, float] = LIMITS,
) -> Iterator[str]:
    """The table and what it comes to, as lines of Markdown.

    Args:
        lines: What was run.
        total: How many there are.
        what: Of what.
        limits: The artifacts that were judged.
    """
    told = ", ".join(f"{k} {v}" for k, v in (lines[-1].versions if lines else {}).items())
    yield f"{len(lines)} of {total} {what} were run ({told})."
    yield ""
    for artifact in limits:
        outcomes = [line.outcome.get(artifact, "") for line in lines]
        through = outcomes.count(PASSES)
        mended = sum(outcome.startswith(REPAIRED) for outcome in outcomes)
        more = f", {mended} more after a repair" if mended else ""
        yield f"- `{artifact}`: {through} of {len(lines)} pass{more}"
    if earlier := sum(line.way != WAY for line in lines):
        yield ""
        yield f"{earlier} lines with * are of an earlier way to settle weights and make images."
    yield ""
    yield "| family | network | size | " + " | ".join(limits) + " |"
    yield "|---|---|---|" + "---|" * len(limits)
    for line in sorted(lines, key=lambda each: (each.family, each.name)):
        cells = [_cell(line, artifact) for artifact in limits]
        star = "" if line.way == WAY else "*"
        yield f"| {line.family}{star} | {line.name} | {line.size} | " + " | ".join(cells) + " |"


def _cell(line: Line, artifact: str) -> str:
    outcome = line.outcome.get(artifact, "not run")
    if outcome == PASSES:
        return f"passes, {line.errors[artifact]:.0e}"
    if outcome.startswith(REPAIRED):
        outcome = f"{REPAIRED}, {line.errors[artifact]:.0e}{outcome.removeprefix(REPAIRED)}"
    return " ".join(outcome.split()).replace("|", "\\|")[:300]


@dataclass(frozen=True)
class Job:
    """What one table is of.

    Attributes:
        marker: Where it stands in the document.
        what: Its rows, for people.
        asked: Families, or names of networks.
        total: How many rows it has once all is run.
        named: Networks were named.
        limits: The artifacts that are judged.
    """

    marker: str
    what: str
    asked: Sequence[str]
    total: int
    named: bool
    limits: Mapping[str, float]

    def lines(self, path: Path) -> list[Line]:
        """Its lines among those of a file."""
        every = [line for line in read_lines(path) if set(line.outcome) == set(self.limits)]
        if not self.named:
            return [line for line in every if not line.named]
        found = {line.name: line for line in every if line.name in self.asked}
        return list(found.values())

    def run(self, each: str, seconds: float) -> Line:
        """The line of a family or of a named network."""
        family, name = (family_of(each), each) if self.named else (each, None)
        return apart(family, seconds, name, self.limits)


def _job(only: Sequence[str] | None, names: Sequence[str] | None, *, int8: bool = False) -> Job:
    """What is asked for.

    Raises:
        ValueError: timm does not have it.
    """
    limits, suffix = (INT8_LIMITS, " in 8 bits") if int8 else (LIMITS, "")
    if names is not None:
        if unknown := [name for name in names if not timm.is_model(name)]:
            raise ValueError(f"timm has no network {', '.join(unknown)}")
        return Job(f"networks{suffix}", "networks", names, len(names), True, limits)
    known = families()
    if unknown := [name for name in only or () if name not in known]:
        raise ValueError(f"timm has no family {', '.join(unknown)}; there are {', '.join(known)}")
    return Job(f"breadth{suffix}", "families", only or known, len(known), False, limits)


def main() -> None:
    """Run, write lines, write the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--lines", type=Path, default=Path("breadth.jsonl"), help="JSON lines")
    parser.add_argument("--docs", type=Path, help="document that gets the table")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", nargs="+", metavar="FAMILY", help="these families alone")
    what.add_argument("--names", nargs="+", metavar="NAME", help="these networks, in a table apart")
    parser.add_argument("--int8", action="store_true", help="8 bits of ONNX Runtime, and no more")
    parser.add_argument("--limit", type=int, help="most to run now")
    parser.add_argument("--seconds", type=float, default=1800, help="end one after so long")
    parser.add_argument("--again", action="store_true", help="also what has a line")
    given = parser.parse_args()
    try:
        job = _job(given.only, given.names, int8=given.int8)
    except ValueError as error:
        parser.error(str(error))
    there = {line.name if job.named else line.family for line in job.lines(given.lines)}
    waiting = [each for each in job.asked if given.again or each not in there][: given.limit]
    if waiting:
        warm()
    for each in waiting:
        line = job.run(each, given.seconds)
        with given.lines.open("a") as file:
            file.write(json.dumps(asdict(line)) + "\n")
        print(f"{each}: {line.name} {line.size}: {line.outcome} {line.seconds} s", flush=True)
    if given.docs:
        rows = table(job.lines(given.lines), job.total, job.what, job.limits)
        fill(given.docs, job.marker, "\n".join(rows))


if __name__ == "__main__":
    main()
