"""How many threads this process may use: CPU affinity and the container's quota.

The host's core count says nothing in a container: a pod with two cores' worth of quota on a machine
with 64 cores would start 64 threads and be throttled for most of the time.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from pipeline.errors import InputError

UNIFIED = "0"
"""Hierarchy number of cgroup v2 in /proc/self/cgroup."""


def granted(proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Threads that this process may run at once, at least 1.

    Args:
        proc: The process's folder under /proc; elsewhere than on Linux there is none.
        cgroups: Where the cgroup file systems are mounted.
    """
    affinity = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, math.floor(min(affinity, _quota(proc, cgroups))))


def resolve(asked: int | None) -> int:
    """Threads to use when `asked` are asked for; None asks for all that are granted.

    Raises:
        InputError: More are asked for than this process may use.
    """
    limit = granted()
    if asked is None:
        return limit
    if not 1 <= asked <= limit:
        raise InputError(
            f"{asked} threads are asked for, this process may use 1 to {limit} (CPU affinity and "
            f"cgroup quota): ask for at most {limit} or grant more CPUs"
        )
    return asked


def _quota(proc: Path, cgroups: Path) -> float:
    """CPUs' worth of time that the cgroups of this process grant; infinite without a limit."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    limit = math.inf
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number == UNIFIED:
            # In a hybrid layout version 2 lies in "unified".
            for root in (cgroups, cgroups / "unified"):
                limit = min(limit, *(_quota_v2(f) for f in _up(root, group)))
        elif "cpu" in controllers.split(","):
            for root in (cgroups / "cpu", cgroups / controllers):
                limit = min(limit, *(_quota_v1(f) for f in _up(root, group)))
    return limit


def _up(root: Path, group: str) -> list[Path]:
    """The folders of a cgroup and its parents: each may set a limit.

    Inside a container the group's path is often the host's, of which only the root is mounted.
    """
    parts = [part for part in group.split("/") if part not in ("", "..")]
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _quota_v2(folder: Path) -> float:
    """`cpu.max` holds "max 100000" or "200000 100000": quota and period in microseconds."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return math.inf
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float:
    """`cpu.cfs_quota_us` is -1 without a limit."""
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf
