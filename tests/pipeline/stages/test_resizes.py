"""What other ways of preparing images cost: judged by a runner whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.core.network import Batch, Logits
from pipeline.core.preprocess import Preprocess
from pipeline.core.runner import Runner
from pipeline.emulate.resizes import Photo
from pipeline.stages.images import evenly
from pipeline.stages.resizes import measure
from pipeline.steps.facts.resizes import ResizesFacts

OWN = Preprocess(8, 1.0, "bicubic", (0.2, 0.2, 0.2), (0.2, 0.2, 0.2))
IMAGES = 40


class Reddest(Runner):
    """Class 0 where red is the strongest channel, 1 where blue is; brightness decides class 2."""

    device = "a toy"

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Batch) -> Logits:
        self.seen += len(images)
        means = images.mean((2, 3))
        dark = np.full(len(images), -0.9)
        return np.stack([means[:, 0], means[:, 2], dark], 1).astype(np.float32)


class OfPixels(Reddest):
    takes = "pixels"

    def __call__(self, images: Batch) -> Logits:
        assert images.dtype == np.uint8
        return super().__call__(images.transpose(0, 3, 1, 2).astype(np.float32))


def photos(side: int) -> list[Photo]:
    """Half of them red, half of them blue."""
    red, blue = (200, 20, 20), (20, 20, 200)
    images = [Image.new("RGB", (side, side), red if i % 2 else blue) for i in range(IMAGES)]
    return [Photo(image, None, OWN) for image in images]


LABELS = np.array([0 if i % 2 else 1 for i in range(IMAGES)])


def measured(runner: Runner, side: int = 32) -> ResizesFacts:
    return measure(runner, photos(side), LABELS, OWN, judged="toy", of=100)


def test_what_costs_is_proven_and_what_changes_nothing_says_so() -> None:
    runner = Reddest()
    facts = measured(runner)
    assert (facts.images, facts.of, facts.fitting, facts.top1.value) == (IMAGES, 100, 0, 1.0)
    by_name = {cost.name: cost for cost in facts.ways}
    swapped = by_name["bgr"]
    assert (swapped.top1.value, swapped.drop.value, swapped.agreement.value) == (0.0, 1.0, 0.0)
    assert (swapped.changed, swapped.levels) == (IMAGES, 120.0)
    assert swapped.told == "worse, beyond doubt"
    assert by_name["opencv-linear"].why == "it gives the same pixels for every image here"
    assert by_name["opencv-linear"].top1.value is None
    wrong = by_name["wrong-mean"]
    assert (wrong.changed, wrong.levels, wrong.drop.value) == (IMAGES, 0.0, 0.0)
    assert wrong.told == "no difference shown"
    low, high = wrong.drop.interval or (0, 0)
    assert low < 0 < high
    assert runner.seen == 3 * IMAGES, "equal inputs are asked of once"


def test_a_wrong_mean_costs_nothing_where_the_artifact_normalizes() -> None:
    runner = OfPixels()
    by_name = {cost.name: cost for cost in measured(runner).ways}
    assert by_name["wrong-mean"].why == "the artifact takes pixels and normalizes them itself"
    assert by_name["bgr"].drop.value == 1.0


def test_images_of_the_networks_size_are_counted() -> None:
    facts = measured(Reddest(), side=8)
    assert facts.fitting == IMAGES
    resized = [cost for cost in facts.ways if cost.name.startswith(("opencv", "tensor"))]
    assert resized
    assert all("size already" in cost.why for cost in resized)


def test_logits_that_are_no_numbers_count_as_wrong() -> None:
    class Broken(Reddest):
        def __call__(self, images: Batch) -> Logits:
            logits = super().__call__(images)
            logits[logits[:, 1] > logits[:, 0]] = np.nan
            return logits

    facts = measured(Broken())
    assert facts.top1.value == 0.5


@pytest.mark.parametrize(
    ("total", "wanted", "found"), [(10, 4, [0, 2, 5, 7]), (3, None, [0, 1, 2])]
)
def test_some_images_lie_evenly(total: int, wanted: int | None, found: list[int]) -> None:
    assert evenly(total, wanted).tolist() == found
    assert evenly(3, 9).tolist() == [0, 1, 2]


def test_facts_are_written_and_read_back() -> None:
    facts = measured(Reddest())
    assert ResizesFacts.from_facts(facts.to_facts(), "resizes/toy") == facts
