"""What `clean` removes, and what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from calibration.kept import MARK
from pipeline.cli import main
from pipeline.core.hashes import HashCache
from pipeline.steps import artifact
from tests.pipeline.report.making import Maker, configured


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results with decoded images, a cache, and a folder that was set aside."""
    config = configured(tmp_path)
    make = Maker(config)
    for name in ("validate/samples", "calibration", "ort/fp32"):
        make.make(name, {"images": 1})
    cache = HashCache(config.folder / ".hashes.sqlite")
    cache.hash(tmp_path / "pipeline.yaml")
    cache.save()
    aside = config.folder / "ort" / "fp32.before-20260102-030405"
    aside.mkdir()
    (aside / "notes.txt").write_text("precious")
    return config.folder


def clean(results: Path, *options: str) -> str:
    arguments = ["clean", results.name, "--output", str(results.parent), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_what_can_be_made_again_goes_and_the_rest_stays(results: Path) -> None:
    output = clean(results)
    assert "validate/samples  (decoded images)" in output
    assert "freed 0.0" in output
    assert not (results / "validate/samples").exists()
    assert not (results / "calibration").exists()
    assert not (results / ".hashes.sqlite").exists()
    assert (results / "ort/fp32/artifact.json").exists()
    assert list(results.glob("ort/fp32.before-*/notes.txt"))
    assert "freed 0.00 MB" in clean(results)


def test_a_dry_run_removes_nothing(results: Path) -> None:
    before = sorted(results.rglob("*"))
    assert "would free 0.0" in clean(results, "--dry-run", "--set-aside")
    assert [path for path in sorted(results.rglob("*")) if path.name != ".lock"] == before


def test_what_was_set_aside_goes_only_where_that_is_asked_for(results: Path) -> None:
    assert "(set aside)" in clean(results, "--set-aside")
    assert not list(results.glob("ort/fp32.before-*"))


def test_what_earlier_runs_came_to_goes_only_where_that_is_asked_for(results: Path) -> None:
    names = [f"20260102-03040{number}" for number in range(3)]
    for name in names:
        (results / "history" / name).mkdir(parents=True)
        (results / "history" / name / "results.json").write_text("{}")
    (results / "history" / names[0] / "notes.txt").write_text("precious")
    clean(results)
    assert len(list((results / "history").iterdir())) == 3
    assert "(history)" in clean(results, "--history", "--dry-run")
    clean(results, "--history")
    left = {path.name for path in (results / "history").iterdir()}
    assert left == {names[0], names[2]}, "one holds a note, one is the newest"


def test_foreign_files_among_the_images_stay(results: Path) -> None:
    (results / "calibration/notes.txt").write_text("precious")
    clean(results)
    assert (results / "calibration/notes.txt").read_text() == "precious"
    assert (results / "calibration/model.bin").exists()


def test_what_a_killed_validation_kept_goes(results: Path) -> None:
    for name in ("validate-ort-fp32", "validate-ort-int8"):
        shard = f".evaluations/{name}/00000"
        artifact.make(
            results / shard,
            kind="validate",
            name=shard,
            key="k",
            made_from={},
            tools={},
            build=lambda folder: {"logits": (folder / "logits.npy").write_text("logits")},
        )
    (results / ".evaluations" / "mine").mkdir()
    (results / ".evaluations" / "mine" / "0.npy").write_text("logits")
    (results / ".evaluations" / "validate-ort-int8" / "notes.txt").write_text("precious")
    assert "of a validation that did not end" in clean(results)
    there = {path.name for path in (results / ".evaluations").rglob("*") if path.is_file()}
    assert not (results / ".evaluations" / "validate-ort-fp32").exists()
    assert (results / ".evaluations" / "mine" / "0.npy").exists()
    assert there == {"notes.txt", "0.npy"}


def test_what_a_killed_search_kept_goes(results: Path) -> None:
    kept, mine = (results / ".evaluations" / name for name in ("ort-int8-0123.jsonl", "my.jsonl"))
    kept.parent.mkdir()
    kept.write_text(f"{MARK}\n{{}}")
    mine.write_text("precious")
    assert "of a search that did not end" in clean(results)
    assert (kept.exists(), mine.read_text()) == (False, "precious")
