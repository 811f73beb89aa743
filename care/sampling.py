"""Which images a step takes, and what its randomness is: functions of a few numbers, no state.

Image number `position` of epoch `epoch` is augmented with random numbers that are seeded by
(seed, epoch, position) alone, and what is random for a whole batch by (seed, step, part, rank). So
a checkpoint needs no more than the number of a step to go on as if nothing had happened, whichever
worker prepares which image.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

_ORDER, _SAMPLE, _STEP, _START = range(4)
"""Kinds of streams: equal numbers of different kinds share none."""


class Place(NamedTuple):
    """An image in the order of an epoch.

    Attributes:
        epoch: The epoch, from 0.
        position: Which image of the epoch, from 0.
        image: Which image of the dataset.
    """

    epoch: int
    position: int
    image: int


@dataclass(frozen=True)
class Plan:
    """Which images each step of a run takes.

    Step `s` of an epoch takes the positions [s * total, (s + 1) * total), the same for any number
    of processes; a process takes every `size`-th of them, part after part.

    Attributes:
        images: Images of the dataset.
        batch: Images of a part of a step, of one process.
        parts: Parts of a step, whose gradients are summed.
        rank: Number of this process.
        size: Number of processes.
        seed: Of the run.
        repeats: How often an image stands in an epoch, one after the other (0: once).
    """

    images: int
    batch: int
    parts: int
    rank: int
    size: int
    seed: int
    repeats: int = 0

    @property
    def total(self) -> int:
        """Images of a step, of all processes together."""
        return self.batch * self.parts * self.size

    @property
    def steps(self) -> int:
        """Steps of an epoch; images that do not fill one are left out."""
        return self.images // self.total

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Which image of the dataset stands at each position of an epoch."""
        shuffled = generator(self.seed, _ORDER, epoch).permutation(self.images)
        if self.repeats > 1:
            return np.repeat(shuffled, self.repeats)[: self.images]
        return shuffled

    def positions(self, step: int, part: int, rank: int | None = None) -> range:
        """Positions in its epoch that a part of a step of the run takes in a process."""
        rank = self.rank if rank is None else rank
        start = (step % self.steps) * self.total + part * self.batch * self.size
        return range(start + rank, start + self.batch * self.size, self.size)


class Batches:
    """Places of the images of each batch, from one step of the run to another.

    A batch sampler for torch's DataLoader: it is read once, and never has to start anew.

    Args:
        plan: Which images a step takes.
        first: First step, counted from the start of the run.
        last: Step after the last.
    """

    def __init__(self, plan: Plan, first: int, last: int) -> None:
        self.plan, self.first, self.last = plan, first, last

    def __len__(self) -> int:
        return (self.last - self.first) * self.plan.parts

    def __iter__(self) -> Iterator[list[Place]]:
        known, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first, self.last):
            epoch = step // self.plan.steps
            if epoch != known:
                known, order = epoch, self.plan.order(epoch)
            for part in range(self.plan.parts):
                positions = self.plan.positions(step, part)
                yield [Place(epoch, position, int(order[position])) for position in positions]


def generator(seed: int, kind: int, *numbers: int) -> np.random.Generator:
    """Random numbers of their own for each kind and each sequence of numbers."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, kind, *numbers)))


def seed_sample(seed: int, place: Place) -> None:
    """Seed what augmentation draws from, for one image.

    Transforms of timm and torchvision draw from the global generators of Python, numpy and torch.
    """
    words = _sequence(seed, _SAMPLE, place.epoch, place.position).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))


def seed_step(seed: int, step: int, part: int, rank: int) -> None:
    """Seed what is random for a whole batch: mixing, erasing, stochastic depth; on all devices."""
    _seed_everything(_sequence(seed, _STEP, step, part, rank))


def seed_start(seed: int) -> None:
    """Seed what the network's initial weights are drawn from, alike in every process."""
    _seed_everything(_sequence(seed, _START))


def _seed_everything(sequence: np.random.SeedSequence) -> None:
    words = sequence.generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[1])  # timm's Mixup draws from numpy's global generator
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def _sequence(seed: int, kind: int, *numbers: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, *numbers], spawn_key=(kind,))
