"""Measurements from devices: what a file says, and the Swift package that writes it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ArtifactError, DataError, InputError
from pipeline.exports.coreml_bench import write_bench_package
from pipeline.targets.coreai.package import MODEL, digest
from pipeline.targets.coreai.results import FORMAT, Measurements, read_measurements

from .conftest import Build, needs_coreai

RUN = {
    "compute_unit": "default",
    "load_ms": [30.0, 20.0, 25.0],
    "first_ms": 3.0,
    "predict_ms": [1.0, 1.5, 1.25],
    "difference_to_cpu_only": 0.001,
    "thermal_before": "nominal",
    "thermal_after": "fair",
}


def plain(model_digest: str = "0" * 64, **changes: Any) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "source": "coreai-bench, array input",
        "measured_at": "2026-11-23T10:00:00Z",
        "model": {"name": "tiny coreai/fp16", "digest": model_digest},
        "device": {"model": "iPhone18,1", "os": "iOS 27.0.0"},
        "runs": [RUN],
        **changes,
    }


def write(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@needs_coreai
def test_a_result_finds_its_artifact(build: Build, tmp_path: Path) -> None:
    artifacts = {"fp32": build("fp32"), "fp16": build()}
    file = write(tmp_path / "a.json", plain(digest(build().folder / MODEL)))
    found = read_measurements(file, artifacts, "iphone")
    assert list(found) == ["fp16"]
    measured = found["fp16"]
    assert measured.latency.value == 1.25
    assert "iPhone18,1" in measured.latency.by
    assert measured.line == "coreai/fp16: 1.250 ms on iPhone18,1 (default)"
    (row,) = measured.tables["on_devices"]
    assert row["logits"] == "as by the CPU"
    assert row["load_ms"] == 25.0
    # What is kept is read back.
    assert read_measurements(write(tmp_path / "b.json", measured.content), artifacts, None)
    with pytest.raises(DataError, match="of class iphone, where mac"):
        read_measurements(file, artifacts, "mac")


GOLDEN = {"images": 16, "same_class": 16, "error": 0.002, "mean_error": 0.001, "holds": True}


@needs_coreai
@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "16 of 16 alike, error 0.002"),
        ({"holds": False, "error": 0.04, "same_class": 15}, "FAILS: 15 of 16 alike, error 0.04"),
        ({"holds": False, "error": None, "mean_error": None}, "FAILS: 16 of 16 alike, not finite"),
    ],
)
def test_a_unit_that_fails_the_golden_images_is_named(
    build: Build, tmp_path: Path, changes: dict[str, Any], verdict: str
) -> None:
    golden = {**GOLDEN, **changes}
    runs = [RUN, {**RUN, "compute_unit": "gpu", "golden": golden}]
    values = plain(digest(build().folder / MODEL), runs=runs)
    found = read_measurements(write(tmp_path / "a.json", values), {"fp16": build()}, None)["fp16"]
    said = "by gpu it does not give what was built for the golden images" in found.line
    assert said == (not golden["holds"])
    assert [row["golden"] for row in found.tables["on_devices"]] == [None, verdict]


@needs_coreai
@pytest.mark.parametrize("difference", [0.2, 0.039, None])
def test_wrong_logits_are_said(build: Build, tmp_path: Path, difference: float | None) -> None:
    wrong = {**RUN, "compute_unit": "neural_engine", "difference_to_cpu_only": difference}
    values = plain(digest(build().folder / MODEL), runs=[RUN, wrong])
    found = read_measurements(write(tmp_path / "a.json", values), {"fp16": build()}, None)
    assert "its logits are wrong by neural_engine: do not ship" in found["fp16"].line
    assert [row["logits"] for row in found["fp16"].tables["on_devices"]] == [
        "as by the CPU",
        "wrong",
    ]


@needs_coreai
@pytest.mark.parametrize("model", ["\x1b[2J", "a\nb", "\u202e"])
def test_a_terminal_does_not_obey_the_name_of_a_device(
    build: Build, tmp_path: Path, model: str
) -> None:
    values = plain(digest(build().folder / MODEL), device={"model": model, "os": "iOS 27.0.0"})
    found = read_measurements(write(tmp_path / "a.json", values), {"fp16": build()}, None)
    assert found["fp16"].line.isprintable()


@needs_coreai
def test_a_result_of_another_model(build: Build, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", plain())
    with pytest.raises(ArtifactError, match="is of another model"):
        read_measurements(file, {"fp16": build()}, None)
    with pytest.raises(InputError, match="no Core AI artifact is built"):
        read_measurements(file, {}, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no result file"),
        (plain(format="care-deploy/coreml-bench/1"), "is no result file"),
        (plain(runs=[]), "runs"),
        (plain(runs=[{**RUN, "predict_ms": [-1.0]}]), r"runs\.0\.predict_ms\.0"),
        (plain(runs=[{**RUN, "compute_unit": "quantum"}]), r"runs\.0\.compute_unit"),
        (plain(other=1), "other"),
        (plain(runs=[{**RUN, "golden": {**GOLDEN, "same_class": 17}}]), r"17 of 16 images"),
        (plain(runs=[{**RUN, "golden": {**GOLDEN, "error": None}}]), "not finite do not hold"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_measurements(write(tmp_path / "a.json", values), {}, None)


@needs_coreai
def test_swift_package(build: Build, tmp_path: Path) -> None:
    folder = write_bench_package(build(), tmp_path / "bench", samples=64)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    resources = "Sources/CoreAIBench/Resources"
    assert {
        *("Package.swift", "README.md", "Sources/CoreAIBench/Benchmark.swift"),
        "Sources/CoreAIBench/GoldenKit.swift",
        *("Sources/coreai-bench/main.swift", "Tests/CoreAIBenchTests/BenchmarkTests.swift"),
        f"{resources}/model.aimodel/main.mlirb",
    } <= files
    facts = json.loads((folder / resources / "bench.json").read_text())
    assert facts["digest"] == digest(folder / resources / MODEL)
    assert facts["shape"] == [1, 3, 16, 16]
    assert facts["samples"] == 64
    for file in folder.rglob("*.swift"):
        assert "CoreML" not in file.read_text()
        assert "coreml" not in file.read_text()
    assert "has not been compiled" in (folder / "README.md").read_text()


def test_swift_writes_the_fields_that_are_read() -> None:
    """Swift's encoder turns its camel case into the schema's snake case."""
    import pipeline.exports

    templates = Path(pipeline.exports.__path__[0], "templates")
    source = (templates / "CoreAIMeasurements.swift.txt").read_text()
    names = set(re.findall(r"public let (\w+)[:\s]", source))
    snake = {re.sub("([A-Z])", lambda found: f"_{found[1].lower()}", name) for name in names}
    schema = Measurements.model_json_schema()
    known = set(schema["properties"])
    for part in ("Run", "Model", "Device", "Golden"):
        known |= set(schema["$defs"][part]["properties"])
    assert snake == known
    assert f'format = "{FORMAT}"' in source
    benchmark = (templates / "CoreAIBenchmark.swift.txt").read_text()
    units = set(re.findall(r'\("(\w+)", (?:\.|Spec)', benchmark))
    assert units == set(schema["$defs"]["Run"]["properties"]["compute_unit"]["enum"])
