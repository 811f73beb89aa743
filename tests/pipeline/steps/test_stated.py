"""What a results' folder states of its artifacts, and what of that is believed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.seals import sealed
from pipeline.steps.artifact import Artifact
from pipeline.steps.folders import RESULTS_FILE, UNREPORTED
from pipeline.steps.stated import Stated, is_unreported
from tests.pipeline.steps.making import fill

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def report(folder: Path, **seals: str) -> None:
    (folder / RESULTS_FILE).write_text(sealed({"format": 3, "seals": seals}))


def test_nothing_is_stated_at_first(tmp_path: Path) -> None:
    stated = Stated(tmp_path)
    assert stated.of("onnx") == set()
    assert stated.allows("onnx", A)
    assert list(tmp_path.iterdir()) == []


def test_the_report_states_seals(tmp_path: Path) -> None:
    report(tmp_path, onnx=A)
    stated = Stated(tmp_path)
    assert stated.of("onnx") == {A}
    assert (stated.allows("onnx", A), stated.allows("onnx", B)) == (True, False)
    assert stated.allows("other", B)


def test_what_is_announced_counts_beside_the_report_until_the_next(tmp_path: Path) -> None:
    report(tmp_path, onnx=A)
    Stated(tmp_path).announce("onnx", B)
    Stated(tmp_path).announce("onnx", C)
    Stated(tmp_path).announce("ort/fp32", B)
    stated = Stated(tmp_path)
    # A run may have been killed before it moved the artifact into its place.
    assert stated.of("onnx") == {A, B, C}
    assert stated.of("ort/fp32") == {B}
    stated.is_reported()
    assert not (tmp_path / UNREPORTED).exists()
    assert Stated(tmp_path).of("onnx") == {A}
    stated.is_reported()


def test_without_a_report_others_state_seals(tmp_path: Path) -> None:
    folder = fill(tmp_path / "net", report=False)
    seals = {name: Artifact.read(folder / name).seal for name in ("export", "ort/fp32")}
    for text in (None, "{", "{}", '{"format": 2, "seals": {"export": "x"}}'):
        if text is not None:
            (folder / RESULTS_FILE).write_text(text)
        stated = Stated(folder)
        assert stated.of("export") == {seals["export"]}
        assert stated.of("ort/fp32") == {seals["ort/fp32"]}
        assert stated.of("bench/ort") == set()
    report(folder, onnx=A)
    assert Stated(folder).of("export") == set()


@pytest.mark.parametrize(
    "values", [{"seals": 3}, {"seals": {"onnx": 3}}, {"seals": [1]}, {"other": {}}]
)
def test_a_report_that_states_nonsense_states_nothing(tmp_path: Path, values: object) -> None:
    assert isinstance(values, dict)
    (tmp_path / RESULTS_FILE).write_text(sealed({"format": 3, **values}))
    assert Stated(tmp_path).of("onnx") == set()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"made_since": {"onnx": ["' + B + '"]}}',
        sealed({"made_since": 3}),
        sealed({"made_since": {"onnx": B}}),
        sealed({"made_since": {"onnx": True}}),
        sealed({"other": {"onnx": [B]}}),
    ],
)
def test_announcements_that_were_damaged_count_for_nothing(tmp_path: Path, text: str) -> None:
    report(tmp_path, onnx=A)
    (tmp_path / UNREPORTED).write_text(text)
    assert not Stated(tmp_path).allows("onnx", B)


def test_what_somebody_else_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / UNREPORTED
    path.write_text("precious")
    assert not is_unreported(path)
    stated = Stated(tmp_path)
    with pytest.raises(ArtifactError, match="in the way"):
        stated.announce("onnx", A)
    stated.is_reported()
    assert path.read_text() == "precious"
    path.unlink()
    os.mkfifo(path)
    assert not is_unreported(path)
    stated.is_reported()
    assert path.exists()


@pytest.mark.parametrize("text", ['["made_since"]', '"made_since"', "3", '{"mine": 1}'])
def test_json_of_somebody_else_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / UNREPORTED
    path.write_text(text)
    stated = Stated(tmp_path)
    with pytest.raises(ArtifactError, match="in the way"):
        stated.announce("onnx", A)
    stated.is_reported()
    assert path.read_text() == text


def test_announcements_are_known_as_ours(tmp_path: Path) -> None:
    Stated(tmp_path).announce("onnx", A)
    path = tmp_path / UNREPORTED
    assert is_unreported(path)
    assert json.loads(path.read_text())["made_since"] == {"onnx": [A]}


def test_two_processes_of_a_run_announce_beside_each_other(tmp_path: Path) -> None:
    one, other = Stated(tmp_path), Stated(tmp_path)
    assert one.made_since == other.made_since == {}
    one.announce("a", "1" * 64)
    other.announce("b", "2" * 64)
    one.announce("c", "3" * 64)
    assert set(Stated(tmp_path).made_since) == {"a", "b", "c"}
