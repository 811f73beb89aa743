"""What libraries print and warn of is in the log, and nothing of it is on the screen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.steps.log import HEADER, Log, is_log

ROOT = Path(__file__).parents[3]

CHATTER = """\
import logging, os, subprocess, sys, warnings
from pathlib import Path
from pipeline.steps.log import Log

log = Log(Path(sys.argv[1]))
print("before")
with log.captured() as screen:
    warnings.warn("a library's warning")
    warnings.warn("to be left out", DeprecationWarning)
    logging.getLogger("library").warning("a library's logger")
    print("a library's print")
    os.write(1, b"from below Python, 1\\n")
    os.write(2, b"from below Python, 2\\n")
    subprocess.run(["echo", "from a child"])
    screen.write("progress\\n")
log.close()
print("after")
print("error after", file=sys.stderr)
"""


@pytest.mark.parametrize("filters", ["default", "ignore", "error"])
def test_chatter_is_in_the_log_and_not_on_the_screen(filters: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", filters, "-c", CHATTER, str(tmp_path / "run.log")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout == "before\nafter\n"
    assert done.stderr == "progress\nerror after\n"
    text = (tmp_path / "run.log").read_text()
    assert text.startswith(f"{HEADER}\n")
    for said in (
        *("a library's warning", "a library's logger", "a library's print"),
        *("from below Python, 1", "from below Python, 2", "from a child"),
    ):
        assert said in text
    assert "progress" not in text


def test_lines_have_a_time_and_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.log"
    for line in ("one\n", "two"):
        log = Log(path)
        log(line)
        log.close()
    lines = path.read_text().splitlines()
    assert lines[0] == HEADER
    assert [line[8:] for line in lines[1:]] == [" one", " two"]
    assert all(line[2] == line[5] == ":" for line in lines[1:])


def test_somebodys_file_is_no_log_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.write_text("my notes")
    assert not is_log(path)
    with pytest.raises(ArtifactError, match="is no log of ours"):
        Log(path)
    assert path.read_text() == "my notes"
    path.write_text("12:00:01 an earlier version began so\n")
    assert is_log(path)


def test_a_full_disk_loses_lines_and_ends_nothing() -> None:
    log = Log.__new__(Log)
    with Path("/dev/full").open("w", buffering=1) as stream:
        log.stream = stream
        log._write("lost\n")
        log.close()


def test_every_line_goes_elsewhere_as_well(tmp_path: Path) -> None:
    log, told = Log(tmp_path / "run.log"), list[str]()
    log("before")
    log.also = told.append
    log("a line\n")
    log.close()
    assert told == ["a line"]
    assert (tmp_path / "run.log").read_text().count("a line") == 1
