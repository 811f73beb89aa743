from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from care import sampling
from care.sampling import Batches, Place, Plan

PLAN = Plan(images=23, batch=2, parts=2, rank=0, size=1, seed=42)


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_an_epoch_takes_each_image_at_most_once() -> None:
    taken = [place for batch in Batches(PLAN, 0, PLAN.steps) for place in batch]
    assert len(taken) == PLAN.steps * PLAN.total == 20
    assert len({place.image for place in taken}) == 20
    assert [place.position for place in taken] == list(range(20))
    assert {place.epoch for place in taken} == {0}


def test_the_rest_of_a_run_is_a_slice_of_it() -> None:
    whole = list(Batches(PLAN, 0, 3 * PLAN.steps))
    assert len(whole) == len(Batches(PLAN, 0, 3 * PLAN.steps))
    for first in (1, PLAN.steps - 1, PLAN.steps, 2 * PLAN.steps + 1):
        assert list(Batches(PLAN, first, 3 * PLAN.steps)) == whole[first * PLAN.parts :]


@pytest.mark.parametrize(("batch", "parts", "size"), [(4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)])
def test_a_step_takes_the_same_images_however_it_is_shared_out(
    batch: int, parts: int, size: int
) -> None:
    expected = [set(a + b) for a, b in zip(*[iter(Batches(PLAN, 0, 7))] * 2, strict=True)]
    found: list[set[Place]] = [set() for _ in expected]
    for rank in range(size):
        plan = Plan(images=23, batch=batch, parts=parts, rank=rank, size=size, seed=42)
        assert (plan.steps, plan.total) == (PLAN.steps, PLAN.total)
        for number, places in enumerate(Batches(plan, 0, 7)):
            assert not found[number // parts] & set(places)
            found[number // parts] |= set(places)
    assert found == expected


def test_the_next_seed_does_not_repeat_the_next_epoch() -> None:
    """The order of seed 42's second epoch used to be that of seed 43's first."""
    other = Plan(images=23, batch=2, parts=2, rank=0, size=1, seed=43)
    orders = {tuple(plan.order(epoch)) for plan in (PLAN, other) for epoch in range(3)}
    assert len(orders) == 6


def test_repeated_images_stand_beside_each_other() -> None:
    plan = Plan(images=12, batch=4, parts=1, rank=0, size=1, seed=0, repeats=3)
    order = plan.order(0)
    assert len(order) == 12
    assert [len(set(group)) for group in np.split(order, 4)] == [1] * 4


def test_an_image_is_seeded_by_seed_epoch_and_position_alone() -> None:
    def after(seed: int, place: Place) -> tuple[float, float, float]:
        sampling.seed_sample(seed, place)
        return drawn()

    place = Place(3, 5, 17)
    expected = after(42, place)
    drawn()
    assert after(42, Place(3, 5, 99)) == expected
    others = [after(43, place), after(42, Place(5, 3, 17)), after(42, Place(3, 6, 17))]
    for values in others:
        assert all(a != b for a, b in zip(values, expected, strict=True))


def test_a_batch_is_seeded_by_seed_step_part_and_rank_alone() -> None:
    def after(*numbers: int) -> tuple[float, float, float]:
        sampling.seed_step(*numbers)
        return drawn()

    expected = after(42, 1, 0, 0)
    assert after(42, 1, 0, 0) == expected
    for numbers in ((43, 1, 0, 0), (42, 2, 0, 0), (42, 1, 1, 0), (42, 1, 0, 1)):
        assert all(a != b for a, b in zip(after(*numbers), expected, strict=True))


def test_kinds_of_randomness_share_no_numbers() -> None:
    sampling.seed_sample(42, Place(1, 0, 0))
    sample = drawn()
    sampling.seed_step(42, 1, 0, 0)
    step = drawn()
    sampling.seed_start(42)
    assert len({sample, step, drawn()}) == 3
