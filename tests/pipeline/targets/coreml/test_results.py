from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.core.errors import ArtifactError, DataError, InputError
from pipeline.core.figures import State
from pipeline.exports.coreml_bench import write_bench_package
from pipeline.steps.artifact import Artifact
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml import results
from pipeline.targets.coreml.measured import described
from pipeline.targets.coreml.results import (
    FORMAT,
    Measurements,
    check,
    json_schema,
    numbers,
    placement,
    read,
)

Build = Callable[..., Artifact]


def plain(digest: str = "0" * 64, **changes: Any) -> dict[str, Any]:
    run = {
        "compute_units": "cpu_and_neural_engine",
        "load_ms": [120.0, 40.0, 41.0],
        "first_ms": 3.0,
        "predict_ms": [1.0 + 0.01 * (i % 7) for i in range(700)],
        "thermal_before": "nominal",
        "thermal_after": "fair",
    }
    return {
        "format": FORMAT,
        "source": "coreml-bench, image input",
        "measured_at": "2026-11-23T10:00:00Z",
        "model": {"name": "tiny coreml/fp16", "digest": digest},
        "device": {"model": "iPhone16,1", "os": "iOS 18.2"},
        "runs": [run],
        **changes,
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def make(content: Any) -> Path:
        path = tmp_path / "result.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return make


def test_result_of_a_phone(write: Callable[[Any], Path], tmp_path: Path) -> None:
    found = read(write(plain()))
    assert found.device.kind == "iphone"
    by_units = numbers(found)["cpu_and_neural_engine"]
    assert by_units["predict"].value == pytest.approx(1.03)
    assert by_units["predict"].state is State.MEASURED
    assert by_units["predict"].samples == 700
    assert "iPhone16,1" in by_units["predict"].by
    assert "fair after" in by_units["predict"].why
    assert by_units["load"].value == 41.0
    assert by_units["first"].value == 3.0
    found.write(tmp_path / "copy.json")
    assert read(tmp_path / "copy.json") == found


def test_medians_that_somebody_read_off(write: Callable[[Any], Path]) -> None:
    runs = [{"compute_units": "all", "median_ms": 1.5}]
    found = read(write(plain(runs=runs, source="Xcode performance report")))
    by_units = numbers(found)["all"]
    assert by_units["predict"].value == 1.5
    assert by_units["predict"].samples is None
    assert by_units["load"].state is State.NOT_MEASURED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no JSON"),
        ("[]", "no result file"),
        (plain(format="other"), "no result file"),
        (plain(runs=[]), "runs"),
        (plain(runs=[{"compute_units": "all"}]), "either predict_ms or median_ms"),
        (plain(runs=[{"compute_units": "tpu", "median_ms": 1}]), "runs.0.compute_units"),
        (plain(runs=[{"compute_units": "all", "median_ms": -1}]), "runs.0.median_ms"),
        (plain(model={"name": "x", "digest": "abc"}), "model.digest"),
        (plain(device={"model": "iPhone16,1"}), "device.os"),
        (plain(extra=1), "extra"),
    ],
)
def test_what_is_no_result(write: Callable[[Any], Path], content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(content))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist: give a result file"):
        read(tmp_path / "none.json")


def test_files_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="/dev/zero is a device or a pipe, not a file: give"):
        read(Path("/dev/zero"))
    (tmp_path / "deep.json").write_text(100_000 * '{"a":')
    with pytest.raises(DataError, match=r"deep\.json is nested deeper"):
        read(tmp_path / "deep.json")
    monkeypatch.setattr(results, "MOST_BYTES", 1000)
    (tmp_path / "large.json").write_text(1001 * " ")
    with pytest.raises(DataError, match=r"large\.json is larger than 0\.001 MB"):
        read(tmp_path / "large.json")


def test_result_of_another_model_or_device(build: Build) -> None:
    built = build()
    package = built.folder / "model.mlpackage"
    mine = Measurements.model_validate(plain(saved.digest(package)))
    check(mine, built, package)
    check(mine, built, package, "iphone")
    with pytest.raises(DataError, match="a device of class iphone, where mac"):
        check(mine, built, package, "mac")
    with pytest.raises(ArtifactError, match="of another model"):
        check(Measurements.model_validate(plain()), built, package)


@pytest.mark.parametrize(
    ("model", "kind"),
    [("iPad14,3", "ipad"), ("Mac14,7", "mac"), ("MacBookPro18,3", "mac"), ("iphone", "iphone")],
)
def test_device_classes(model: str, kind: str) -> None:
    found = Measurements.model_validate(plain(device={"model": model, "os": "x"}))
    assert found.device.kind == kind


def test_placement_says_what_falls_back() -> None:
    operations = [
        {"name": "a", "operator": "ios16.conv", "device": "neural_engine", "cost": 0.75},
        {"name": "b", "operator": "ios16.gelu", "device": "cpu", "cost": 0.25},
    ]
    runs = [{"compute_units": "all", "median_ms": 1.0, "operations": operations}]
    found = placement(Measurements.model_validate(plain(runs=runs)).runs[0])
    assert found["share_on_neural_engine"] == 0.5
    assert found["cost_on_neural_engine"] == 0.75
    assert found["elsewhere"] == ["b (ios16.gelu): cpu"]
    assert placement(Measurements.model_validate(plain()).runs[0]) == {}


GOLDEN = {"images": 16, "same_class": 15, "error": 0.3, "mean_error": 0.2, "holds": False}


@pytest.mark.parametrize("model", ["\x1b[2J", "a\nb", "\u202e"])
def test_a_terminal_does_not_obey_the_name_of_a_device(model: str) -> None:
    values = plain(device={"model": model, "os": "iOS 18.2"})
    assert described("fp16", Measurements.model_validate(values)).line.isprintable()


def test_a_result_tells_whether_the_device_gives_what_was_built() -> None:
    """A phone that was fast and wrong was shown as fast."""
    runs = [
        {"compute_units": "all", "predict_ms": [1.0], "golden": GOLDEN},
        {"compute_units": "cpu_only", "predict_ms": [2.0], "golden": {**GOLDEN, "holds": True}},
        {"compute_units": "cpu_and_gpu", "predict_ms": [2.0]},
    ]
    found = described("fp16", Measurements.model_validate(plain(runs=runs)))
    assert "by all it does not give what was built" in found.line
    assert [row["golden"] for row in found.tables["on_devices"]] == [
        "FAILS: 15 of 16 alike, error 0.3",
        "15 of 16 alike, error 0.3",
        None,
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"same_class": 17}, "17 of 16"),
        ({"error": None, "holds": True}, "not finite"),
        ({"error": -0.1}, "greater than or equal to 0"),
    ],
)
def test_an_impossible_verdict_is_refused(values: dict[str, Any], message: str) -> None:
    runs = [{"compute_units": "all", "predict_ms": [1.0], "golden": {**GOLDEN, **values}}]
    with pytest.raises(ValidationError, match=message):
        Measurements.model_validate(plain(runs=runs))


def test_schema_is_published() -> None:
    schema = json_schema()
    assert schema["properties"]["format"]["const"] == FORMAT
    assert "predict_ms" in schema["$defs"]["Run"]["properties"]


def test_swift_package(build: Build, tmp_path: Path) -> None:
    folder = write_bench_package(build(), tmp_path / "bench", samples=64)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert "Package.swift" in files
    assert "Sources/CoreMLBench/Benchmark.swift" in files
    assert "Sources/coreml-bench/main.swift" in files
    resources = folder / "Sources/CoreMLBench/Resources"
    facts = json.loads((resources / "bench.json").read_text())
    assert facts["digest"] == saved.digest(resources / "model.mlpackage")
    assert facts["samples"] == 64
    assert "has not been compiled" in (folder / "README.md").read_text()
    with pytest.raises(InputError, match="not empty"):
        write_bench_package(build(), folder)


def test_a_target_without_a_swift_package_is_refused(build: Build, tmp_path: Path) -> None:
    other = dataclasses.replace(build(), name="ort/fp32")
    told = r"no Swift package measures ort/fp32: give --target coreml or coreai"
    with pytest.raises(InputError, match=told):
        write_bench_package(other, tmp_path / "bench")
    assert not (tmp_path / "bench").exists()


def test_no_link_in_a_package_is_followed(build: Build, tmp_path: Path) -> None:
    """What lay behind a linked folder was packed for others."""
    artifact = build()
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "letter.txt").write_text("secret")
    model = artifact.folder / saved.MODEL
    (model / "Data/more").symlink_to(tmp_path / "private")
    with pytest.raises(ArtifactError, match="more does not belong to this artifact: it is a link"):
        write_bench_package(artifact, tmp_path / "bench")
    (model / "Data/more").unlink()
    (model / "Data/empty").mkdir()
    with pytest.raises(ArtifactError, match="empty does not belong"):
        write_bench_package(artifact, tmp_path / "bench")
    (model / "Data/empty").rmdir()
    assert not (tmp_path / "bench").exists()


def test_swift_writes_the_fields_that_are_read(build: Build, tmp_path: Path) -> None:
    """Swift's encoder turns its camel case into the schema's snake case."""
    import re

    folder = write_bench_package(build(), tmp_path / "bench")
    source = (folder / "Sources/CoreMLBench/Measurements.swift").read_text()
    names = set(re.findall(r"public let (\w+)[:\s]", source))
    snake = {re.sub("([A-Z])", lambda found: f"_{found[1].lower()}", name) for name in names}
    schema = json_schema()
    known = set(schema["properties"])
    for part in ("Run", "Model", "Device", "Golden"):
        known |= set(schema["$defs"][part]["properties"])
    assert snake <= known
    assert {"format", "measured_at", "model", "device", "runs", "predict_ms"} <= snake
    assert set(schema["$defs"]["Golden"]["properties"]) <= snake
    units = set(
        re.findall(r'\("(\w+)", \.', (folder / "Sources/CoreMLBench/Benchmark.swift").read_text())
    )
    assert units == set(schema["$defs"]["Run"]["properties"]["compute_units"]["enum"])
