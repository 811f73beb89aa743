"""Small datasets and graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass
class FakeDataset:
    """Images of 3 x 4 x 4, each filled with a number of its own, or with those in `contents`."""

    labels: Sequence[int]
    classes: Sequence[str] = ("a", "b", "c")
    offset: int = 0
    contents: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> npt.NDArray[np.float32]:
        content = self.offset + index if self.contents is None else self.contents[index]
        return np.full((3, 4, 4), content, dtype=np.float32)

    def label(self, index: int) -> int:
        return self.labels[index]

    def hash(self, index: int) -> str:
        return hashlib.sha256(self.image(index).tobytes()).hexdigest()


@pytest.fixture
def make_dataset() -> type[FakeDataset]:
    return FakeDataset
