"""`resizes`, as a user gives it: of a configuration, of an artifact in it, and of one alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

import pipeline
from pipeline.cli import main
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.targets.ort.target import OrtTarget

CONFIG = """\
name: trial
model: {name: care_tiny, checkpoint: embedded}
data: {validation: fashion-mnist}
targets: {ort: {precisions: [fp32]}}
validation: {images: 20}
output: OUTPUT
"""
STAGES = ("export", "simplify", "precision", "build", "validate")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, begin: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("run")
    begin(folder / "engines/trial")
    path = folder / "pipeline.yaml"
    path.write_text(CONFIG.replace("OUTPUT", str(folder / "engines")))
    assert pipeline.run(str(path), only=STAGES).exit_code == 0
    return path


@pytest.fixture
def results(config: Path) -> Path:
    return config.parent / "engines/trial"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["resizes", *map(str, arguments)])


def told(result: Result) -> str:
    return " ".join(result.output.split())


def test_the_network_and_an_artifact_are_judged_and_reported(config: Path, results: Path) -> None:
    first = invoke(config, "--images", 6, "--json")
    assert first.exit_code == 0, first.output
    plain = json.loads(first.stdout)
    assert (plain["judged"], plain["images"], plain["of"]) == ("pytorch", 6, 10_000)
    assert {way["name"] for way in plain["ways"]} >= {"opencv-area", "tensor", "draft", "bgr"}
    made = results / "resizes/pytorch"
    before = (made / MANIFEST).stat().st_mtime_ns
    assert json.loads(invoke(config, "--images", 6, "--json").stdout) == plain
    assert (made / MANIFEST).stat().st_mtime_ns == before, "it was up to date"
    artifact = invoke(config, "--images", 6, "--artifact", "ort/fp32")
    assert artifact.exit_code == 0, artifact.output
    assert "ort/fp32, 6 of 10,000 images" in told(artifact)
    assert "means nothing here: " in told(artifact)
    checked = CliRunner().invoke(main, ["check", "trial", "--output", str(results.parent)])
    assert checked.exit_code == 0, checked.output
    pipeline.run(str(config), only=("export",))
    for report in ("report.html", "report.md"):
        text = (results / report).read_text()
        assert "pytorch, 6 of 10,000 images" in text
        assert "ort/fp32, 6 of 10,000 images" in text


def test_an_artifact_alone_takes_images_of_the_users(results: Path, tmp_path: Path) -> None:
    network = Artifact.read(results / "ort/fp32").network()
    for label in network.labels[1:3]:  # the first one has a slash in it
        (tmp_path / label).mkdir()
        Image.effect_noise((300, 280), 60).convert("RGB").save(tmp_path / label / "a.jpg")
    result = invoke(results / "ort/fp32", "--data", f"folder:{tmp_path}", "--json")
    assert result.exit_code == 0, result.output
    ways = {way["name"]: way for way in json.loads(result.stdout)["ways"]}
    assert ways["draft"]["changed"] == 2
    assert ways["wrong-mean"]["drop"]["samples"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CONFIG", "--data", "folder:x"), "--data is for FOLDER"),
        (("FOLDER",), "give --data folder:PATH"),
        (("FOLDER", "--data", "folder:x", "--artifact", "ort/fp32"), "--artifact is for a"),
        (("CONFIG", "--artifact", "ort"), "name target and precision, such as ort/fp32"),
        (("CONFIG", "--artifact", "ort/fp8"), "fp8"),
        (("CONFIG", "--artifact", "coreml/fp16"), "no target coreml"),
        (("CONFIG", "--images", "0"), "--images"),
        (("FOLDER", "--data", "folder:/nowhere"), "--data: "),
        (("missing.yaml",), "missing.yaml"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: tuple[str, ...], message: str, config: Path, results: Path
) -> None:
    places = {"CONFIG": str(config), "FOLDER": str(results / "ort/fp32")}
    result = invoke(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in told(result)


def test_what_does_not_run_here_is_not_judged(
    config: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OrtTarget, "missing", lambda self, artifact: "there is no such CPU")
    result = invoke(config, "--artifact", "ort/fp32", "--images", 5)
    assert result.exit_code == 4, result.output
    assert "there is no such CPU; leave out --artifact to judge the network" in told(result)
    result = invoke(results / "ort/fp32", "--data", "folder:x")
    assert result.exit_code == 4, result.output
