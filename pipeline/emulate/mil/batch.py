"""Evaluating a program that was saved for one batch size on another.

A converter writes the batch size into the program: in declared shapes, in the targets of
`reshape`, in the ends of slices. So the program is not rewritten for more images: they are cut into
groups of the size that it was saved for, and each group is evaluated just as the program says.
`torch.vmap` evaluates the groups together. To each operation it shows one group, so that none can
mix images of different groups, whatever axis it works along; the operations' own fast kernels do
the work. What it cannot do (a slice whose place depends on an image) is done group by group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.core.errors import DataError, UnsupportedOperatorError

Values = dict[str, Tensor]
Evaluate = Callable[[Tensor], tuple[Values, Values]]
"""Takes images of one group; gives results, which have rows for each image, and measurements."""


class Groups:
    """How a program's images are put together.

    Args:
        size: The batch size for which the program was saved; None if it leaves it open.
    """

    def __init__(self, size: int | None) -> None:
        self._size = size
        self._together = True

    def run(self, evaluate: Evaluate, images: Tensor) -> tuple[Values, Values]:
        """Evaluate images, however many groups they make.

        Args:
            evaluate: Evaluates one group.
            images: (images, …).

        Returns:
            The results of all groups one after the other: (images · rows of each, …). The
            measurements, stacked: (groups, …).

        Raises:
            DataError: The images make no whole groups. Filling one up would be no answer: the
                program may mix the images of a group.
            UnsupportedOperatorError: `evaluate` raises it.
        """
        size = self._size or len(images)
        if len(images) % size:
            raise DataError(
                f"the program was saved for batches of {size} and takes as many images or a "
                f"multiple, not {len(images)}"
            )
        results, measured = self._run_all(evaluate, images.unflatten(0, (-1, size)))
        # A result without axes is one row.
        joined = {
            name: value.flatten(0, 1) if value.ndim > 1 else value
            for name, value in results.items()
        }
        return joined, measured

    def _run_all(self, evaluate: Evaluate, groups: Tensor) -> tuple[Values, Values]:
        """Results and measurements of every group, stacked along a new first axis."""
        if len(groups) > 1 and self._together:
            try:
                return torch.vmap(evaluate)(groups)
            except UnsupportedOperatorError:
                # Either vmap cannot do it, or nothing can: one by one the group itself will tell.
                self._together = False
        parts = [evaluate(group) for group in groups]
        return _stacked([part[0] for part in parts]), _stacked([part[1] for part in parts])


def _stacked(parts: list[Values]) -> Values:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
