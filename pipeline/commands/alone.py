"""Artifacts alone: what `bench` and `validate` do with folders that were copied here.

Nothing else is needed: no configuration, no checkpoint, no validation set. Images are the golden
ones that travel in a bundle or lie in the results, or those that the user names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.api.model import Answering, load
from pipeline.commands.bench import BenchReport, latency_table, validity_lines, with_settings
from pipeline.commands.validate import Judged
from pipeline.config import BenchConfig
from pipeline.core import figures, machine, timing
from pipeline.core.answers import Audit
from pipeline.core.errors import (
    ArtifactError,
    DataError,
    GateFailedError,
    InputError,
    UnavailableError,
    about,
)
from pipeline.core.figures import LatencySummary, measured_here
from pipeline.core.labels import imagenet_labels
from pipeline.core.network import Network, Pixels
from pipeline.core.preprocess import Pictures, Preprocess
from pipeline.core.runner import Runner
from pipeline.core.words import shown
from pipeline.exports.golden import Golden, golden_of
from pipeline.report import text
from pipeline.report.terminal import render
from pipeline.stages.bench import audited, endured
from pipeline.stages.drawn import Drawn
from pipeline.stages.validate import accuracy
from pipeline.steps.artifact import Artifact
from pipeline.steps.facts.bench import Sustained, doubt_about, validity_of
from pipeline.targets.registry import TARGETS

NOISE = "seeded noise"

_SOME = 16
"""Images to measure on: as many as golden ones."""
_IMAGENET = 1000
"""Classes of ImageNet-1k, whose folders have other names than its classes."""
_AT_ONCE = 64
"""Images that are decoded before they are judged: a whole set need not fit into memory."""


def artifact_alone(folder: Path) -> Artifact:
    """A built artifact, whole as its own manifest tells.

    Raises:
        ArtifactError: The folder holds none, or a damaged one.
    """
    # Golden images lie beside it: above `.` there is no path without this.
    artifact = Artifact.read(folder.absolute())
    if artifact.kind != "build" or artifact.facts.get("target") not in TARGETS:
        raise ArtifactError(f"{folder} is no built model but {shown(artifact.name)}")
    artifact.verify()
    return artifact


def bench_alone(
    folders: Sequence[Path],
    *,
    data: str | None = None,
    batch: Sequence[int] = (),
    sustained: float | None = None,
    **settings: Any,
) -> BenchReport:
    """Measure artifacts that lie anywhere, interleaved with each other.

    Args:
        folders: Their folders.
        data: Images to measure on; None for the golden ones, or noise where there are none.
        batch: Batch sizes.
        sustained: Also call each without a rest for so many seconds.
        settings: What differs from the defaults of `bench` in a configuration.

    Raises:
        ArtifactError: One of them is damaged.
        InputError: They are of networks with different inputs, two have the same name, or a number
            is beyond what makes sense.
        UnavailableError: This machine does not run all of them.
    """
    bench = with_settings(BenchConfig(), batches=tuple(batch) or None, **settings)
    artifacts = {_name(folder): artifact_alone(folder) for folder in folders}
    if len(artifacts) < len(folders):
        raise InputError("the same artifact was named twice")
    _require_runnable(artifacts)
    load_before = machine.load()
    pictures, images_are = _pictures(list(artifacts.values()), data)
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for name, artifact in artifacts.items():
            opened = TARGETS[str(artifact.facts["target"])].open(artifact, threads=bench.threads)
            runners[name] = stack.enter_context(opened)
            _require_batches(name, opened, bench.batches)
        found = _measure(runners, Drawn(pictures), bench, load_before, sustained)
    table = latency_table(found.batches)
    return BenchReport(render(table, *found.lines(images_are)), found.to_plain(images_are))


@dataclass(frozen=True)
class _Figures:
    """What was measured of artifacts, each by its name.

    Attributes:
        devices: What ran it.
        batches: Its timed calls in sum, by batch size and phase.
        repeated: The audit of a repeated image.
        sustained: Calls without a rest.
        load: CPUs that others kept busy before or meanwhile.
        cpus: CPUs that are granted.
    """

    devices: Mapping[str, str]
    batches: Mapping[int, Mapping[str, Mapping[str, LatencySummary]]]
    repeated: Mapping[str, Audit]
    sustained: Mapping[str, Sustained]
    load: float
    cpus: int

    @property
    def doubt(self) -> str:
        """Why latency is not to be trusted; "" if it is."""
        first = next(iter(self.batches.values()))
        fewest = min(phases[timing.ENGINE].samples for phases in first.values())
        return doubt_about(fewest, self.load, self.cpus)

    def validity(self) -> dict[int, dict[str, dict[str, str]]]:
        """Whether each percentile stands, by batch size and name."""
        faults = {name: self._faults(name) for name in self.devices}
        return {
            size: {
                name: validity_of(phases[timing.ENGINE].samples, faults[name])
                for name, phases in by_name.items()
            }
            for size, by_name in self.batches.items()
        }

    def _faults(self, name: str) -> list[str]:
        """What is against a measurement, however many calls there are."""
        audit = self.repeated.get(name)
        busy = machine.busy_with_others(self.load, self.cpus)
        return [problem for problem in (busy, audit.problem if audit else "") if problem]

    def lines(self, images_are: str) -> Iterator[str]:
        """What stands below the table of latencies.

        Args:
            images_are: What was measured on.
        """
        yield from (f"{name}: {device}" for name, device in self.devices.items())
        yield f"{measured_here()}, on {images_are}"
        if self.doubt:
            yield f"(!) latency is not to be trusted: {self.doubt}"
        yield from (f"{name}: {audit.words}" for name, audit in self.repeated.items())
        yield from validity_lines(self.validity())
        yield from (f"{name}: {found.words}" for name, found in self.sustained.items())

    def to_plain(self, images_are: str) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "state": str(measured_here()),
            "images": images_are,
            "doubt": self.doubt,
            "devices": dict(self.devices),
            "validity": self.validity(),
            "repeated": {name: audit.to_dict() for name, audit in self.repeated.items()},
            "sustained": {name: found.to_dict() for name, found in self.sustained.items()},
            "batches": {
                size: {
                    name: {phase: calls.to_dict() for phase, calls in phases.items()}
                    for name, phases in by_name.items()
                }
                for size, by_name in self.batches.items()
            },
        }


def _measure(
    runners: Mapping[str, Runner],
    drawn: Drawn,
    bench: BenchConfig,
    load_before: float,
    sustained: float | None,
) -> _Figures:
    """Measure open artifacts in turns."""
    protocol, watch = timing.Protocol.of(bench), machine.Watch()
    timed = {
        size: timing.interleaved(runners, drawn.batches(size), protocol) for size in bench.batches
    }
    repeated = audited(runners, drawn.batches(bench.batches[0]), protocol)
    load = max(load_before, watch.others())
    lasting = {
        name: endured(name, runner, drawn, bench, sustained)
        for name, runner in runners.items()
        if sustained
    }
    return _Figures(
        devices={name: runner.device for name, runner in runners.items()},
        batches={
            size: {
                name: {phase: calls.summary() for phase, calls in phases.items()}
                for name, phases in by_name.items()
            }
            for size, by_name in timed.items()
        },
        repeated=repeated,
        sustained=lasting,
        load=load,
        cpus=machine.granted(),
    )


def _name(folder: Path) -> str:
    return folder.as_posix().rstrip("/")


def _require_runnable(artifacts: dict[str, Artifact]) -> None:
    reasons = {}
    for name, artifact in artifacts.items():
        why = TARGETS[str(artifact.facts["target"])].missing(artifact)
        if why is not None:
            reasons[name] = why
    if reasons:
        told = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        raise UnavailableError(f"not measured: {told}")


def _require_batches(name: str, runner: Runner, batches: Sequence[int]) -> None:
    for size in batches:
        if not runner.smallest <= size <= (runner.largest or size):
            raise InputError(
                f"{name} takes batches of {runner.smallest} to {runner.largest}, not {size}"
            )


def _pictures(artifacts: Sequence[Artifact], data: str | None) -> tuple[Pictures, str]:
    """Distinct pictures for all of them, and what they are."""
    network = artifacts[0].network()
    if any(each.network().input_shape != network.input_shape for each in artifacts):
        raise InputError("the artifacts take images of different sizes: measure them one by one")
    preprocess = Preprocess.from_dict(network.preprocess)
    if data is not None:
        return Pictures(_first_images(data, preprocess), preprocess), f"images of {data}"
    golden = golden_of(artifacts[0])
    if isinstance(golden, Golden):
        return Pictures(golden.pixels, preprocess), "golden images"
    depth, height, width = network.input_shape
    noise = np.random.default_rng(0).integers(0, 256, (_SOME, height, width, depth), dtype=np.uint8)
    return Pictures(noise, preprocess), NOISE


def _first_images(data: str, preprocess: Preprocess) -> Pixels:
    """Some images of a dataset, (images, height, width, channels); classes do not matter."""
    from care.data import open_images

    with about("--data"):
        dataset = open_images(data, "validation")
        some = range(min(_SOME, len(dataset)))
        return np.stack([preprocess.pixels(dataset.image(i)) for i in some])


def validate_alone(folders: Sequence[Path], *, data: str | None = None) -> Judged:
    """Judge artifacts that lie anywhere: against their golden logits, or on labelled images.

    Args:
        folders: Their folders.
        data: Images with their classes; None for the golden ones.

    Raises:
        ArtifactError: One of them is damaged.
        InputError: There are neither golden images nor others.
        GateFailedError: One does not give what it gave where it was built.
        UnavailableError: This machine can neither run nor emulate it.
    """
    lines, plain, failed = [], {}, []
    for folder in folders:
        name, artifact = _name(folder), artifact_alone(folder)
        with load(artifact.folder) as model:
            if data is None:
                words, facts = _against_golden(model, artifact)
                if not facts["holds"]:
                    failed.append(name)
            else:
                words, facts = _on_images(model, artifact, data)
        lines.append(f"{name}: {words}; {model.state}: {model.device}")
        plain[name] = {**facts, "state": str(model.state), "by": model.device}
    if failed:
        raise GateFailedError("\n".join(lines))
    return Judged("\n".join(lines), {"images": data or "golden", "artifacts": plain})


def _against_golden(model: Answering, artifact: Artifact) -> tuple[str, dict[str, Any]]:
    """Whether it gives for its golden images what it gave where it was built."""
    golden = golden_of(artifact)
    if isinstance(golden, str):
        raise InputError(
            f"there are no golden images of {artifact.folder} ({golden}): name images with their "
            "classes, --data folder:PATH, or take a bundle, which carries golden ones"
        )
    logits = model(golden.pixels)
    errors = _errors(logits, golden.logits)
    same = int((logits.argmax(1) == golden.logits.argmax(1)).sum())
    largest, mean = float(errors.max()), float(errors.mean())
    holds = largest <= golden.tolerance and mean <= golden.mean_tolerance
    words = (
        f"{'holds' if holds else 'DOES NOT HOLD'}: the same class for {same} of {len(logits)} "
        f"golden images; largest error of logits {largest:.2g}, {golden.tolerance:.2g} allowed"
    )
    return words, {
        "holds": holds,
        "same_class": same,
        "images": len(logits),
        "error": largest,
        "tolerance": golden.tolerance,
    }


def _errors(logits: Any, expected: Any) -> Any:
    """Norm of each image's difference, relative to the norm of what was expected."""
    size = np.maximum(np.linalg.norm(expected, axis=1), np.finfo(np.float32).tiny)
    errors = np.linalg.norm(logits - expected, axis=1) / size
    return np.where(np.isfinite(errors), errors, np.inf)


def _on_images(model: Answering, artifact: Artifact, data: str) -> tuple[str, dict[str, Any]]:
    """Top-1 and top-5 on images with their classes."""
    parts, labels = [], []
    for pixels, known in _labelled(artifact, data):
        parts.append(model(pixels))
        labels += known
    logits, right = np.concatenate(parts), np.array(labels)
    top1, top5 = accuracy(logits, right, figures.State(str(model.state)), model.device, "")
    words = f"top-1 {text.percent(top1)} ({text.percent_interval(top1)})"
    return f"{words}, top-5 {text.percent(top5)} of {len(labels)} images", {
        "images": len(labels),
        "top1": top1.to_dict(),
        "top5": top5.to_dict(),
    }


def _labelled(artifact: Artifact, data: str) -> Iterator[tuple[Pixels, list[int]]]:
    """Images of the user's, some at a time, with their classes among the artifact's.

    Raises:
        DataError: They cannot be read, or show a class that the network does not have.
    """
    from care.data import open_dataset

    network = artifact.network()
    preprocess = Preprocess.from_dict(network.preprocess)
    with about("--data"):
        dataset = open_dataset(data, "validation")
        classes = classes_among(network, dataset.classes, dataset.names_known)
        for start in range(0, len(dataset), _AT_ONCE):
            indices = range(start, min(start + _AT_ONCE, len(dataset)))
            pixels = np.stack([preprocess.pixels(dataset.image(index)) for index in indices])
            yield pixels, [classes[dataset.label(index)] for index in indices]


def classes_among(network: Network, names: Sequence[str], names_known: bool) -> list[int]:
    """For every class of some images, its index among the logits.

    Raises:
        DataError: The network does not have one of them.
    """
    if not names_known:
        if len(names) > len(network.labels):
            raise DataError(
                f"the images have {len(names)} classes, and the network {len(network.labels)}"
            )
        return list(range(len(names)))
    order = {label: index for index, label in enumerate(network.labels)}
    if len(order) == _IMAGENET:
        identifiers, readable = imagenet_labels()
        if network.labels == readable:
            order |= {identifier: index for index, identifier in enumerate(identifiers)}
    unknown = [name for name in names if name not in order]
    if unknown:
        raise DataError(
            f"the class {shown(unknown[0])!r} is none of the network's, which are "
            f"{shown(', '.join(network.labels))}: name the folders after these"
        )
    return [order[name] for name in names]
