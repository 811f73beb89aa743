"""Runs a module of ours in a process of its own, for what a process can do once, or alone."""

from __future__ import annotations

import os
import subprocess
import sys

from pipeline.core.errors import BuildError, UnavailableError
from pipeline.steps.keys import PROJECT


def run_worker(module: str, *arguments: str) -> None:
    """Run `main` of a module of ours in a process of its own, with these arguments.

    Raises:
        UnavailableError: It says that something is missing here.
        BuildError: It failed otherwise.
    """
    code = (
        "import importlib, sys\n"
        "from pipeline.core.errors import PipelineError\n"
        "try:\n"
        f"    importlib.import_module({module!r}).main(sys.argv[1:])\n"
        "except PipelineError as error:\n"
        "    print(error, file=sys.stderr)\n"
        "    sys.exit(error.exit_code)\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == UnavailableError.exit_code:
        raise UnavailableError(_last_line(done.stderr))
    if done.returncode:
        raise BuildError(f"{module} failed: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2] or "it ended without a word"
