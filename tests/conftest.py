"""Shared by all tests: weights and images from a formula, and networks made of them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest

if TYPE_CHECKING:
    from torch import nn

# One thread for each test process: the suite runs in as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

DATA = Path(__file__).parent / "data"
SEED = 7

Array = npt.NDArray[np.float32]


def parity_parameter(name: str, shape: tuple[int, ...]) -> Array:
    """Value of a parameter: depends on its name, its shape and the seed alone."""
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    if name.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("running_mean"):
        value = 0.1 * rng.standard_normal(shape)
    elif name.endswith("gamma"):
        value = rng.uniform(0.1, 0.5, shape)
    elif name.endswith("bias"):
        value = 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1:
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return np.asarray(value, dtype=np.float32)


def parity_images(batch: int, resolution: int) -> Array:
    """Images of seeded noise, (batch, 3, resolution, resolution)."""
    rng = np.random.default_rng([SEED, resolution])
    return rng.standard_normal((batch, 3, resolution, resolution)).astype(np.float32)


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of the tests' own data."""
    return DATA


@pytest.fixture(scope="session")
def images() -> Callable[[int, int], Array]:
    """Makes images: (batch, resolution) -> (batch, 3, resolution, resolution)."""
    return parity_images


@pytest.fixture(scope="session")
def parity_model() -> Callable[[str], nn.Module]:
    """Makes a network in evaluation mode with weights from the formula, by its name."""
    import timm
    import torch

    import care  # noqa: F401  registers our networks with timm

    def make(name: str) -> nn.Module:
        model: nn.Module = timm.create_model(name).eval()
        state = model.state_dict()
        for key, value in state.items():
            if not key.endswith(("num_batches_tracked", "rotations")):
                state[key] = torch.from_numpy(parity_parameter(key, tuple(value.shape)))
        model.load_state_dict(state)
        return model

    return make
