"""Tries a changed module: do its tests notice?

Everything happens in a copy of the working tree. Libraries are loaded once; each trial is a fork of
this process, so that it does not wait for them, and is killed with all that it started when its
time is over.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

LOADED = ("numpy", "PIL.Image", "torch", "onnx", "onnxruntime", "pydantic", "pytest", "timm")
"""Libraries that most tests need."""

_MEMORY = 8 * 2**30
"""Bytes that a trial may allocate: a change may ask for much more than it had."""

_PLAIN = (
    *("-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"),
    # Libraries that are loaded bring plugins of pytest with them.
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
)

_OWN = ("pipeline", "care", "calibration", "tests", "conftest")


def load_libraries() -> None:
    """Load what every trial needs, and nothing of this project."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LOADED:
            importlib.import_module(name)
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] in _OWN)
    if loaded:
        raise RuntimeError(f"{loaded[0]} is loaded already: no change of it would be noticed")


def copy_tree(root: Path, folder: Path) -> None:
    """Copy what Git knows of a working tree, and what it would take up, as it lies there."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
    for name in listed.decode().split("\0"):
        source, copied = root / name, folder / name
        if name and source.is_file():
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copied)


class Trials:
    """Runs tests in a copy of the working tree, changed or not.

    Args:
        folder: The copy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def unchanged(self, tests: Sequence[str], limit_s: float) -> tuple[bool, float, str]:
        """Whether tests pass as they are, in how many seconds, and what they printed."""
        return self._run(tests, limit_s, keep_compiled=True)

    def changed(
        self, module: str, source: bytes, tests: Sequence[str], limit_s: float
    ) -> tuple[bool, float]:
        """Whether tests pass with another source of a module, and in how many seconds."""
        file = self.folder / module
        before = file.read_bytes()
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
            compiled.unlink()  # it is told apart by size and second alone
        try:
            file.write_bytes(source)
            passed, seconds, _ = self._run(tests, limit_s, keep_compiled=False)
        finally:
            file.write_bytes(before)
        return passed, seconds

    def _run(
        self, tests: Sequence[str], limit_s: float, *, keep_compiled: bool
    ) -> tuple[bool, float, str]:
        start = time.monotonic()
        scratch = self.folder.with_name("scratch")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        output = scratch.with_name("output")
        child = os.fork()
        if not child:
            _test(self.folder, scratch, output, tests, keep_compiled)
        status = _wait(child, start + limit_s)
        text = output.read_text(errors="replace") if output.is_file() else ""
        return status == 0, time.monotonic() - start, text


def _wait(child: int, deadline: float) -> int:
    """Exit status of a child; kills it and all that it started when the time is over."""
    ended, status = 0, 1
    try:
        while not ended and time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0 if ended else 0.01)
    finally:  # also where this process is told to end
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
        return 1
    return status


def _test(
    folder: Path, scratch: Path, output: Path, tests: Sequence[str], keep_compiled: bool
) -> None:
    """Run tests in the copy, and end."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _redirect(output)
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        os.chdir(folder)
        os.environ.update(PYTHONPATH=str(folder), TMPDIR=str(scratch), PYTHONDONTWRITEBYTECODE="1")
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = not keep_compiled
        import pytest

        scratch_option = f"--basetemp={scratch / 'pytest'}"
        status = int(pytest.main([*_PLAIN, scratch_option, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _redirect(output: Path) -> None:
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    read = os.open(os.devnull, os.O_RDONLY)
    for stream, descriptor in ((0, read), (1, written), (2, written)):
        os.dup2(descriptor, stream)
