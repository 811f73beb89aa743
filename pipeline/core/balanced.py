"""A few images of many, with classes as even as can be."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def balanced(labels: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Places of images whose classes are as even as can be.

    Where there are more classes than places, some are taken from all over them.

    Args:
        labels: Class of each image, (images,).
        count: How many to choose; all, if there are fewer.

    Returns:
        Places of the chosen ones, ascending.
    """
    ranks = np.zeros(len(labels), np.int64)
    classes, sizes = np.unique(labels, return_counts=True)
    for name, size in zip(classes, sizes, strict=True):
        ranks[labels == name] = np.arange(size)
    # The first image of every class, then the second of each, and so on.
    order = np.lexsort((labels, ranks))
    if len(classes) > count:
        order = order[np.linspace(0, len(classes), count, endpoint=False).astype(np.int64)]
    return np.sort(order[:count])
