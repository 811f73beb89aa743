"""Apple's runtime as the judge of the executor."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import InputError, UnsupportedOperatorError
from pipeline.targets.coreai import runner as module
from pipeline.targets.coreai.executor import larger
from pipeline.targets.coreai.package import MODEL
from pipeline.targets.coreai.runner import APPLE, FLOAT16, AppleRunner, JudgedRunner, unexplained

from .conftest import Build, images, needs_coreai, network

LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 4], np.int64)


class Other:
    """Apple's runtime, but for what it answers."""

    def __init__(self, change: Any) -> None:
        self._change = change

    def __call__(self, pictures: Any) -> Any:
        return self._change(np.tile(np.arange(5, dtype=np.float32), (len(pictures), 1)))

    def close(self) -> None:
        pass


def judged(build: Build, monkeypatch: pytest.MonkeyPatch, apple: Any, emulated: Any) -> Any:
    """A runner of which both sides answer as they are told."""
    monkeypatch.setattr(module, "Runtime", lambda package: Other(apple))
    runner = JudgedRunner(build().folder / MODEL, network(), 4, FLOAT16)
    monkeypatch.setattr(runner, "_executor", Other(emulated))
    return runner


def same(logits: Any) -> Any:
    return logits


def nan(logits: Any) -> Any:
    return np.full_like(logits, np.nan)


@needs_coreai
def test_some_images_are_measured_and_all_emulated(build: Build) -> None:
    labels = np.array([3, 3, 3, 1, 2, 0], np.int64)
    with JudgedRunner(build().folder / MODEL, network(), 4, FLOAT16) as runner:
        runner.expect(labels)
        logits = np.concatenate([runner(images()[:4]), runner(images()[4:])])
        numerics = runner.numerics()
    assert len(logits) == 6
    assert numerics is not None
    measured, emulated = numerics.more[f"{APPLE}, 4 images"]
    assert (measured["state"], emulated["state"]) == ("measured", "emulated")
    chosen = [0, 3, 4, 5]
    right = float((logits[chosen].argmax(1) == labels[chosen]).mean())
    assert measured["top1"] == emulated["top1"] == right
    assert 0 < emulated["relative_difference"] < FLOAT16.relative
    assert "the same class for 4 of 4 images" in runner.device


@needs_coreai
def test_what_was_judged_is_taken_up_elsewhere(build: Build) -> None:
    labels = np.array([3, 3, 3, 1, 2, 0], np.int64)
    package = build().folder / MODEL
    runners = [JudgedRunner(package, network(), 4, FLOAT16) for _ in range(3)]
    whole, first, second = runners
    for runner in runners:
        runner.expect(labels)
    for part in (images()[:4], images()[4:]):
        whole(part)
    first(images()[:4])
    second.go_on(4, json.loads(json.dumps(first.noted())))
    second(images()[4:])
    assert second.numerics() == whole.numerics()
    assert second.device == whole.device
    for runner in runners:
        runner.close()


@needs_coreai
def test_parts_are_judged_apart_and_joined(build: Build) -> None:
    labels = np.array([3, 3, 3, 1, 2, 0], np.int64)
    package = build().folder / MODEL
    runners = [JudgedRunner(package, network(), 4, FLOAT16) for _ in range(4)]
    whole, joined, *others = runners
    for runner in runners:
        runner.expect(labels)
    noted: list[Any] = []
    for first, runner in zip((4, 0), others, strict=True):  # in whichever order
        whole.begin(first)
        runner.begin(first)
        for other in (whole, runner):
            other(images()[first:][:4])
        noted.insert(0, json.loads(json.dumps(runner.noted())))
        assert whole.noted() == runner.noted(), "what was before is forgotten"
    joined.go_on(6, joined.joined(noted))
    whole.begin(0)
    for part in (images()[:4], images()[4:]):
        whole(part)
    assert joined.numerics() == whole.numerics()
    for runner in runners:
        runner.close()


def test_a_magnitude_that_is_no_number_stays_one() -> None:
    assert [larger(1, 2), larger(2, 1)] == [2, 2]
    assert all(math.isnan(larger(*pair)) for pair in ((1, math.nan), (math.nan, 1)))


@needs_coreai
def test_without_labels_the_first_images_are_judged(build: Build) -> None:
    with JudgedRunner(build().folder / MODEL, network(), 2, FLOAT16) as runner:
        assert runner.numerics() is None
        runner(images())
        numerics = runner.numerics()
    assert numerics is not None
    assert numerics.more["images"] == 2
    assert "top1" not in numerics.more[f"{APPLE}, 2 images"][0]


@needs_coreai
@pytest.mark.parametrize(
    ("apple", "emulated", "reason"),
    [
        (same, lambda logits: logits * 1.03, r"differs from it by 0\.03 of the logits' size"),
        (same, lambda logits: logits[:, ::-1], "in the class of 4 of them, 4 by a lead that"),
        (nan, same, "gives NaN or infinity for 4 of 4 images, and the executor for others"),
        (same, nan, "gives NaN or infinity for 0 of 4 images, and the executor for others"),
    ],
)
def test_an_emulation_that_is_off_is_withdrawn(
    build: Build, monkeypatch: pytest.MonkeyPatch, apple: Any, emulated: Any, reason: str
) -> None:
    runner = judged(build, monkeypatch, apple, emulated)
    runner.expect(np.arange(6) % 5)
    runner(images())
    with pytest.raises(UnsupportedOperatorError, match=reason):
        runner.numerics()


def ends(fourth: float, fifth: float, images: slice = slice(None)) -> Any:
    """Logits of which the last two are what is given, in some of the images."""

    def change(logits: Any) -> Any:
        changed = logits.copy()
        changed[:, 3:] = 4.0, 4.15
        changed[images, 3:] = fourth, fifth
        return changed

    return change


@needs_coreai
def test_a_class_that_the_allowed_error_may_change_is_no_reason(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = judged(build, monkeypatch, ends(4.0, 4.05), ends(4.05, 4.0))
    runner(images())
    numerics = runner.numerics()
    assert numerics.more[f"{APPLE}, 4 images"][1]["flips"] == 4
    assert "the same class for 0 of 4 images" in runner.device


@needs_coreai
@pytest.mark.parametrize(
    ("apple", "emulated"),
    [
        (ends(4.0, 4.15), ends(4.15, 4.0, slice(1))),  # a lead in both
        (ends(4.0, 4.2, slice(1)), ends(4.11, 4.1, slice(1))),  # in Apple's alone
        (ends(4.11, 4.1, slice(1)), ends(4.0, 4.2, slice(1))),  # in the executor's alone
    ],
)
def test_one_class_beyond_the_allowed_error_withdraws(
    build: Build, monkeypatch: pytest.MonkeyPatch, apple: Any, emulated: Any
) -> None:
    runner = judged(build, monkeypatch, apple, emulated)
    runner(images())
    reason = r"by 0\.01\d* of .* \(limit 0\.02\) and in the class of 1 of them, 1 by a lead"
    with pytest.raises(UnsupportedOperatorError, match=reason):
        runner.numerics()


@needs_coreai
def test_small_leads_do_not_excuse_a_large_error(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flat(logits: Any) -> Any:
        return np.ones_like(logits) + logits * 1e-3

    runner = judged(build, monkeypatch, flat, lambda logits: flat(logits[:, ::-1]) * 1.03)
    runner(images())
    reason = r"by 0\.03 of .* and in the class of 4 of them, 0 by a lead"
    with pytest.raises(UnsupportedOperatorError, match=reason):
        runner.numerics()


@pytest.mark.parametrize(("share", "beyond"), [(0.999, 0), (1.001, 2)])
def test_an_error_beyond_the_allowed_one_is_needed(share: float, beyond: int) -> None:
    reference = np.array([[3.0, 4.0, 0.0], [40.0, 30.0, 0.0]], np.float32)
    error = np.array([[1.0, -1.0, 0.0], [-10.0, 10.0, 0.0]]) * share
    logits = (reference + error / np.sqrt(2)).astype(np.float32)
    assert (logits.argmax(1) != reference.argmax(1)).all()
    assert unexplained(logits, reference, 0.2) == beyond
    assert (
        unexplained((reference + error / 3).astype(np.float32), reference, 0.1) == 0
    )  # the classes are the same


@needs_coreai
def test_the_reason_has_what_was_measured(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = judged(build, monkeypatch, same, lambda logits: logits * 2)
    runner.expect(np.full(6, 4))
    runner(images())
    with pytest.raises(UnsupportedOperatorError, match=r"on 4 images \(top-1 100\.00%\)"):
        runner.numerics()


@needs_coreai
def test_nan_on_both_sides_is_agreement(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = judged(build, monkeypatch, nan, nan)
    runner(images())
    assert runner.numerics() is not None


@needs_coreai
def test_a_closed_runner_says_so(build: Build) -> None:
    for runner in (
        JudgedRunner(build().folder / MODEL, network(), 1, FLOAT16),
        AppleRunner(build().folder / MODEL, network()),
    ):
        runner.close()
        runner.close()
        with pytest.raises(InputError, match="closed"):
            runner(images(1))


@needs_coreai
def test_apples_runtime_alone(build: Build) -> None:
    package = build().folder / MODEL
    with AppleRunner(package, network()) as alone:
        apple = alone(images(2))
        assert "Apple's Core AI runtime" in alone.device
    with JudgedRunner(package, network(), 2, FLOAT16) as runner:
        np.testing.assert_allclose(runner(images(2)), apple, rtol=0, atol=0.02)
