"""What a check of an artifact's fitness for a device found: the same for every target."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["fine", "advice", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: Its name.
        level: "problem" if operations leave the accelerator or numbers their range, "advice" if a
            device has to be asked.
        found: What there is, in a few words.
        advice: What to do; "" where nothing is to be done.
        where: Some of the operations or tensors in question.
    """

    check: str
    level: Level
    found: str
    advice: str = ""
    where: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
