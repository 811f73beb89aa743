from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configuration
from pipeline.commands import run
from pipeline.commands import sweep as command
from pipeline.core.errors import ArtifactError, ConfigError
from pipeline.report import sweep, write
from pipeline.report.model import Run
from tests.pipeline.report.making import configured, ended, fill


def row(target: str, top1: float | None, ms: float | None, size: int, failure: str = "") -> Any:
    return {
        "target": target,
        "top1": top1,
        "latency_ms": ms,
        "bytes": size,
        "failure": failure,
    }


def front(rows: list[Any], cost: str) -> list[int]:
    return [number for number, each in enumerate(rows) if sweep.on_front(each, rows, cost)]


def test_the_front_is_what_no_other_beats() -> None:
    rows = [
        row("ort", 0.80, 2.0, 20),
        row("ort", 0.80, 3.0, 20),  # as accurate, slower
        row("ort", 0.70, 1.0, 30),  # worse, and the fastest
        row("ort", 0.75, 2.5, 10),  # worse and slower, and the smallest
        row("ort", 0.90, None, 40),  # not measured
        row("ort", None, 0.1, 1),  # not judged
        row("ort", 0.99, 0.1, 1, "broken"),
        row("ort", 0.80, 2.0, 20),  # the same again
    ]
    assert front(rows, "latency_ms") == [0, 2, 7]
    assert front(rows, "bytes") == [0, 1, 3, 4, 7]


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        config = configured(tmp_path / name)
        fill(config)
        found.append(write.write(config, Path("pipeline.yaml"), ended()))
    return found


def test_a_table_of_runs(runs: list[Run]) -> None:
    rows = sweep.rows_of(runs)
    count = len(runs[0].artifacts)
    assert len(rows) == 2 * count
    for each, artifact in zip(rows, runs[0].artifacts, strict=False):
        assert each["artifact"] == artifact.name
        assert each["top1"] == artifact.accuracy.top1.value
        assert each["latency_ms"] == artifact.latency.value
        # The same figures twice: none beats its double.
        assert each["best_for_bytes"] == rows[rows.index(each) + count]["best_for_bytes"]
    assert any(each["best_for_bytes"] for each in rows)
    assert json.loads(sweep.as_json(rows))["rows"] == rows
    read = list(csv.DictReader(io.StringIO(sweep.as_csv(rows))))
    assert [each["artifact"] for each in read] == [each["artifact"] for each in rows]
    text = sweep.as_text(rows)
    for each in rows:
        assert each["artifact"] in text


def test_a_sweep_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("configurations: [a.yaml, sub/b.yaml]\noutput: there\n")
    assert command.read(path) == (
        [tmp_path / "a.yaml", tmp_path / "sub/b.yaml"],
        Path("there"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("configurations: []", "name a list"),
        ("configurations: a.yaml", "name a list"),
        ("configurations: [1]", "name a list"),
        ("output: x", "name a list"),
        ("configuration: [a]", "did you mean configurations"),
        ("configurations: [a.yaml]\noutput: 5", "name a folder"),
    ],
)
def test_a_wrong_sweep_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        command.read(path)


CONFIG = """
name: {name}
output: {output}
model: {{name: care_tiny, checkpoint: embedded}}
data: {{validation: fashion-mnist, calibration: fashion-mnist}}
targets: {{ort: {{precisions: [fp32]}}}}
"""


def test_a_sweep_runs_all_and_writes_its_table(
    tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweep.yaml").write_text(
        f"configurations: [a.yaml, b.yaml]\noutput: {tmp_path / 'out'}\n"
    )
    for name, done in zip("ab", runs, strict=True):
        place = Path(done.folder)
        text = CONFIG.format(name=place.name, output=place.parent)
        (tmp_path / f"{name}.yaml").write_text(text)
    codes = iter([0, 3])
    monkeypatch.setattr(run, "run", lambda *given, **named: next(codes))
    text, code = command.run_all(tmp_path / "sweep.yaml", look="quiet", jobs=1)
    assert code == 3
    assert "sweep.csv" in text
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
    assert len(rows) == sum(len(done.artifacts) for done in runs)
    # A second sweep replaces its own files, and nobody else's.
    codes = iter([0, 0, 0, 0])
    command.run_all(tmp_path / "sweep.yaml", look="quiet", jobs=1)
    (tmp_path / "out" / "sweep.json").write_text("[]")
    with pytest.raises(ArtifactError, match="in the way"):
        command.run_all(tmp_path / "sweep.yaml", look="quiet", jobs=1)


def test_two_configurations_with_one_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("configurations: [a.yaml, b.yaml]")
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(CONFIG.format(name="same", output=tmp_path))
    with pytest.raises(ConfigError, match="both write"):
        command.run_all(tmp_path / "sweep.yaml", look="quiet", jobs=1)


def test_the_sweep_of_this_project(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CARE_ENGINES", "CHECKPOINT", "IMAGENET"):
        monkeypatch.delenv(name, raising=False)
    files, output = command.read(Path(__file__).parents[3] / "configs" / "sweep_care.yaml")
    assert output == Path("engines/sweep_care")
    names = [configuration.load(file).model.name for file in files]
    assert names == ["care_s0", "care_s1", "care_s2", "mlla_t"]
