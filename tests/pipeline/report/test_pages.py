from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.seals import sealed
from pipeline.report import pages, write
from pipeline.report.model import Run
from tests.pipeline.report.making import STEPS, configured, ended, fill


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Run, str]:
    config = configured(tmp_path)
    fill(config)
    run = write.write(config, tmp_path / "pipeline.yaml", ended(*STEPS))
    return config.folder, run, sealed(run.to_dict())


def made(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Which file every page is, and what it says: what is written anew is another file."""
    files = [folder / name for name in pages.PAGES]
    return {file.name: (file.stat().st_ino, file.read_bytes()) for file in files}


def test_what_would_say_the_same_is_not_made_again(written: tuple[Path, Run, str]) -> None:
    folder, run, results = written
    before = made(folder)
    pages.write_pages(folder, run, results)
    assert made(folder) == before


def test_other_results_make_other_pages(written: tuple[Path, Run, str]) -> None:
    folder, run, _ = written
    pages.write_pages(folder, replace(run, name="another"), "other results")
    assert (folder / "report.md").read_text().startswith("# another\n")
    assert "another" in (folder / "report.html").read_text()


@pytest.mark.parametrize("name", sorted(pages.PAGES))
@pytest.mark.parametrize("damage", ["gone", "cut", "edited", "added", "empty"])
def test_a_page_that_is_not_as_it_was_made_is_made_again(
    written: tuple[Path, Run, str], name: str, damage: str
) -> None:
    folder, run, results = written
    path = folder / name
    before = path.read_bytes()
    changed = {
        "cut": before[:-1],
        "edited": before.replace(b"care_tiny", b"care_teny"),
        "added": before + b"\n",
        "empty": b"",
    }
    path.unlink()
    if damage in changed:
        path.write_bytes(changed[damage])
    pages.write_pages(folder, run, results)
    assert path.read_bytes() == before


def test_a_link_to_a_page_is_none(written: tuple[Path, Run, str]) -> None:
    folder, run, results = written
    path = folder / "report.html"
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    with pytest.raises(ArtifactError, match="is in the way"):
        pages.write_pages(folder, run, results)


def test_other_code_makes_the_pages_again(
    written: tuple[Path, Run, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run, results = written
    monkeypatch.setitem(pages.PAGES, "report.md", lambda run: "another text\n")
    pages.write_pages(folder, run, results)
    assert "another text" not in (folder / "report.md").read_text(), (
        "the same code, as far as known"
    )
    monkeypatch.setattr(pages, "_code", lambda: "changed")
    pages.write_pages(folder, run, results)
    assert (folder / "report.md").read_text().startswith("another text\n")


@pytest.mark.parametrize("file", ["report/markdown.py", "core/words.py", "report/templates/a.css"])
def test_every_source_and_template_counts_as_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    changed = tmp_path / "pipeline" / file
    changed.parent.mkdir(parents=True)
    changed.write_text("x")
    monkeypatch.setattr(pages, "PROJECT", tmp_path)
    pages._code.cache_clear()
    try:
        before = pages._code()
        os.utime(changed, ns=(1, 1))
        pages._code.cache_clear()
        assert pages._code() != before
    finally:
        pages._code.cache_clear()
