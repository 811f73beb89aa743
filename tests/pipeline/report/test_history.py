"""What earlier runs came to is kept, is bounded, and can be compared with."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image

import pipeline
from pipeline.cli import main
from pipeline.core.errors import ArtifactError
from pipeline.report import history
from pipeline.report.answers import read_answers
from pipeline.report.compare import compare
from pipeline.report.model import Run

SmallGraph = Callable[..., onnx.ModelProto]

CLASSES = ("ant", "bee", "cat", "dog")

SETTINGS: dict[str, Any] = {
    "name": "mine",
    "model": {"onnx": "model.onnx"},
    "data": {"validation": "folder:photos"},
    "preprocess": {"size": 8, "crop": 1.0, "mean": [0.5] * 3, "std": [0.25] * 3},
    "export": {"simplify": False},  # takes a process
    "bench": {"samples": 3, "warmup": 1},
    "targets": {"ort": {"precisions": ["fp32"]}},
}

MINE = Path("engines/mine")


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory, lay_graph_project: Callable[[Path], Path]
) -> Path:
    """A run of a graph of four classes that is done; not to be changed."""
    folder = lay_graph_project(tmp_path_factory.mktemp("done"))
    with contextlib.chdir(folder):
        run()
    return folder


@pytest.fixture
def project(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; the working directory."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run() -> None:
    pipeline.run(SETTINGS, only=("export", "simplify", "precision", "build", "validate"))


def favour(name: str) -> None:
    """Another network: one that says one class more often."""
    model = onnx.load("model.onnx")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    values = numpy_helper.to_array(bias).copy()
    values[CLASSES.index(name)] += 100
    bias.CopyFrom(numpy_helper.from_array(values, "head.bias"))
    onnx.save(model, "model.onnx")


def test_a_run_that_changes_something_adds_an_entry_and_another_does_not(project: Path) -> None:
    (first,) = history.entries(MINE)
    assert Run.read(first / "results.json").seals == Run.read(MINE / "results.json").seals
    kept = read_answers(first / "answers.npz")
    assert kept.classes == CLASSES
    assert kept.right.tolist() == [number for number in range(4) for _ in range(3)]
    assert set(kept.given) == {"ort/fp32"}
    run()
    assert history.entries(MINE) == [first]
    favour("cat")
    run()
    assert history.entries(MINE)[0] == first
    assert len(history.entries(MINE)) == 2


def test_results_are_compared_with_an_entry_image_by_image(project: Path) -> None:
    before = read_answers(history.entries(MINE)[0] / "answers.npz")
    favour("cat")
    run()
    (pair,) = compare(history.previous(MINE), MINE).pairs
    after = np.full(12, 2)
    lost = int(((before.given["ort/fp32"] == before.right) & (after != before.right)).sum())
    won = int(((before.given["ort/fp32"] != before.right) & (after == before.right)).sum())
    assert pair.why_not == ""
    assert pair.drop == pytest.approx((lost - won) / 12)
    assert {each.after for each in pair.changed} == {"cat"}
    assert [each.before for each in pair.changed] == [
        CLASSES[i] for i in before.given["ort/fp32"] if i != 2
    ]
    (back,) = compare(MINE, history.previous(MINE)).pairs
    assert back.drop == pytest.approx((won - lost) / 12)
    (between,) = compare(*history.entries(MINE)).pairs
    assert between.drop == pair.drop


def test_the_command_takes_an_entry_and_the_previous_one(project: Path) -> None:
    result = CliRunner().invoke(main, ["compare", str(MINE), "--baseline", "previous"])
    assert result.exit_code == 2
    assert "holds no earlier results" in " ".join(result.output.split())
    favour("cat")
    run()
    (first, _) = history.entries(MINE)
    by_name, by_entry = (
        CliRunner().invoke(main, ["compare", str(MINE), "--baseline", baseline])
        for baseline in ("previous", str(first))
    )
    assert by_name.exit_code in (0, 1), by_name.output
    assert "ort/fp32" in by_name.output
    assert by_name.output == by_entry.output


def test_the_oldest_entries_go_and_what_is_somebody_elses_stays(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MOST", 2)
    folder = MINE / "history"
    (first,) = history.entries(MINE)
    foreign = folder / "20000101-000000"
    foreign.mkdir()
    (foreign / "results.json").write_text("{}")
    (foreign / "notes.txt").write_text("mine")
    for name in ("ant", "bee", "cat"):
        favour(name)
        run()
    assert len(history.entries(MINE)) == 2
    assert not first.exists()
    assert (foreign / "notes.txt").read_text() == "mine"


def test_entries_stay_in_order_when_a_clock_is_set_back(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = history.entries(MINE)
    monkeypatch.setattr(time, "strftime", lambda form, *when: "20000101-000000")
    for name in ("ant", "bee"):
        favour(name)
        run()
    names = [entry.name for entry in history.entries(MINE)]
    assert names == [first.name, f"{first.name}-002", f"{first.name}-003"]


def test_a_file_in_the_historys_place_is_refused_and_stays(project: Path) -> None:
    shutil.rmtree(MINE / "history")
    (MINE / "history").write_text("mine")
    with pytest.raises(ArtifactError, match="history is in the way: results keep their history"):
        run()
    assert (MINE / "history").read_text() == "mine"


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off", None])
def test_damaged_answers_are_told_and_nothing_is_judged(
    project: Path, damage: bytes | None
) -> None:
    (first,) = history.entries(MINE)
    if damage is None:
        (first / "answers.npz").unlink()
    else:
        (first / "answers.npz").write_bytes(damage)
    (pair,) = compare(first, MINE).pairs
    assert pair.verdict == "cannot be told"
    assert "compare with another entry" in pair.why_not


def test_other_images_are_not_compared(project: Path) -> None:
    Image.new("RGB", (8, 8)).save("photos/ant/0.png")
    run()
    (pair,) = compare(history.previous(MINE), MINE).pairs
    assert pair.why_not == ("the two runs judged other images: give both the same validation set")
