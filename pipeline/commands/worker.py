"""`worker`: which command makes this machine a worker of a fleet?"""

from __future__ import annotations

import platform
import shlex
import sys

from pipeline.core.errors import ConfigError
from pipeline.core.words import shown
from pipeline.scheduler.fleet import BENCH
from pipeline.scheduler.places import CPU
from pipeline.targets.registry import TARGETS

OPTIONS = ("--nthreads", "1", "--no-nanny", "--memory-limit", "0", "--no-dashboard")
"""One step at a time, with all threads and all memory of the machine. Dask's nanny limits both;
the number of threads decides how floats are rounded."""

PLACEHOLDER = "tls://SCHEDULER:8786"


def resources() -> tuple[list[str], list[str]]:
    """What a worker on this machine has, and what it lacks of which hardware."""
    has: list[str] = []
    lacks: list[str] = []
    for runtime in TARGETS.values():
        needed = [need for need in runtime.requirements() if need.needed_for == "run"]
        missing = [need.name for need in needed if not need.found]
        if runtime.resource == CPU:
            continue
        if missing:
            lacks.append(f"no {runtime.resource}=1: {', '.join(missing)} is missing")
        else:
            has.append(runtime.resource)
    # A Mac computes other last bits than the machines that build for all: it judges and measures.
    general = [CPU] if sys.platform != "darwin" else []
    return [*general, *dict.fromkeys(has)], list(dict.fromkeys(lacks))


def command(scheduler: str | None, *, bench: bool) -> tuple[str, list[str]]:
    """The command, and remarks on what this machine lacks.

    Args:
        scheduler: The scheduler's address; None for a placeholder.
        bench: Whether to measure here.

    Raises:
        ConfigError: The address is none.
    """
    address = scheduler or PLACEHOLDER
    if not address.startswith(("tcp://", "tls://")):
        raise ConfigError(f"{shown(address)} is no address of a scheduler: write tls://HOST:PORT")
    has, lacks = resources()
    stated = ",".join(f"{name}=1" for name in [*has, *([BENCH] if bench else [])])
    words = ["dask", "worker", address, *OPTIONS, "--name", platform.node() or "worker"]
    return shlex.join([*words, "--resources", stated]), lacks
