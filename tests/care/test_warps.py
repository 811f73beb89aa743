from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, RandAugment, rand_augment_ops
from torchvision.transforms import Compose

from care import warps

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
NAMES = ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "SharpnessIncreasing")


def picture(width: int = 40, height: int = 28, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (7, 10, 3), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
    return large.convert(mode)


def operation(name: str, magnitude: float, resample: Image.Resampling) -> AugmentOp:
    options = {"interpolation": resample, "img_mean": (124, 116, 104)}
    return AugmentOp(name, prob=1, magnitude=magnitude, hparams=options)


def hastened(one: AugmentOp) -> AugmentOp:
    warps.hasten(Compose([RandAugment([one])]))
    return one


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("magnitude", [0, 0.3, 4, 7.7, 10])
@pytest.mark.parametrize("name", NAMES)
def test_results_are_timms_to_one_level(
    name: str, magnitude: float, resample: Image.Resampling
) -> None:
    timms, ours = (operation(name, magnitude, resample) for _ in range(2))
    hastened(ours)
    assert ours.aug_fn is not timms.aug_fn
    for seed in range(3):  # both signs
        for image in (picture(), picture(33, 47)):
            random.seed(seed)
            expected = np.asarray(timms(image)).astype(int)
            after = random.random()
            random.seed(seed)
            found = np.asarray(ours(image)).astype(int)
            assert random.random() == after  # as many random numbers were drawn
            assert np.abs(found - expected).max() <= 1
            assert (found != expected).mean() < 0.1


def test_a_filter_is_drawn_as_timm_draws_it() -> None:
    timms, ours = (
        AugmentOp("ShearX", prob=0.5, magnitude=7, hparams={"img_mean": (1, 2, 3)})
        for _ in range(2)
    )
    hastened(ours)
    random.seed(5)
    expected = [np.asarray(timms(picture())).astype(int) for _ in range(40)]
    random.seed(5)
    found = [np.asarray(ours(picture())).astype(int) for _ in range(40)]
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(expected, found, strict=True))
    assert len({one.tobytes() for one in found}) == 5  # two filters, two signs, and not at all


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("shift", [-90.0, -40.0, -39.6, -0.5, 0.0, 0.25, 39.5, 40.0, 41.5, 1e6])
def test_rows_go_as_far_as_pillow_moves_them(shift: float, resample: Image.Resampling) -> None:
    image, fill = picture(), (9, 8, 7)
    affine = (1, 0, shift, 0, 1, 0)
    expected = np.asarray(
        image.transform(image.size, Image.Transform.AFFINE, affine, resample, fillcolor=fill)
    )
    found = np.asarray(warps.slide(image, np.full(image.height, shift), resample, fill))
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("factor", [0, 0.1, 0.7, 1, 1.9])
def test_sharpening_is_pillows_bit_for_bit(factor: float) -> None:
    timms = operation("Sharpness", 0, FILTERS[0]).aug_fn
    for image in (picture(), picture(3, 3)):
        expected = np.asarray(timms(image, factor))
        assert np.array_equal(np.asarray(warps.sharpen(image, factor)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_gray_images_are_left_to_timm(name: str) -> None:
    timms, ours = (
        AugmentOp(name, 1, 6, {"interpolation": FILTERS[1], "img_mean": 9}) for _ in range(2)
    )
    hastened(ours)
    random.seed(0)
    expected = timms(picture(mode="L"))
    random.seed(0)
    assert ours(picture(mode="L")) == expected


def test_a_policy_draws_the_operations_that_timms_does() -> None:
    hparams = {"img_mean": (124, 116, 104), "interpolation": FILTERS[1]}
    policies = [RandAugment(rand_augment_ops(9, hparams=hparams)) for _ in range(2)]
    warps.hasten(Compose([policies[1]]))
    chosen = []
    for policy in policies:
        np.random.seed(3)
        for one in policy.ops:
            one.prob = -1  # nothing is done, and who was called is noted
        drawn = [np.random.choice(policy.ops, 2).tolist() for _ in range(20)]
        chosen.append([one.name for pair in drawn for one in pair])
        assert policy(picture()) == picture()
    assert chosen[0] == chosen[1]


def test_all_policies_are_hastened() -> None:
    for policy in ("rand-m9-mstd0.5-inc1", "original", "3a"):
        transform = create_transform(32, is_training=True, auto_augment=policy)
        before = [one.aug_fn for one in warps.operations(transform)]
        warps.hasten(transform)
        after = [one.aug_fn for one in warps.operations(transform)]
        assert len(before) == len(after) > 0
        if policy != "3a":
            assert before != after
