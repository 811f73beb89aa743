"""Two runs side by side: what became better, what worse, and what cannot be told.

Accuracy is compared where both runs judged the same images, pair by pair: only images on which the
two differ tell anything. A regression is one that is proven, so that a difference of a few images
of a hundred raises no alarm. Latency is compared where it was measured in one interleaved run, and
two runs are two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.core import figures
from pipeline.core.errors import ArtifactError
from pipeline.core.figures import Drop
from pipeline.core.plain import Plain
from pipeline.report.answers import Judged, answers_of, judged_by, read_answers
from pipeline.report.history import ANSWERS, HISTORY
from pipeline.report.model import BuiltArtifact, Run
from pipeline.stages.names import PIXELS
from pipeline.steps.folders import RESULTS_FILE
from pipeline.steps.library import Library
from pipeline.targets.registry import TARGETS

PixelsOrNone = npt.NDArray[np.uint8] | None

NO_ANSWER = "no finite answer"

NOT_INTERLEAVED = (
    "not comparable: the two were measured in runs of their own; put both in one configuration to "
    "have them measured in turn"
)


OTHER_IMAGES = "the two runs judged other images: give both the same validation set"
"""Why the answers of two runs are not compared."""


@dataclass(frozen=True)
class ChangedImage(Plain):
    """An image to which the two answer differently.

    Attributes:
        number: Its place among the validation images, from 0.
        image: Its name in the dataset.
        label: Its class.
        before: The class that the baseline says.
        after: The class that the new run says.
    """

    number: int
    image: str
    label: str
    before: str
    after: str

    @property
    def effect(self) -> str:
        """What the change did: "won", "lost", or "" where both are wrong."""
        if self.after == self.label:
            return "won"
        return "lost" if self.before == self.label else ""


@dataclass(frozen=True)
class Pair(Plain):
    """One artifact in both runs.

    Attributes:
        name: Such as "ort/int8".
        only_in: "baseline" or "new" where the other has none; "" where both have it.
        top1: Top-1 of the baseline and of the new run, as shares; None where it is not known.
        why_not: Why accuracy is not compared; "" if it is.
        drop: Top-1 of the baseline minus that of the new run, and its 95 % interval.
        p_value: Exact McNemar test of the images that only one of the two has right.
        changed: Images with another answer.
        size: Bytes, before and after.
        latency: Medians in milliseconds, before and after; None where not measured.
        states: How accuracy came about, before and after.
        operations: How many of each kind, before and after; nothing where nobody wrote it down.
    """

    name: str
    only_in: str
    top1: tuple[float | None, float | None]
    why_not: str
    drop: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    changed: tuple[ChangedImage, ...]
    size: tuple[int, int]
    latency: tuple[float | None, float | None]
    states: tuple[str, str]
    operations: tuple[Mapping[str, int], Mapping[str, int]] = field(
        default_factory=lambda: ({}, {})
    )

    @property
    def verdict(self) -> str:
        """What the pair proves: "worse", "better", "the same", or "cannot be told"."""
        if self.only_in:
            return f"only in the {self.only_in} run"
        if self.interval is None or self.drop is None:
            return "cannot be told"
        if self.interval[0] > 0:
            return "worse"
        if self.interval[1] < 0:
            return "better"
        return "the same" if not self.changed else "not proven"


@dataclass(frozen=True)
class Compared(Plain):
    """Two runs side by side.

    Attributes:
        baseline: Folder of the one.
        new: Folder of the other.
        pairs: Their artifacts.
        versions: Packages with another version, before and after.
        machines: CPU of each run.
        remarks: What else to know, a line each.
    """

    baseline: str
    new: str
    pairs: tuple[Pair, ...]
    versions: Mapping[str, tuple[str, str]]
    machines: tuple[str, str]
    remarks: tuple[str, ...] = ()

    @property
    def judged_others(self) -> bool:
        """Whether nothing is compared, since the two runs judged other images."""
        both = [pair for pair in self.pairs if not pair.only_in]
        return bool(both) and all(pair.why_not == OTHER_IMAGES for pair in both)

    @property
    def regressions(self) -> list[str]:
        """What is proven to be worse, or is gone, a line each."""
        lines = []
        for pair in self.pairs:
            if pair.only_in == "baseline":
                lines.append(f"{pair.name} is gone")
            if pair.verdict == "worse" and pair.drop is not None and pair.interval is not None:
                low, high = (100 * bound for bound in pair.interval)
                lines.append(
                    f"{pair.name} lost {100 * pair.drop:.2f} points of top-1 "
                    f"({low:.2f} to {high:.2f})"
                )
        return lines


def compare(baseline: Path, new: Path) -> Compared:
    """Compare two results' folders, or entries of their history.

    Args:
        baseline: The one that stands for how it was.
        new: The other one.

    Raises:
        ArtifactError: One holds no results, or damaged ones.
    """
    before, after = _Results(baseline), _Results(new)
    names = dict.fromkeys([*before.built, *after.built])
    return Compared(
        baseline=str(baseline),
        new=str(new),
        pairs=tuple(_pair(name, before, after) for name in names),
        versions=dict(_changed_versions(before.run.versions, after.run.versions)),
        machines=(before.run.machine.cpu, after.run.machine.cpu),
    )


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar test: how likely chance splits the changed images so unevenly.

    Args:
        lost: Images that only the first has right.
        won: Images that only the second has right.

    Returns:
        P-value, 0 … 1; 1 where no image changed.
    """
    total, least = lost + won, min(lost, won)
    # Sums of binomials in logarithms: 2**total leaves the range of a float for 1,024 images.
    logs = [
        math.lgamma(total + 1)
        - math.lgamma(k + 1)
        - math.lgamma(total - k + 1)
        - total * math.log(2)
        for k in range(least + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


class _Results:
    """A results' folder, or an entry of its history, with what its artifacts answered."""

    def __init__(self, folder: Path) -> None:
        self.run = Run.read(folder / RESULTS_FILE)
        self.built = {each.name: each for each in self.run.artifacts if each.built}
        self._kept = folder / ANSWERS
        self._is_entry = folder.parent.name == HISTORY
        self._library = None if self._is_entry else Library(folder)

    def judged(self, built: BuiltArtifact) -> Judged:
        """The validation images, with an artifact's answers.

        Raises:
            ArtifactError: They are not there, or not of what was built.
        """
        if self._library is None:
            kept = read_answers(self._kept)
            if built.name not in kept.given:
                raise ArtifactError(built.accuracy.top1.why or "its answers were not kept")
            return kept
        samples = self._library.check("validate/samples")
        validated = self._library.check(f"validate/{built.target}-{built.precision}")
        return judged_by(samples, {built.name: answers_of(validated, built)})


def _pair(name: str, before: _Results, after: _Results) -> Pair:
    old, new = before.built.get(name), after.built.get(name)
    top1 = tuple(each.accuracy.top1.value if each else None for each in (old, new))
    size = tuple(each.size if each else 0 for each in (old, new))
    latency = tuple(each.latency.value if each else None for each in (old, new))
    states = tuple(str(each.accuracy.top1.state) if each else "" for each in (old, new))
    drop: Drop | None = None
    changed: tuple[ChangedImage, ...] = ()
    why_not = ""
    if old is not None and new is not None:
        try:
            drop, changed = _judge(before, old, after, new)
        except ArtifactError as error:
            why_not = str(error)
    return Pair(
        name=name,
        only_in="new" if old is None else "baseline" if new is None else "",
        top1=(top1[0], top1[1]),
        why_not=why_not,
        drop=drop.value if drop else None,
        interval=drop.interval if drop else None,
        p_value=mcnemar(drop.lost, drop.won) if drop else None,
        changed=changed,
        size=(size[0], size[1]),
        latency=(latency[0], latency[1]),
        states=(states[0], states[1]),
        operations=(_operations(old), _operations(new)),
    )


def _operations(artifact: BuiltArtifact | None) -> Mapping[str, int]:
    """Operations of an artifact by kind, as its target tells them, if it is known here."""
    if artifact is None or artifact.built is None or artifact.target not in TARGETS:
        return {}
    return TARGETS[artifact.target].operations(artifact.built.facts.more)


def _judge(
    before: _Results, old: BuiltArtifact, after: _Results, new: BuiltArtifact
) -> tuple[Drop, tuple[ChangedImage, ...]]:
    """How top-1 fell over the same images, and which answers changed.

    Raises:
        ArtifactError: The images or the classes are others, or answers are missing.
    """
    reference, judged = before.judged(old), after.judged(new)
    if judged.digest != reference.digest:
        raise ArtifactError(OTHER_IMAGES)
    if judged.classes != reference.classes:
        raise ArtifactError("the two networks name other classes")
    first, second, right = reference.given[old.name], judged.given[new.name], judged.right
    if not first.shape == second.shape == right.shape == (len(judged.images),):
        raise ArtifactError("the two runs kept answers of other shapes: run both again")
    named = (*judged.classes, NO_ANSWER)  # -1 is the last
    changed = tuple(
        ChangedImage(
            number=int(i),
            image=judged.images[i],
            label=named[right[i]],
            before=named[first[i]],
            after=named[second[i]],
        )
        for i in np.flatnonzero(first != second)
    )
    return figures.paired(second == right, first == right), changed


def pixels_of(folder: Path) -> npt.NDArray[np.uint8]:
    """The validation images of a results' folder, (images, height, width, channels)."""
    samples = Library(folder).check("validate/samples")
    pixels: npt.NDArray[np.uint8] = np.load(samples.path(PIXELS), mmap_mode="r")
    return pixels


def _changed_versions(
    before: Mapping[str, str], after: Mapping[str, str]
) -> Iterator[tuple[str, tuple[str, str]]]:
    for package in dict.fromkeys([*before, *after]):
        pair = before.get(package, "missing"), after.get(package, "missing")
        if pair[0] != pair[1]:
            yield package, pair


def to_json(compared: Compared, mark: str) -> str:
    """All of it, with the verdicts, for programs.

    Args:
        compared: The two runs.
        mark: What the file says it is.
    """
    plain = compared.to_dict()
    for values, pair in zip(plain["pairs"], compared.pairs, strict=True):
        values["verdict"] = pair.verdict
    stated = {"what": mark, **plain, "regressions": compared.regressions}
    return json.dumps(stated, indent=1) + "\n"
