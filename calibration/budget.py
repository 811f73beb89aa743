"""What a network has to hold in a narrower type than it was trained in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from pipeline.core.errors import InputError

_BOUNDS = {
    "headroom": (1.0, 1e6),
    "max_error": (0.0, 1e6),
    "max_top1_drop": (0.0, 1.0),
    "max_share": (0.0, 1.0),
}
"""Least and most of each limit."""


@dataclass(frozen=True)
class Budget:
    """Limits of a repair.

    Attributes:
        headroom: How often the largest value of every tensor fits into its type, at least.
        max_error: Largest distance of the logits from the float32 network's, relative to their
            norm; None for any.
        max_top1_drop: Most top-1 accuracy that may be lost, as a share; one image always may.
        max_share: Largest share of the products that may be raised: beyond it, the whole network
            is better built in a wider type.

    Raises:
        InputError: A limit makes no sense.
    """

    headroom: float = 4.0
    max_error: float | None = 0.05
    max_top1_drop: float = 0.003
    max_share: float = 0.5

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InputError(f"{name} lies between {least:g} and {most:g}, not at {value:g}")

    @classmethod
    def of(cls, options: Mapping[str, Any], max_error: float | None) -> Self:
        """A budget of what options state, whatever else they hold.

        Args:
            options: Limits by name; those that lack are the defaults.
            max_error: The default of the largest error.
        """
        names = {each.name for each in fields(cls)}
        stated = {name: value for name, value in options.items() if name in names}
        return cls(**{"max_error": max_error, **stated})
