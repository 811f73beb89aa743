"""Facts of other ways to prepare images: what each costs in accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.figures import Number
from pipeline.core.plain import Facts, Plain


@dataclass(frozen=True)
class WayCost(Plain):
    """One way, judged on the same images as the network's own preprocessing.

    Attributes:
        name: Short, such as "opencv-linear".
        title: For people.
        changed: Images of which it makes another input.
        levels: Mean difference of their pixels, of 255; 0 where only the normalization differs.
        top1: Top-1, as a share.
        drop: Top-1 of the own way minus that of this one, with its paired interval.
        agreement: Share of images with the same answer as by the own way.
        why: Why the row means nothing; "" if it means something.
    """

    name: str
    title: str
    changed: int
    levels: float
    top1: Number
    drop: Number
    agreement: Number
    why: str = ""

    @property
    def told(self) -> str:
        """What the paired interval shows."""
        if self.drop.interval is None:
            return ""
        low, high = self.drop.interval
        if low > 0:
            return "worse, beyond doubt"
        return "better, beyond doubt" if high < 0 else "no difference shown"


@dataclass(frozen=True)
class ResizesFacts(Facts):
    """What other ways of preparing images cost a network, or an artifact of it.

    Attributes:
        judged: What answered: "pytorch", or an artifact such as "ort/int8".
        by: The runtime and device that ran.
        own: The network's own preprocessing, for people.
        images: How many images.
        of: Of how many.
        fitting: Those of them that have the size already that they are resized to.
        top1: Top-1 by the own way.
        ways: The others.
    """

    judged: str
    by: str
    own: str
    images: int
    of: int
    fitting: int
    top1: Number
    ways: tuple[WayCost, ...]
