from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import plain, seals
from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_regular
from pipeline.core.replacing import TEMPORARY_PREFIX
from pipeline.report import pages, write
from pipeline.report.model import Run, read_values
from pipeline.steps import stated
from pipeline.steps.folders import RESULTS_FILE
from tests.pipeline.report.making import STEPS, configured, ended, fill


def test_results_and_both_reports_are_written(tmp_path: Path) -> None:
    config = configured(tmp_path)
    fill(config)
    run = write.write(config, tmp_path / "pipeline.yaml", ended(*STEPS))
    assert Run.read(config.folder / RESULTS_FILE) == run
    assert (config.folder / "report.md").read_text().startswith("# care_tiny\n")
    assert "</html>\n" in (config.folder / "report.html").read_text()
    assert not list(config.folder.glob(f"{TEMPORARY_PREFIX}*"))


def test_results_that_say_the_same_keep_their_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path)
    fill(config)
    monkeypatch.setattr("time.strftime", lambda form: "2026-01-02 03:04")
    first = write.write(config, tmp_path / "pipeline.yaml", ended(*STEPS))
    monkeypatch.setattr("time.strftime", lambda form: "2026-01-02 03:05")
    again = write.write(config, tmp_path / "pipeline.yaml", ended(*STEPS))
    assert (first.date, again) == ("2026-01-02 03:04", first)
    assert Run.read(config.folder / RESULTS_FILE) == first
    other = write.write(config, tmp_path / "pipeline.yaml", ended(*STEPS[:-1]))
    assert other.date == "2026-01-02 03:05"
    assert Run.read(config.folder / RESULTS_FILE) == other


def test_results_that_say_the_same_are_neither_put_into_words_nor_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path)
    fill(config)
    write.write(config, tmp_path / "pipeline.yaml", ended("export"))
    file = config.folder / RESULTS_FILE
    before, inode = file.read_bytes(), file.stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(write, "sealed", None)
        write.write(config, tmp_path / "pipeline.yaml", ended("export"))
    assert (file.read_bytes(), file.stat().st_ino) == (before, inode)
    # Numbers that Python calls equal are not what was written, nor is another order.
    values, _ = seals.unsealed(before, RESULTS_FILE)
    for other in ({**values, "exit_code": False}, dict(reversed(values.items()))):
        file.write_text(seals.sealed(other))
        write.write(config, tmp_path / "pipeline.yaml", ended("export"))
        assert file.read_bytes() == before


def test_results_that_stay_are_unsealed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, unsealed = configured(tmp_path), []
    write.write(config, tmp_path / "pipeline.yaml", ended("export"))
    own = seals.unsealed

    def counted(data: bytes, where: str) -> Any:
        unsealed.append(where)
        return own(data, where)

    monkeypatch.setattr(stated, "unsealed", counted)
    stated.unsealed_results.cache_clear()
    path = config.folder / RESULTS_FILE
    assert stated.Stated(config.folder).reported == read_values(path)["seals"]
    assert unsealed == [str(path)]
    path.write_bytes(path.read_bytes().replace(b"care_tiny", b"care_huge", 1))
    with pytest.raises(ArtifactError, match="has changed since it was written"):
        read_values(path)
    assert stated.Stated(config.folder).reported == {}


def test_a_report_that_fails_leaves_no_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path)
    write.write(config, tmp_path / "pipeline.yaml", ended())
    before = (config.folder / "report.html").read_bytes()

    def fail(run: Run) -> str:
        raise ZeroDivisionError

    monkeypatch.setitem(pages.PAGES, "report.html", fail)
    with pytest.raises(ZeroDivisionError):
        write.write(config, tmp_path / "pipeline.yaml", ended("export"))
    assert (config.folder / "report.html").read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"format": 3}'])
def test_what_is_no_report_is_told_apart(tmp_path: Path, text: str) -> None:
    path = tmp_path / RESULTS_FILE
    path.write_text(text)
    assert not write.is_results_file(path)
    path.unlink()
    os.mkfifo(path)
    assert not write.is_results_file(path)


def test_whose_a_report_is_takes_one_look_at_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, looks = configured(tmp_path), []
    write.write(config, tmp_path / "pipeline.yaml", ended("export"))

    def look(path: Path, most: int) -> bytes:
        looks.append(path)
        return read_regular(path, most)

    monkeypatch.setattr(write, "read_regular", look)
    write.refuse_foreign(config.folder)
    assert looks == [config.folder / RESULTS_FILE]


def test_results_that_stay_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, parsed = configured(tmp_path), []
    write.write(config, tmp_path / "pipeline.yaml", ended("export"))
    own = plain.parse_json

    def counted(data: bytes, where: str) -> Any:
        parsed.append(where)
        return own(data, where)

    monkeypatch.setattr(write, "parse_json", counted)
    write._are_results.cache_clear()
    for _ in range(2):
        write.refuse_foreign(config.folder)
    assert len(parsed) == 1
    (config.folder / RESULTS_FILE).write_text('{"of": "somebody else"}')
    for _ in range(2):
        with pytest.raises(ArtifactError, match=RESULTS_FILE):
            write.refuse_foreign(config.folder)


def test_a_page_without_results_beside_it_is_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("a thesis")
    with pytest.raises(ArtifactError, match=r"report\.md"):
        write.refuse_foreign(tmp_path)
