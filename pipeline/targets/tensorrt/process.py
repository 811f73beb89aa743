"""Builds an engine in a process of its own, of which memory addresses are not random.

TensorRT-RTX orders the values of its shape computations by where they lie in memory: with random
addresses, two builds of one graph with a dynamic batch differ in some thousand bytes. In a fresh
process without address randomization they are the same. It also keeps a crash of the builder apart.

    python -m pipeline.targets.tensorrt.process JOB < model.onnx

Writes the engine into the working directory and one JSON object a line: {"log": …}, at last
{"facts": …} or {"error": …}.
"""

from __future__ import annotations

import compileall
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core.errors import BuildError, UnsupportedOperatorError
from pipeline.targets.tensorrt import api
from pipeline.targets.tensorrt.build import EngineJob, build_engine

STDIN = "/dev/stdin"

_FIXED = "CARE_FIXED_ADDRESSES"

_ROOT = Path(__file__).parents[3]
_PACKAGES = ("pipeline", "care", "calibration")
"""Where this project lies, and what of it the process may import."""

# Only a program that is started after personality(2) has fixed addresses. This one does nothing
# else, without `site`, and so takes a tenth of the time of starting the builder twice.
# How a shell started this one, in front or behind, is the same to it: Python reserves memory for
# signals that it handles.
_LAUNCHER = f"""
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
ADDR_NO_RANDOMIZE = 0x0040000
libc = ctypes.CDLL(None)
fixed = hasattr(libc, "personality") and libc.personality(ADDR_NO_RANDOMIZE) != -1
os.environ["{_FIXED}"] = "yes" if fixed else "no"
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""

# Without -P the working directory, wherever that is, would be part of the module search path.
_PROGRAM = (sys.executable, "-I", "-S", "-c", _LAUNCHER, "-P", "-m", __spec__.name)


def build_apart(job: EngineJob, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Do as `build_engine` does with TensorRT-RTX, in a process of its own.

    Raises:
        BuildError: The parser or the builder refuses the graph, or the process crashed.
    """
    plain = {**asdict(job), "graph": STDIN, "gpu": None}
    # What is passed lies in memory too. So that it is the same wherever the files lie, the graph
    # comes as standard input, the folder is the working directory, and little else is passed on.
    kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"PYTHONHASHSEED": "0", "PYTHONPATH": str(_ROOT)}
    # Compiling a module takes memory that reading the compiled one does not: the first engine
    # after a change of any module would differ from the next.
    for package in _PACKAGES:
        compileall.compile_dir(_ROOT / package, quiet=2)
    with job.graph.open("rb") as graph:
        run = subprocess.run(
            [*_PROGRAM, json.dumps(plain)],
            stdin=graph,
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            check=False,
        )
    for line in run.stdout.splitlines():
        answer = _parse(line)
        if "facts" in answer:
            facts: dict[str, Any] = answer["facts"]
            return facts
        if "error" in answer:
            kind = UnsupportedOperatorError if answer["error"]["operator"] else BuildError
            raise kind(answer["error"]["message"].replace(STDIN, str(job.graph)))
        log(answer["log"])
    last = run.stderr.strip().splitlines()[-1:] or ["no message"]
    raise BuildError(f"TensorRT-RTX crashed with code {run.returncode}: {last[0]}")


def _parse(line: str) -> dict[str, Any]:
    """An answer of the process; whatever the library prints by itself is for the log."""
    try:
        answer = json.loads(line)
    except ValueError:
        return {"log": line}
    return answer if isinstance(answer, dict) else {"log": line}


def _answer(kind: str, content: Any) -> None:
    print(json.dumps({kind: content}), flush=True)


def _main() -> None:
    plain = json.loads(sys.argv[1])
    least, usual, most = plain["batches"]
    job = EngineJob(
        **{
            **plain,
            "graph": Path(plain["graph"]),
            "capabilities": tuple(plain["capabilities"]),
            "batches": (least, usual, most),
        }
    )
    try:
        library = api.load(api.RTX)
        facts = build_engine(library, job, Path(), lambda line: _answer("log", line))
    except BuildError as error:
        named = isinstance(error, UnsupportedOperatorError)
        _answer("error", {"operator": named, "message": str(error)})
    else:
        # Container profiles may forbid personality(2): the report then says so.
        _answer("facts", {**facts, "fixed_addresses": os.environ.get(_FIXED) == "yes"})


if __name__ == "__main__":
    _main()
