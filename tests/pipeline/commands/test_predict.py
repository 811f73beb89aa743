from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import pipeline
from care.data import open_dataset
from pipeline.cli import main


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, begin: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "engines"
    shutil.rmtree(begin(folder / "trial") / "trt")
    settings = {
        "name": "trial",
        "output": folder,
        "model": {"name": "care_tiny", "checkpoint": "embedded"},
        "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
        "targets": {"ort": {"precisions": ["fp32"]}},
    }
    pipeline.run(settings, only=("export", "simplify", "precision", "build"))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    boot = open_dataset("fashion-mnist", "validation").image(0)
    (folder / "inner").mkdir()
    (folder / ".hidden").mkdir()
    for name in ("boot.png", "inner/[boot].png", ".hidden/boot.png"):
        boot.save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def predict(*arguments: object, given: str | None = None) -> Result:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)], input=given)


def test_a_folder_of_images_is_predicted(output: Path, photos: Path) -> None:
    result = predict(photos, "--output", output, "--top", 1, "--json")
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.output.splitlines()]
    assert [Path(answer["image"]).name for answer in answers] == ["boot.png", "[boot].png"]
    for answer in answers:
        assert [score["label"] for score in answer["scores"]] == ["Ankle boot"]
        assert 0.5 < answer["scores"][0]["probability"] <= 1
        assert (answer["artifact"], answer["state"]) == ("ort/fp32", "measured")
        assert answer["milliseconds"] > 0


def test_people_get_a_table_with_what_answered(output: Path, photos: Path) -> None:
    result = predict(photos / "inner" / "[boot].png", "--output", output, "--top", 2)
    assert "[boot].png" in result.output.replace("\n", "")
    assert "Ankle boot" in result.output
    assert "ort/fp32, measured: ONNX Runtime" in result.output


def test_a_list_of_files_comes_from_the_standard_input(output: Path, photos: Path) -> None:
    given = f"{photos / 'boot.png'}\n\n"
    result = predict("-", "--output", output, "--top", 1, "--json", given=given)
    assert len(result.output.splitlines()) == 1


def test_an_artifact_is_named_by_its_folder(output: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(output / "trial" / "ort" / "fp32", tmp_path / "alone")
    result = predict(photos / "boot.png", "--artifact", tmp_path / "alone", "--json")
    assert json.loads(result.output)["scores"][0]["label"] == "Ankle boot"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{photos}/none.png",), "none.png does not exist: name an image file"),
        (("{photos}/notes.txt",), "notes.txt is not an image"),
        (("{photos}/.hidden/..", "--artifact", "ort/int8"), "built are: fp32"),
        (("{photos}", "--artifact", "trt"), "no trt artifact"),
        (("{photos}", "--name", "trail"), "there are trial"),
        (("{empty}",), "no images in"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    output: Path, photos: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    stated = [text.format(photos=photos, empty=tmp_path / "empty") for text in arguments]
    result = predict(*stated, "--output", output)
    assert result.exit_code == 2
    assert message in result.output


def test_several_results_have_to_be_named(output: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(output / "trial", tmp_path / name)
    result = predict(photos / "boot.png", "--output", tmp_path)
    assert result.exit_code == 2
    assert "holds several results (one, two): name one with --name" in result.output
    assert predict(photos / "boot.png", "--output", tmp_path, "--name", "two").exit_code == 0
