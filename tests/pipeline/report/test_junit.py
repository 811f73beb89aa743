"""A run as CI reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.report.junit import Case, is_junit, run_as_junit, suite
from pipeline.report.model import GateReport, Run
from tests.pipeline.report.making import Partial


def cases(text: str) -> dict[tuple[str, str], ElementTree.Element]:
    root = ElementTree.fromstring(text)
    return {(case.attrib["classname"], case.attrib["name"]): case for case in root}


def failure(case: ElementTree.Element) -> str:
    found = case.find("failure")
    return "" if found is None else found.attrib["message"]


def test_steps_and_gates_are_cases(run: Run) -> None:
    text = run_as_junit(run)
    found = cases(text)
    assert "coremltools refuses" in failure(found["build", "coreml/mixed"])
    assert failure(found["build", "ort/fp32"]) == ""
    skipped = found["validate", "validate/coreml-mixed"].find("skipped")
    assert skipped is not None
    assert skipped.attrib["message"] == "coreml/mixed failed"
    assert failure(found["gates", "ort/int8"]).startswith("agreement is 0.945, min_agreement")
    assert failure(found["gates", "ort/fp32"]) == ""
    assert found["gates", "coreml/mixed"].find("skipped") is not None
    root = ElementTree.fromstring(text).attrib
    assert root["failures"] == "3"
    assert int(root["tests"]) == len(run.steps) + len(run.artifacts)


def test_without_gates_there_are_none(run: Run) -> None:
    found = cases(run_as_junit(replace(run, gates=GateReport())))
    assert ("build", "ort/fp32") in found
    assert "gates" not in {group for group, _ in found}


def test_gates_of_what_was_not_built_are_skipped(partial: Partial) -> None:
    found = cases(run_as_junit(partial("export", there=False)))
    assert found["gates", "ort/fp32"].find("skipped") is not None


def test_a_file_is_known_as_ours(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(run_as_junit(run))
    assert is_junit(path)
    path.write_text("<testsuite name='precious'/>")
    assert not is_junit(path)


@pytest.mark.parametrize("text", ["<&>\"'", "a\x1b[2Jb", "\ud800"])
def test_text_stays_text(text: str) -> None:
    (case,) = ElementTree.fromstring(suite("s", [Case("g", text, failure=text)]))
    assert "\x1b" not in case.attrib["name"]
    assert failure(case) == case.attrib["name"]
