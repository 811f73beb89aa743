"""What the sample stages decode, and what the steps after them read of it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline import config
from pipeline.core.errors import ArtifactError, DataError
from pipeline.core.files import file_hash
from pipeline.core.preprocess import Pictures
from pipeline.scheduler.plan import make_context
from pipeline.stages.calibration_set import read_calibration
from pipeline.stages.images import batches, pictures_at, preprocess_of, read_labels
from pipeline.stages.names import PIXELS, SOURCES
from pipeline.stages.samples import CalibrationStep, SampleStep, write_samples
from pipeline.steps.artifact import Artifact
from pipeline.steps.facts.graphs import CalibrationFacts
from pipeline.steps.keys import versions

CLASSES = ("ant", "bee", "cat")
EACH = {"train": 4, "val": 4}
CONFIG: dict[str, Any] = {
    "name": "trial",
    "model": {"name": "timm/test_resnet", "checkpoint": "random"},
    "data": {"validation": "folder:data", "calibration": "folder:data", "labels": "names.txt"},
    "preprocess": {"size": 32, "crop": 1.0, "mean": [0.5, 0.25, 0.125], "std": [0.5, 0.25, 0.2]},
    "targets": {"ort": {"precisions": ["fp32"]}},
    "validation": {"images": 6},
    "calibration": {"images": 9, "seed": 5},
}
LOGITS = {"cat": 0, "ant": 1, "bee": 2}
"""The network's own order of the classes."""

Told = list[tuple[int, int | None, str]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, each of its own shade; the working directory."""
    shade = 0
    for split, count in EACH.items():
        for name in CLASSES:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                shade += 5
                image = Image.new("RGB", (32, 32), (shade, 0, 255 - shade))
                image.save(tmp_path / "data" / split / name / f"{i}.png")
    (tmp_path / "names.txt").write_text("cat\nant\nbee\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def told() -> Told:
    """What the steps told of their progress."""
    return []


@pytest.fixture
def context(project: Path, told: Told) -> Callable[..., Any]:
    """Makes the steps' context: (**sections in place of those of the configuration)."""

    def make(**sections: Any) -> Any:
        path = project / "pipeline.yaml"
        path.write_text(yaml.safe_dump({**CONFIG, **sections}))
        return make_context(
            config.load(path),
            lambda line: None,
            lambda done, total=None, what="": told.append((done, total, what)),
        )

    return make


def sources_of(artifact: Artifact) -> list[list[str]]:
    found: list[list[str]] = json.loads(artifact.path(SOURCES).read_text())
    return found


def shades(artifact: Artifact) -> list[int]:
    """What tells the images apart."""
    pixels = np.load(artifact.path(PIXELS))
    assert (pixels.shape[1:], pixels.dtype) == ((32, 32, 3), np.uint8)
    return [int(image[0, 0, 0]) for image in pixels]


def test_samples_are_spread_over_the_set_and_labelled_as_the_network_counts(
    context: Callable[..., Any], project: Path, told: Told
) -> None:
    step = SampleStep(context())
    made = step.run()
    names = [f"{name}/{i}.png" for name in CLASSES for i in (0, 2)]
    assert sources_of(made) == [[n, file_hash(project / "data/val" / n)] for n in names]
    opened = [Image.open(project / "data/val" / name) for name in names]
    assert shades(made) == [image.getpixel((0, 0))[0] for image in opened]  # type: ignore[index]
    assert read_labels(made).tolist() == [LOGITS[name.partition("/")[0]] for name in names]
    assert read_labels(made).dtype == np.int64
    assert (made.facts["images"], made.facts["of"]) == (6, 12)
    assert made.facts["data"] == step.source.data_facts("validation")
    assert made.network() == step.source.network
    assert (0, 6, "decoding images") in told


@pytest.mark.parametrize(("asked", "found"), [({}, 12), ({"images": 99}, 12), ({"images": 5}, 5)])
def test_as_many_samples_as_asked_for_and_there_are(
    asked: dict[str, int], found: int, context: Callable[..., Any]
) -> None:
    made = SampleStep(context(validation=asked)).run()
    assert made.facts["images"] == found == len(set(shades(made)))
    assert sources_of(made)[-1][0].startswith("cat/")


def test_batches_are_the_networks_input(context: Callable[..., Any]) -> None:
    step = SampleStep(context())
    made = step.run()
    found = list(batches(made, 4))
    assert [len(batch) for batch in found] == [4, 2]
    dataset = step.source.validation
    expected = [step.source.preprocess(dataset.image(i)) for i in range(0, 12, 2)]
    assert np.array_equal(np.concatenate([batch.images for batch in found]), np.stack(expected))
    assert preprocess_of(made) == step.source.preprocess


def test_some_samples_are_those_asked_for(context: Callable[..., Any]) -> None:
    made = SampleStep(context()).run()
    wanted = np.array([4, 0, 4])
    found = pictures_at(made, wanted)
    assert np.array_equal(found.pixels, np.load(made.path(PIXELS))[wanted])
    assert found.preprocess == preprocess_of(made)


def test_reading_a_few_samples_takes_no_memory_for_all(context: Callable[..., Any]) -> None:
    """A validation set of 50,000 images has 7.5 GB of pixels."""
    preprocess = {**CONFIG["preprocess"], "size": 256}
    made = SampleStep(context(preprocess=preprocess, validation={})).run()
    whole, one = 12 * 256 * 256 * 3, np.array([7])
    ways: tuple[Callable[[], Pictures], ...] = (
        lambda: next(batches(made, 1)),
        lambda: pictures_at(made, one),
    )
    for read in ways:
        tracemalloc.start()
        try:
            assert len(read()) == 1
            assert tracemalloc.get_traced_memory()[1] < whole / 2
        finally:
            tracemalloc.stop()


def test_where_the_images_lay_is_known(context: Callable[..., Any]) -> None:
    data = {**CONFIG["data"], "calibration": "folder:data/train"}
    steps = context(data=data)
    assert SampleStep(steps).run().made().data == "folder:data"
    assert CalibrationStep(steps).run().made().data == "folder:data/train"


def test_calibration_images_are_balanced_and_of_the_training(
    context: Callable[..., Any], project: Path, told: Told
) -> None:
    step = CalibrationStep(context())
    made = step.run()
    sources = sources_of(made)
    labels = read_labels(made).tolist()
    assert sorted(labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [LOGITS[name.partition("/")[0]] for name, _ in sources] == labels
    assert [digest for _, digest in sources] == [
        file_hash(project / "data/train" / name) for name, _ in sources
    ]
    facts = CalibrationFacts.from_facts(made.facts, "calibration")
    assert facts.images == 9
    assert facts.warnings == ("9 calibration images are few: ranges are safer with 128",)
    assert facts.more["data"] == step.source.data_facts("calibration")
    assert made.network() == step.source.network
    assert (0, None, "looking for validation images among them") in told


def test_the_seed_chooses_calibration_images(context: Callable[..., Any]) -> None:
    found = [
        CalibrationStep(context(calibration={"images": 9, "seed": seed})).run().facts["digest"]
        for seed in (5, 5, 6)
    ]
    assert found[0] == found[1] != found[2]


def test_calibration_on_validation_images_is_refused(
    context: Callable[..., Any], project: Path
) -> None:
    data = {**CONFIG["data"], "calibration": "folder:data/val"}
    with pytest.raises(DataError, match=r"^data: 9 of 9 calibration images are also in the valid"):
        CalibrationStep(context(data=data)).run()
    assert not (project / "engines/trial/calibration").exists()


def test_the_calibration_set_is_what_was_decoded(context: Callable[..., Any]) -> None:
    step = CalibrationStep(context())
    made = step.run()
    found = read_calibration(made)
    assert found.images.dtype == np.float32
    assert np.array_equal(found.images, np.concatenate([part.images for part in batches(made, 2)]))
    assert found.labels.tolist() == read_labels(made).tolist()
    assert list(found.hashes) == [digest for _, digest in sources_of(made)]


@pytest.mark.parametrize(
    "sources",
    [
        {"a": "b"},
        [["ant/0.png", "a hash"], ["ant/1.png"]],
        [["ant/0.png", "a hash"], ["ant/1.png", 3]],
        [["ant/0.png", "a hash"], "ab"],
    ],
)
def test_sources_that_no_calibration_wrote_are_refused(
    sources: Any, context: Callable[..., Any]
) -> None:
    made = CalibrationStep(context()).run()
    made.path(SOURCES).write_text(json.dumps(sources))
    with pytest.raises(ArtifactError, match=r"is damaged: build again$"):
        read_calibration(made)


ASIDE: dict[str, Any] = {
    "data": {"validation": "folder:data/val", "calibration": "auto", "labels": "names.txt"},
    "targets": {"ort": {"precisions": ["fp32", "int8"]}},
}
"""Validation images alone, of which some calibrate."""


def add_images(project: Path, count: int) -> None:
    """More validation images, of three classes in turns, each of its own shade."""
    for i in range(count):
        image = Image.new("RGB", (32, 32), (i, 100, 9))
        image.save(project / "data/val" / CLASSES[i % 3] / f"more {i:02}.png")


def test_copies_of_images_that_judge_do_not_calibrate(
    context: Callable[..., Any], project: Path
) -> None:
    """A picture may lie twice in a set of which some images calibrate, and the others judge."""
    add_images(project, 43)
    made = context(**ASIDE, calibration={"images": 11, "seed": 5})
    source = made.source
    copied, kept = source.validation.name(0), source.calibration.name(3)
    (project / "data/val" / kept).write_bytes((project / "data/val" / copied).read_bytes())
    step = CalibrationStep(context(**ASIDE, calibration={"images": 11, "seed": 5}))
    found = {name for name, _ in sources_of(step.run())}
    assert found == {source.calibration.name(i) for i in range(11)} - {kept}


def test_what_is_set_aside_decides_which_samples_judge(
    context: Callable[..., Any], project: Path
) -> None:
    add_images(project, 43)
    found = [
        SampleStep(context(**ASIDE, calibration={"images": 8, "seed": seed})).key()
        for seed in (5, 5, 6)
    ]
    assert found[0] == found[1] != found[2]


def test_what_decides_the_samples_is_in_their_keys(context: Callable[..., Any]) -> None:
    made = context()
    network = made.source.network_inputs()
    validation = made.source.data_inputs("validation")
    calibration = made.source.data_inputs("calibration")
    samples, calibrated = SampleStep(made), CalibrationStep(made)
    assert samples.inputs() == {
        **network,
        **validation,
        "settings validation": {"images": 6},
    }
    assert calibrated.inputs() == {
        **network,
        **validation,
        **calibration,
        "settings calibration": {"images": 9, "seed": 5},
    }
    for step in (samples, calibrated):
        assert step.tools() == versions("torch", "timm", "pillow", "numpy")
    assert (samples.stage, samples.name) == ("validate", "validate/samples")
    assert (calibrated.stage, calibrated.name) == ("calibrate", "calibration")


def test_progress_is_told_every_fifty_images(
    context: Callable[..., Any], tmp_path: Path, told: Told
) -> None:
    made = context()
    made.source.data_facts("validation")
    told.clear()
    indices = np.arange(120, dtype=np.int64) % 12
    write_samples(tmp_path, made, made.source.validation, indices, indices)
    assert [done for done, total, _ in told if total == 120] == [0, 50, 100]
    assert np.load(tmp_path / PIXELS).shape == (120, 32, 32, 3)
