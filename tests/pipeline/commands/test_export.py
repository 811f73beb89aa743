"""Which artifact leaves the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.core.errors import InputError
from pipeline.exports.built import built
from pipeline.report.results import RESULTS_FILE
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


def choose(output: Path, text: str) -> None:
    (output / "net" / RESULTS_FILE).write_text(text)


def test_the_one_that_the_report_says_to_use(output: Path) -> None:
    choose(output, json.dumps({"choice": {"ort": {"precision": "int8", "why": {}}}}))
    assert built(output, "net", "ort", None).name == "ort/int8"
    assert built(output, "net", "ort", "fp32").name == "ort/fp32"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        json.dumps({"choice": {"ort": {"precision": None, "why": {}}}}),
        json.dumps({"choice": {"ort": {"precision": "fp8", "why": {}}}}),
    ],
)
def test_the_first_where_nothing_useful_is_said(output: Path, text: str) -> None:
    choose(output, text)
    assert built(output, "net", "ort", None).name == "ort/fp32"


def test_what_is_not_there_is_refused_with_what_is(output: Path) -> None:
    with pytest.raises(InputError, match="built are: fp32, int8"):
        built(output, "net", "ort", "fp64")
    with pytest.raises(InputError, match="built are: none"):
        built(output, "net", "trt", None)
