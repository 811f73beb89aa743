"""Which artifact leaves the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.machine import Machine
from pipeline.exports.built import built
from pipeline.report.model import FORMAT, RESULTS_FILE, Choice, GateReport, Run
from pipeline.steps import artifact


@pytest.fixture
def output(tmp_path: Path) -> Path:
    for precision in ("fp32", "int8"):

        def build(folder: Path) -> dict[str, str]:
            (folder / "model.onnx").write_bytes(b"model")
            return {}

        artifact.make(
            tmp_path / "net" / "ort" / precision,
            kind="build",
            name=f"ort/{precision}",
            key="0" * 64,
            made_from={},
            tools={},
            build=build,
        )
    return tmp_path


def choose(output: Path, **choice: Choice) -> Path:
    """Leave a results.json that says which precision to use."""
    run = Run(
        format=FORMAT,
        name="net",
        config="pipeline.yaml",
        folder=str(output / "net"),
        date="",
        exit_code=0,
        steps=(),
        not_selected=(),
        gates=GateReport(),
        problems=(),
        machine=Machine("CPU", 2),
        versions={},
        export=None,
        simplified=None,
        forms={},
        calibration=None,
        reference=None,
        artifacts=(),
        bench={},
        choice=choice,
        published=(),
    )
    path = output / "net" / RESULTS_FILE
    path.write_text(json.dumps(run.to_dict()))
    return path


def test_the_one_that_the_report_says_to_use(output: Path) -> None:
    choose(output, ort=Choice("int8"))
    assert built(output, "net", "ort", None).name == "ort/int8"
    assert built(output, "net", "ort", "fp32").name == "ort/fp32"


def test_the_first_where_there_was_no_run(output: Path) -> None:
    assert built(output, "net", "ort", None).name == "ort/fp32"


@pytest.mark.parametrize("choice", [{}, {"ort": Choice(None)}, {"ort": Choice("fp8")}])
def test_the_first_where_nothing_useful_is_said(output: Path, choice: dict[str, Choice]) -> None:
    choose(output, **choice)
    assert built(output, "net", "ort", None).name == "ort/fp32"


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1, "choice": {"ort": {}}}'])
def test_what_the_last_run_said_is_not_passed_over(output: Path, text: str) -> None:
    path = choose(output)
    path.write_text(text)
    with pytest.raises(ArtifactError, match="or name the precision with --precision"):
        built(output, "net", "ort", None)
    assert built(output, "net", "ort", "fp32").name == "ort/fp32"


def test_damage_is_noticed(output: Path) -> None:
    (output / "net/ort/fp32/model.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="has changed"):
        built(output, "net", "ort", "fp32")


def test_what_is_not_there_is_refused_with_what_is(output: Path) -> None:
    with pytest.raises(InputError, match="built are: fp32, int8"):
        built(output, "net", "ort", "fp64")
    with pytest.raises(InputError, match="built are: none"):
        built(output, "net", "trt", None)
