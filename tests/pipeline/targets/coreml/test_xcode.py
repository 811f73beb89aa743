from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import DataError
from pipeline.emulate.mil.program import read_program
from pipeline.steps.artifact import Artifact
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml import xcode
from pipeline.targets.coreml.results import check, numbers, placement

Build = Callable[..., Artifact]


def structure(package: Path, device: str = "neuralEngine") -> dict[str, Any]:
    """The structure of a package, as reports hold it: constants and operation sets included."""
    operations = [
        {
            "operatorName": op.type if op.type == "const" else f"ios16.{op.type}",
            "outputs": [{"name": name} for name, _ in op.outputs],
            "deviceUsage": {"preferred": {"deviceType": {device: {}}}},
            "cost": {"weight": 0.125},
        }
        for op in read_program(package).operations
    ]
    return {"program": {"_0": {"functions": {"main": {"block": {"operations": operations}}}}}}


def plain(package: Path) -> dict[str, Any]:
    return {
        "computeUnit": 3,
        "deviceInfo": {
            "modelName": "iPhone 16",
            "osNameAndVersionWithoutBuildNumber": "iOS 26.3.1",
            "serialNumber": "SECRET",
            "displayName": "Ada's phone",
        },
        "modelMetadata": {"fileName": "model", "size": 1},
        "deviceResults": {
            "compile": {"samples": [0.1]},
            "load": {"samples": [0.25, 0.02, 0.03]},
            "predict": {"samples": [0.001, 0.003, 0.002], "numOperations": 7},
            "modelStructure": structure(package),
        },
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def make(content: Any) -> Path:
        folder = tmp_path / "tiny.mlperf"
        folder.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "report.json").write_text(text)
        return folder

    return make


def test_a_report_becomes_a_result(build: Build, write: Callable[[Any], Path]) -> None:
    artifact = build()
    package = artifact.folder / "model.mlpackage"
    file = write(plain(package))
    assert xcode.is_report(file)
    report = xcode.read(file)
    assert xcode.fits(report, package)
    found = xcode.measurements(report, file, artifact, package)
    assert found.model.digest == saved.digest(package)
    assert (found.device.model, found.device.kind) == ("iPhone 16", "iphone")
    assert found.device.os == "iOS 26.3.1"
    by_units = numbers(found)["cpu_and_neural_engine"]
    assert by_units["predict"].value == pytest.approx(2)
    assert by_units["load"].value == pytest.approx(30)
    assert "operations, not its weights" in by_units["predict"].by
    assert placement(found.runs[0])["share_on_neural_engine"] == 1
    assert found.runs[0].operations[0].cost == 0.125
    # Who owns the phone is nobody's business.
    assert "SECRET" not in found.model_dump_json()
    assert "Ada" not in found.model_dump_json()
    check(found, artifact, package, "iphone")
    with pytest.raises(DataError, match="where ipad was asked for"):
        check(found, artifact, package, "ipad")


def test_a_report_of_another_model_does_not_fit(build: Build, write: Callable[[Any], Path]) -> None:
    report = xcode.read(write(plain(build().folder / "model.mlpackage")))
    assert not xcode.fits(report, build("int8").folder / "model.mlpackage")


def test_operations_without_a_device_claim_nothing(
    build: Build, write: Callable[[Any], Path]
) -> None:
    artifact = build()
    package = artifact.folder / "model.mlpackage"
    content = plain(package)
    content["deviceResults"]["modelStructure"] = structure(package, device="quantumEngine")
    file = write(content)
    found = xcode.measurements(xcode.read(file), file, artifact, package)
    assert found.runs[0].operations == ()


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def to(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("deviceResults"), "deviceResults: Field required"),
        (without("deviceInfo", "modelName"), r"deviceInfo\.modelName: Field required"),
        (to(9, "computeUnit"), "computeUnit: Input should be less than 4"),
        (to([], "deviceResults", "predict", "samples"), "at least 1 item"),
        (to([-1.0], "deviceResults", "predict", "samples"), "greater than 0"),
        (to(["1"], "deviceResults", "load", "samples"), "not known here"),
    ],
)
def test_what_departs_from_the_known_form_is_refused(
    build: Build,
    write: Callable[[Any], Path],
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    content = plain(build().folder / "model.mlpackage")
    change(content)
    with pytest.raises(DataError, match=message) as caught:
        xcode.read(write(content))
    assert "median_ms" in str(caught.value)


def test_a_report_without_an_ml_program(build: Build, write: Callable[[Any], Path]) -> None:
    package = build().folder / "model.mlpackage"
    content = plain(package)
    content["deviceResults"]["modelStructure"] = {"neuralNetwork": {}}
    with pytest.raises(DataError, match="no structure of an ML Program"):
        xcode.fits(xcode.read(write(content)), package)


def test_files_that_are_none(write: Callable[[Any], Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"report\.json is no JSON"):
        xcode.read(write("bplist00"))
    (tmp_path / "empty.mlperf").mkdir()
    with pytest.raises(DataError, match=r"give the \.mlperf folder"):
        xcode.read(tmp_path / "empty.mlperf")


ODD: tuple[Any, ...] = (None, 5, "x", [], {}, [5], [[]], [None], {"name": 5}, [{"name": None}])


@pytest.mark.parametrize("key", ["operatorName", "outputs", "deviceUsage", "cost", None])
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_operations_of_other_forms_are_refused_or_claim_nothing(
    build: Build, write: Callable[[Any], Path], key: str | None, value: Any
) -> None:
    artifact = build()
    package = artifact.folder / "model.mlpackage"
    content = plain(package)
    main = content["deviceResults"]["modelStructure"]["program"]["_0"]["functions"]["main"]
    operations = main["block"]["operations"]
    if key is None:
        operations[-1] = value
    else:
        operations[-1][key] = value
    file = write(content)
    report = xcode.read(file)
    if key is None:
        with pytest.raises(DataError, match="no structure of an ML Program"):
            xcode.fits(report, package)
        return
    found = xcode.measurements(report, file, artifact, package)
    assert xcode.fits(report, package) == (key in ("deviceUsage", "cost"))
    assert key != "cost" or found.runs[0].operations[-1].cost is None


def test_nested_reports_are_refused(write: Callable[[Any], Path]) -> None:
    with pytest.raises(DataError, match=r"report\.json is nested deeper than 64 levels"):
        xcode.read(write('{"a":' * 5000 + "1" + "}" * 5000))
