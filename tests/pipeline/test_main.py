"""How `python -m pipeline` ends: at once, and with all that Python does before."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CALL = "from pipeline.__main__ import main; main()"

ALL = """
import atexit, sys, threading, time, types

def run():
    def late():
        time.sleep(0.2)
        print("a thread's last words")
    atexit.register(print, "at the end")
    threading.Thread(target=late).start()
    sys.exit(STATUS)

class Told:
    def __del__(self):
        print("taken apart")

cli = types.ModuleType("pipeline.cli")
cli.main, cli.told = run, Told()
sys.modules["pipeline.cli"] = cli
"""
"""A command line with all that may be left at the end: a thread, a function, an object."""


def ended(status: str, around: str = "{}", **settings: Any) -> subprocess.CompletedProcess[str]:
    """What a process leaves behind whose command line ends with a status."""
    program = ALL.replace("STATUS", status) + around.format(CALL)
    settings = {"capture_output": True, "text": True, "timeout": 60, "check": False, **settings}
    return subprocess.run([sys.executable, "-c", program], **settings)


@pytest.mark.parametrize("status", [0, 3])
def test_threads_and_functions_end_first_and_nothing_is_taken_apart(status: int) -> None:
    result = ended(str(status))
    assert result.returncode == status
    assert result.stdout.splitlines() == ["a thread's last words", "at the end"]
    assert result.stderr == ""


def test_a_status_that_is_a_text_is_left_to_python() -> None:
    result = ended("'what went wrong'")
    assert (result.returncode, result.stderr) == (1, "what went wrong\n")


def test_a_profiler_goes_on_after_it() -> None:
    watched = "sys.setprofile(lambda *event: None)\ntry:\n    {}\nfinally:\n    print('profile')"
    result = ended("0", watched)
    assert result.returncode == 0
    assert "profile" in result.stdout.splitlines()


def test_an_interrupt_waits_for_no_thread() -> None:
    result = ended("130")
    assert (result.returncode, result.stdout) == (130, "at the end\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_no_success() -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        result = ended("0", env=buffered, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode != 0
    assert "No space left" in result.stderr


def test_a_process_without_streams_ends_as_it_should() -> None:
    result = ended("5", "print = repr\nsys.stdout = sys.stderr = None\n{}")
    assert result.returncode == 5
