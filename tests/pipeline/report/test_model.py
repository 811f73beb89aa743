from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.figures import State
from pipeline.core.seals import sealed
from pipeline.report.model import EARLIER, NOT_SELECTED, GateFailure, Run
from tests.pipeline.report.changed import artifact_of


@pytest.fixture
def written(run: Run, tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    path.write_text(sealed(run.to_dict()))
    return path


def edit(path: Path, change: Callable[[Any], object]) -> None:
    values = json.loads(path.read_text())
    del values["seal"]
    change(values)
    path.write_text(sealed(values))


def test_what_is_written_is_read_back(run: Run, written: Path) -> None:
    assert Run.read(written) == run


def test_numbers_that_are_not_finite_are_read_back(written: Path) -> None:
    edit(written, lambda v: v["artifacts"][0]["accuracy"]["cosine"].update(value=float("nan")))
    cosine = Run.read(written).artifacts[0].accuracy.cosine
    assert cosine is not None
    assert cosine.value != cosine.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("choice"), "choice: Field required"),
        (lambda v: v.update(exit_code="0"), "exit_code: Input should be a valid integer"),
        (lambda v: v.update(extra=1), "extra: Unexpected keyword argument"),
        (lambda v: v["artifacts"][1].pop("target"), "artifacts.1.target: Field required"),
        (
            lambda v: v["artifacts"][0]["accuracy"]["top1"].update(state="guessed"),
            "artifacts.0.accuracy.top1.state: Input should be 'measured'",
        ),
        (
            lambda v: v["artifacts"][0]["accuracy"]["top1"].pop("by"),
            "artifacts.0.accuracy.top1: Value error, a number that was emulated says by what",
        ),
        (
            lambda v: v["bench"]["ort"]["facts"]["measured"]["end_to_end"].pop("batch"),
            "bench.ort.facts.measured.end_to_end.batch: Field required",
        ),
        (
            lambda v: v["bench"]["ort"]["facts"]["measured"]["batches"].update(many={}),
            "bench.ort.facts.measured.batches.many.",
        ),
    ],
)
def test_what_is_wrong_is_named(
    written: Path, change: Callable[[Any], object], message: str
) -> None:
    edit(written, change)
    with pytest.raises(ArtifactError) as error:
        Run.read(written)
    assert str(error.value).startswith(f"{written}: {message}")
    assert str(error.value).endswith("run python -m pipeline run again")


@pytest.mark.parametrize("found", [1, 2, None])
def test_another_format_is_refused_with_a_word(written: Path, found: int | None) -> None:
    edit(written, lambda v: v.update(format=found))
    with pytest.raises(ArtifactError, match=f"has format {found}, this version reads 3: run"):
        Run.read(written)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match="run python -m pipeline run again"):
        Run.read(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"results\.json is missing: run python -m"):
        Run.read(tmp_path / "results.json")
    (tmp_path / "results.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)
    with pytest.raises(ArtifactError, match=r"is damaged: it is nested .*: run python -m"):
        Run.read(tmp_path / "results.json")


def test_where_an_artifact_stands(run: Run) -> None:
    mixed = artifact_of(run, "coreml/mixed")
    assert (mixed.standing, replace(mixed, selected=False).standing) == ("", NOT_SELECTED)
    fp16 = artifact_of(run, "coreml/fp16")
    assert fp16.built is not None
    assert (fp16.standing, replace(fp16, selected=False).standing) == ("", "")
    assert replace(fp16, built=replace(fp16.built, earlier=True)).standing == EARLIER


def test_a_gate_that_does_not_hold_in_words() -> None:
    failure = GateFailure("ort", "int8", "top-1 drop", "max_top1_drop", 0.005, 0.2, State.MEASURED)
    assert failure.words == "top-1 drop is 0.2, max_top1_drop allows 0.005 (measured)"
    assert str(failure) == f"ort/int8: {failure.words}"
