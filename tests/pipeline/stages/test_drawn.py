"""Which images are measured with, and what their answers are held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.answers import Drawing
from pipeline.core.figures import Number, State
from pipeline.core.preprocess import Pictures, Preprocess
from pipeline.stages.drawn import MOST, MOST_BYTES, Drawn, choose, draw, judged_by
from pipeline.stages.names import LOGITS, PIXELS
from pipeline.steps import artifact
from pipeline.steps.artifact import Artifact
from pipeline.steps.facts.accuracy import Accuracy, ValidationFacts

HALF = Preprocess(2, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)
NETWORK = {
    "name": "toy",
    "labels": ["a", "b"],
    "input_shape": [3, 2, 2],
    "preprocess": HALF.to_dict(),
    "description": {},
}


def shaded(*shades: int) -> Pictures:
    pixels = np.array(shades, np.uint8)[:, None, None, None]
    return Pictures(np.broadcast_to(pixels, (len(shades), 2, 2, 3)).copy(), HALF)


def make(folder: Path, name: str, made_from: Mapping[str, str], build: Any) -> Artifact:
    return artifact.make(
        folder / name, kind="x", name=name, key="k", made_from=made_from, tools={}, build=build
    )


@pytest.fixture
def samples(tmp_path: Path) -> Artifact:
    """600 images of which the shade is their number by 3."""

    def build(folder: Path) -> Mapping[str, Any]:
        pixels = (np.arange(600) // 3).astype(np.uint8)[:, None, None, None]
        np.save(folder / PIXELS, np.broadcast_to(pixels, (600, 2, 2, 3)))
        return {"network": NETWORK}

    return make(tmp_path, "validate/samples", {}, build)


@pytest.fixture
def built(tmp_path: Path) -> Artifact:
    def build(folder: Path) -> Mapping[str, Any]:
        (folder / "model").write_text("x")
        return {}

    return make(tmp_path, "toy/fp32", {}, build)


def validation(
    folder: Path, *sources: Artifact, state: State = State.MEASURED, judged: bool = True
) -> Artifact:
    def build(new: Path) -> Mapping[str, Any]:
        if judged:
            np.save(new / LOGITS, np.arange(1200, dtype=np.float32).reshape(600, 2))
        top1 = Number(1.0, state, by="toy")
        return ValidationFacts("toy", "fp32", Accuracy(top1, top1)).to_facts()

    digests = {source.name: source.digest for source in sources}
    return make(folder, "validate/toy-fp32", digests, build)


def test_images_are_distinct_as_many_as_memory_allows_and_the_same_every_time() -> None:
    chosen = choose(1000, 12)
    assert len(set(chosen.tolist())) == len(chosen) == MOST
    assert chosen.tolist() == choose(1000, 12).tolist() != sorted(chosen.tolist())
    assert sorted(choose(5, 12).tolist()) == [0, 1, 2, 3, 4]
    assert len(choose(1000, MOST_BYTES // 40)) == 10
    assert len(choose(1000, MOST_BYTES)) == 1


def test_the_logits_are_those_of_the_images(samples: Artifact) -> None:
    logits = np.arange(1200, dtype=np.float32).reshape(600, 2)
    found = draw(samples, {"fp32": logits, "int8": "nobody ran it"})
    assert len(found.pictures) == MOST
    for picture, known in zip(found.pictures.pixels, found.judged["fp32"], strict=True):
        assert picture.max() == known[0] // 2 // 3
    assert found.why_not == {"int8": "nobody ran it"}


def test_batches_are_full_and_answers_are_held_against_their_images() -> None:
    logits = np.array([[1.0, 0], [0, 1], [1, 1], [5, 0], [0, 5]], np.float32)
    drawn = Drawn(shaded(1, 2, 3, 4, 5), {"fp32": logits})
    batches = drawn.batches(2)
    assert [batch.pixels.max((1, 2, 3)).tolist() for batch in batches] == [[1, 2], [3, 4]]
    right, swapped = Drawing(), Drawing()
    right.hear(1, logits[2:4])
    swapped.hear(1, logits[0:2])
    assert drawn.compare("fp32", 2, right).wrong == 0
    assert drawn.compare("fp32", 2, swapped).wrong == 1
    assert drawn.compare("int8", 2, right).why_not == "nothing judged it"


def test_too_few_images_for_a_batch_come_again() -> None:
    drawn = Drawn(shaded(1, 2, 3), {"fp32": np.eye(3, dtype=np.float32)})
    (batch,) = drawn.batches(7)
    assert batch.pixels.max((1, 2, 3)).tolist() == [1, 2, 3, 1, 2, 3, 1]
    drawing = Drawing()
    drawing.hear(0, np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2, 0]])
    assert drawn.compare("fp32", 7, drawing).wrong == 0


def test_a_validation_of_the_same_build_and_images_counts(
    tmp_path: Path, samples: Artifact, built: Artifact
) -> None:
    found = judged_by(validation(tmp_path, samples, built), samples, built)
    assert not isinstance(found, str)
    assert found[1].tolist() == [2.0, 3.0]


def test_others_say_why_they_do_not(tmp_path: Path, samples: Artifact, built: Artifact) -> None:
    name = "validate/toy-fp32"
    old = validation(tmp_path / "old", samples)
    assert judged_by(old, samples, built) == f"{name} is of an earlier toy/fp32: run it again"
    assert not isinstance(judged_by(old, samples, None), str)  # PyTorch is no artifact
    other = validation(tmp_path / "other", built)
    expected = f"{name} is of an earlier validate/samples: run it again"
    assert judged_by(other, samples, built) == expected
    nothing = validation(tmp_path / "nothing", samples, built, judged=False)
    assert judged_by(nothing, samples, built) == f"{name} judged nothing"
    emulated = validation(tmp_path / "emulated", samples, built, state=State.EMULATED)
    assert judged_by(emulated, samples, built) == f"{name} was emulated"
