"""`export.preprocessing: graph` in a run: which files there are, and how they are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

import pipeline
from care.data import open_dataset
from pipeline.cli import main
from pipeline.core.errors import InputError
from pipeline.core.figures import Number, State
from pipeline.report.model import Run
from pipeline.stages.names import GRAPH, LOGITS, PHOTO
from pipeline.stages.validate import compare_photos
from pipeline.steps.artifact import Artifact
from pipeline.steps.facts.accuracy import PhotoCheck
from pipeline.targets.registry import TARGETS

STAGES = ("export", "simplify", "precision", "build", "validate")
IMAGES = 12


def settings(folder: Path, **export: Any) -> dict[str, Any]:
    return {
        "name": "trial",
        "output": folder,
        "model": {"name": "care_tiny", "checkpoint": "embedded"},
        "data": {"validation": "fashion-mnist"},
        "targets": {"ort": {"precisions": ("fp32",), "tune": False}},
        "validation": {"images": IMAGES},
        "export": export,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, embedded_results: Path) -> Path:
    """A run of the embedded network, whose graph other tests have exported already."""
    folder = tmp_path_factory.mktemp("photo")
    model = {"onnx": embedded_results / "export" / GRAPH}
    wanted = {**settings(folder, preprocessing="graph"), "model": model}
    assert pipeline.run(wanted, only=STAGES).exit_code == 0
    return folder / "trial"


def test_export_and_artifact_take_decoded_photographs(results: Path) -> None:
    artifact = Artifact.read(results / "ort/fp32")
    dataset = open_dataset("fashion-mnist", "validation")
    given = np.load(results / "validate/ort-fp32" / LOGITS)
    for path in (results / "export" / PHOTO, artifact.path(PHOTO)):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (taken,) = session.get_inputs()
        assert (taken.name, taken.type, taken.shape[2]) == ("photo", "tensor(uint8)", 3)
        logits = session.run(None, {"photo": np.asarray(dataset.image(0))})[0]
        assert logits.shape == (1, 10)
        assert np.abs(logits - given[0]).max() < 0.1
    assert artifact.facts["photo"]["file"] == PHOTO
    labels = {entry.key for entry in onnx.load(artifact.path(PHOTO)).metadata_props}
    assert {"labels", "preprocess"} <= labels


def test_validation_feeds_photographs_and_reports_tell_it(results: Path) -> None:
    (built,) = Run.read(results / "results.json").artifacts
    assert built.photo is not None
    assert (built.photo.images, built.photo.agreement.value) == (IMAGES, 1.0)
    assert built.photo.max_difference.value is not None
    assert 0 < built.photo.max_difference.value < 0.2
    assert PHOTO in built.photo.by
    assert "Given decoded photographs" in (results / "report.html").read_text()


def test_photographs_of_other_shapes_are_refused(results: Path) -> None:
    artifact = Artifact.read(results / "ort/fp32")
    runner = TARGETS["ort"].open_photo(artifact)
    assert runner is not None
    with runner:
        assert runner(np.zeros((5, 9, 3), np.uint8)).shape == (1, 10)
        others: list[Any] = [np.zeros((5, 9, 3), np.float32), np.zeros((5, 9), np.uint8)]
        for wrong in others:
            with pytest.raises(InputError, match="takes a decoded photograph"):
                runner(wrong)
    with pytest.raises(InputError, match="closed"):
        runner(np.zeros((5, 9, 3), np.uint8))


def test_without_it_there_are_no_such_files_and_keys_stay(results: Path) -> None:
    text = json.loads((results / "ort/fp32/artifact.json").read_text())
    assert text["inputs"]["settings export.preprocessing"] == "graph"
    trt = TARGETS["trt"]
    assert not trt.takes_photos
    assert trt.open_photo(Artifact.read(results / "ort/fp32")) is None


def test_a_loss_that_is_proven_is_told_first(results: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 200)
    given = np.eye(5, dtype=np.float32)[labels]
    worse = compare_photos(given[:, ::-1], given, labels, "a toy")
    assert worse.is_worse
    assert worse.agreement.value is not None
    assert worse.agreement.value < 0.5
    same = compare_photos(given, given, labels, "a toy")
    assert not same.is_worse
    assert (same.top1.value, same.drop.value, same.max_difference.value) == (1.0, 0.0, 0.0)


def number(value: float, interval: tuple[float, float] | None = None) -> Number:
    return Number(value, State.MEASURED, by="a toy", samples=10, interval=interval)


def test_facts_of_it_are_plain() -> None:
    check = PhotoCheck(10, "a toy", number(0.9), number(0.1, (0.01, 0.2)), number(0.9), number(1.0))
    assert PhotoCheck.from_dict(check.to_dict(), "here") == check
    assert check.is_worse


@pytest.mark.parametrize(
    ("export", "more", "message"),
    [
        ({"preprocessing": "graph", "batch": 4}, {"bench": {"batches": [4]}}, "one at a time"),
        ({"preprocessing": "inside"}, {}, "export.preprocessing: input should be 'outside' or"),
        (
            {"preprocessing": "graph"},
            {
                "preprocess": {
                    "size": 64,
                    "crop": 1.0,
                    "interpolation": "lanczos",
                    "mean": [0.5] * 3,
                    "std": [0.5] * 3,
                }
            },
            "a graph can resize by bilinear and bicubic, and preprocess.interpolation is lanczos",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    export: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(json.dumps({**settings(tmp_path, **export), **more}, default=str))
    result = CliRunner().invoke(main, ["run", str(path), "--dry-run"])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
