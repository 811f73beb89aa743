"""Facts of graphs and of what is built from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.figures import RangeRow
from pipeline.core.network import Network
from pipeline.core.plain import Facts, Plain


@dataclass(frozen=True)
class ExportFacts(Facts):
    """The exported graph.

    Attributes:
        nodes: Number of its nodes.
        opset: Version of the operator set.
        difference_to_pytorch: Largest difference of logits, relative to the largest logit.
        network: What it was exported from.
        inference_form: What was done to the trained network.
        parameters: Number of the network's parameters; 0 where it was not counted.
        macs: Multiply-accumulates of one image; 0 where they were not counted.
    """

    nodes: int
    opset: int
    difference_to_pytorch: float
    network: Network
    inference_form: str = ""
    parameters: int = 0
    macs: int = 0


@dataclass(frozen=True)
class SimplifyFacts(Facts):
    """The simplified graph.

    Attributes:
        simplified: Whether the simplifier's graph was taken.
        why_not: Why it was not; "" if it was.
        nodes_before: Number of nodes as exported.
        nodes: Number of nodes now.
        network: What it was exported from.
        fault: The simplifier crashed or hung, whatever the graph is: the next run tries again.
    """

    simplified: bool
    why_not: str
    nodes_before: int
    nodes: int
    network: Network
    fault: bool = False


@dataclass(frozen=True)
class CalibrationFacts(Facts):
    """The calibration images.

    Attributes:
        images: How many.
        digest: Hash over which they are.
        warnings: What to know of the choice.
        more: Whatever else was told, such as how the dataset is known.
    """

    images: int
    digest: str
    warnings: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RaisedPart(Plain):
    """A part of a graph that computes in a wider type than the rest.

    Attributes:
        part: The module, or the node where no module is known.
        type: The type.
        share: Its share of the network's products.
        why: What would go wrong without.
    """

    part: str
    type: str
    share: float
    why: str


@dataclass(frozen=True)
class RepairFacts(Plain):
    """How a graph was repaired that a narrow type would break.

    Attributes:
        base: The type of all that is not raised.
        broke: How the network does with nothing raised; "" where nothing had to be raised.
        raised: What was raised, in the order of the graph.
        parts: Parts that the graph has.
        share: Share of the products that are raised.
        error: Distance of the logits from the float32 network's, relative to their norm.
        headroom: The least headroom of all tensors; None where all values are zero.
        beyond: Where the float32 network itself leaves the range of the type; "" if nowhere.
        images: Calibration images that decided.
        evaluations: Graphs that were judged.
    """

    base: str
    broke: str
    raised: tuple[RaisedPart, ...]
    parts: int
    share: float
    error: float
    headroom: float | None
    beyond: str
    images: int
    evaluations: int

    @property
    def counts(self) -> str:
        """How many parts were raised, for people."""
        if not self.raised:
            return f"nothing had to be raised above {self.base}"
        counts = Counter(part.type for part in self.raised)
        types = " and ".join(f"{count} in {name}" for name, count in counts.items())
        return (
            f"{len(self.raised)} of {self.parts} parts raised above {self.base} ({types}; "
            f"{self.share:.2%} of the products)"
        )

    @property
    def words(self) -> str:
        """What was done, for people."""
        if not self.raised:
            return self.counts
        modules = ", ".join(part.part for part in self.raised[:_MOST_NAMED])
        more = len(self.raised) - _MOST_NAMED
        rest = f" and {more} more" if more > 0 else ""
        return f"{self.counts}: {modules}{rest}"

    @property
    def result(self) -> str:
        """How the network does now, for people."""
        headroom = "" if self.headroom is None else f", least headroom {self.headroom:.3g}"
        return f"error {self.error:.2g}{headroom} on {self.images} calibration images"


_MOST_NAMED = 8
"""Most parts that a line names."""


@dataclass(frozen=True)
class FormFacts(Facts):
    """A graph in the form that a precision needs.

    Attributes:
        network: What it was exported from.
        why_not: What its maker found against using it, beside its time; "" if nothing.
        why_slow: What its maker found of its time that speaks against it; "" if nothing.
        ranges: Ranges of quantized tensors.
        more: Whatever else its maker tells.
        repair: What was raised to a wider type; None where nobody looked.
    """

    network: Network
    why_not: str = ""
    ranges: tuple[RangeRow, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    repair: RepairFacts | None = None
    why_slow: str = ""


@dataclass(frozen=True)
class TriedCompression(Plain):
    """One mix of ways to store weights that a search tried.

    Attributes:
        size: Bytes of the package.
        changed: Share of calibration images whose top-1 class changes.
        tensors: How many tensors are stored in which way.
    """

    size: int
    changed: float
    tensors: Mapping[str, int]


@dataclass(frozen=True)
class BuildFacts(Facts):
    """What a target built.

    Attributes:
        target: The target.
        precision: The precision.
        warnings: What the runtime's builder warned of, as often as it did.
        ranges: Ranges of quantized tensors.
        curve: What a search over compressions tried.
        chosen: The mix that was built.
        log: Lines of the runtime's chatter.
        alternatives: Files that stand for the others where they fit, such as the same model in
            another layout: whoever ships the artifact needs them not.
        more: Whatever else the target tells.
        repair: What was raised to a wider type by the target itself; None where it raises nothing.
        workarounds: What was done because the runtime refused what it was asked for, a line each.
    """

    target: str = ""
    precision: str = ""
    warnings: tuple[str, ...] = ()
    ranges: tuple[RangeRow, ...] = ()
    curve: tuple[TriedCompression, ...] = ()
    chosen: TriedCompression | None = None
    log: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    repair: RepairFacts | None = None
    workarounds: tuple[str, ...] = ()
