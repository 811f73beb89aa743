"""Builds an engine in a process of its own, in which as little as possible moves memory addresses.

TensorRT-RTX orders the values of its shape computations by where they lie in memory: with random
addresses, two builds of one graph with a dynamic batch differ in some thousand bytes. The process
has fixed addresses and imports the standard library and TensorRT-RTX alone: what other packages
read of the machine when they are imported moves memory too. It also keeps a crash of the library
apart.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import BuildError, UnavailableError
from pipeline.core.plain import parse_json
from pipeline.targets.tensorrt import api, builder
from pipeline.targets.tensorrt.build import EngineJob, facts_of, refusal

STDIN = "/dev/stdin"

INTERNAL_FAULT = "internal fault of TensorRT-RTX"
"""How the message begins where the process died, or the library noticed a fault of its own."""

PART_SECONDS = 300.0
"""After how long building a part of a network counts as failed: whole networks take less."""

_ANSWERS = ("fixed_addresses", "log", "facts", "refused", "unavailable")

_SIGNALS = {int(known): known.name for known in signal.Signals}
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")

# -S: no site-packages, whose .pth files may import anything. -P: nothing from where it is started.
# Compiled modules are neither written (-B) nor read, since compiling one takes other memory than
# reading it: whether it was compiled before must not matter.
_OPTIONS = ("-P", "-S", "-B", "-X", f"pycache_prefix={os.devnull}")

# Only a program that is started after personality(2) has fixed addresses. This one does nothing
# else, and so takes a tenth of the time of starting the builder twice.
# How a shell started this one, in front or behind, is the same to it: Python reserves memory for
# signals that it handles.
_LAUNCHER = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
ADDR_NO_RANDOMIZE = 0x0040000
libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
hasattr(libc, "prctl") and libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
fixed = hasattr(libc, "personality") and libc.personality(ADDR_NO_RANDOMIZE) != -1
print('{"fixed_addresses": %s}' % str(fixed).lower(), flush=True)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def build_apart(job: EngineJob, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Do as `build_engine` does with TensorRT-RTX, in a process of its own.

    Raises:
        BuildError: The parser or the builder refuses the graph, or the process crashed.
        UnavailableError: TensorRT-RTX is not installed or does not load.
    """
    content = job.read()
    try:
        run = _run(job, folder)
    except subprocess.TimeoutExpired as error:
        raise BuildError(
            f"{INTERNAL_FAULT} {api.installed(api.RTX)}: no end after {error.timeout:g} s of "
            f"building from {job.graph}; {builder.REPORT}"
        ) from error
    fixed = False
    for line in run.stdout.splitlines():
        kind, answer = _parse(line)
        if kind == "fixed_addresses":
            fixed = answer
        elif kind == "facts":
            # Container profiles may forbid personality(2): the report then says so.
            known = facts_of(api.RTX, job, content, answer, folder)
            return {**known, "fixed_addresses": fixed}
        elif kind == "refused":
            message = answer["message"].replace(STDIN, str(job.graph))
            raise refusal(message, operator=answer["operator"])
        elif kind == "unavailable":
            raise api.does_not_load(api.RTX, answer)
        else:
            log(answer)
    raise BuildError(_fault(run.returncode, run.stderr.strip().splitlines(), job.graph))


def _run(job: EngineJob, folder: Path) -> subprocess.CompletedProcess[str]:
    # What is passed lies in memory too. So that it is the same wherever the files lie, the program
    # comes as text and the graph as standard input, the folder is the working directory, and
    # little else is passed on.
    environment = {"PYTHONHASHSEED": "0"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    python = str(Path(sys.executable).resolve())
    source = Path(builder.__file__).read_text()
    command = [python, "-I", "-S", "-c", _LAUNCHER, *_OPTIONS, "-c", source]
    keywords = json.dumps({**job.keywords(), "graph": STDIN})
    with job.graph.open("rb") as graph:
        return subprocess.run(
            [*command, _packages(), keywords],
            stdin=graph,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=folder,
            env=environment,
            timeout=PART_SECONDS if job.part else None,
            check=False,
        )


def _packages() -> str:
    """Folder in which TensorRT-RTX is installed."""
    spec = importlib.util.find_spec(api.RTX)
    if spec is None or spec.origin is None:
        raise UnavailableError(f"{api.RTX} is not installed: {api.INSTALL[api.RTX]}")
    return str(Path(spec.origin).parents[1])


def _parse(line: str) -> tuple[str, Any]:
    """An answer of the process; whatever the library prints by itself is for the log."""
    try:
        ((kind, answer),) = parse_json(line, "an answer", BuildError).items()
    except (AttributeError, ValueError, BuildError):
        return ("log", line)
    return (kind, answer) if kind in _ANSWERS else ("log", line)


def _fault(code: int, said: Sequence[str], graph: Path) -> str:
    """In words, why the process ended without an answer."""
    how = _SIGNALS.get(-code, f"signal {-code}") if code < 0 else f"exit code {code}"
    if how in _FROM_OUTSIDE:
        return (
            f"building from {graph} was ended from outside ({how}), as the system does where "
            "memory runs out: free some and run again"
        )
    return (
        f"{INTERNAL_FAULT} {api.installed(api.RTX)}: {how} while it built from "
        f"{graph} ({said[-1] if said else 'no message'}); {builder.REPORT}"
    )
