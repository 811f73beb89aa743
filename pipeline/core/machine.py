"""What machine this is: its CPU, how much of it this process may use, and how busy it is.

The host's core count says nothing in a container: a pod with two cores' worth of quota on a machine
with 64 cores would start 64 threads and be throttled for most of the time. Threads come from the
CPU affinity and the container's quota.

psutil reads /proc when it is imported, so that it is imported only where it is asked.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core import cpu_classes
from pipeline.core.errors import InputError
from pipeline.core.plain import Facts

UNIFIED = "0"
"""Hierarchy number of cgroup v2 in /proc/self/cgroup."""

INSTRUCTIONS = frozenset(
    (
        *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl"),
        *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
        *("asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
    )
)
"""Extensions of x86 and Arm, as Linux names them, that the kernels of the runtimes choose by."""

_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@dataclass(frozen=True)
class Machine(Facts):
    """A machine, as reports speak of it.

    Attributes:
        cpu: Model of the CPU.
        cpus_granted: Threads that this process may run at once.
        os: System and version.
        more: Whatever else `describe` could read.
    """

    cpu: str
    cpus_granted: int
    os: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def here(cls) -> Machine:
        """This machine."""
        return cls.from_facts(describe(), "this machine")


@functools.cache
def cpu_name() -> str:
    """Model of the CPU."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_as_seen() -> str:
    """Model of the CPU, and of which class a runtime takes it to be in a restricted process."""
    restriction = cpu_classes.restriction()
    if restriction is None:
        return cpu_name()
    if emulated := ", ".join(sorted(cpu_classes.emulated())):
        how = "imitating" if cpu_classes.emulated(cpu_classes.Purpose.TIMES) else "emulating"
        return f"{cpu_name()} as {restriction.title}, {how} {emulated}"
    return f"{cpu_name()}, restricted to {restriction.title}"


@functools.cache
def instructions() -> tuple[str, ...]:
    """Extensions of the CPU's instruction set that matter, sorted; none where it does not tell."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ()
    stated = (line for line in lines if line.startswith(("flags", "Features")))
    return tuple(sorted(INSTRUCTIONS & set(next(stated, "").split())))


def visible_instructions() -> tuple[str, ...]:
    """Those of `instructions` that a runtime sees in this process."""
    restriction = cpu_classes.restriction()
    hidden = restriction.hidden if restriction else frozenset()
    return tuple(sorted((set(instructions()) - hidden) | cpu_classes.emulated()))


BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})
"""Extensions of x86 that multiply in bfloat16: one of them is enough."""


def why_no_bfloat16() -> str | None:
    """Why a runtime finds no products in bfloat16 here; None if it finds some."""
    if BFLOAT16 & set(visible_instructions()):
        return None
    return f"this CPU has no {' and no '.join(sorted(BFLOAT16))}"


def kernels() -> str:
    """The class of CPUs whose kernels a runtime takes here, for people; "" where it is none."""
    found = cpu_classes.class_of(visible_instructions())
    return found.title if found else ""


def cpu_class() -> dict[str, Any]:
    """What machines have in common of which one's measurement holds for the other."""
    return {
        "cpu": cpu_name(),
        "instructions": " ".join(visible_instructions()),
        "cpus_granted": granted(),
    }


def describe() -> dict[str, Any]:
    """The machine, as far as it can be read; what cannot be read is left out."""
    import psutil

    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cpus_granted": granted(),
        "cpus_of_host": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    if _GOVERNOR.is_file():
        facts["governor"] = _GOVERNOR.read_text().strip()
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    if frequency and frequency.current:
        facts["cpu_mhz"] = round(frequency.current)
    return facts


MOST_BUSY = 0.5
"""Share of the granted CPUs that other processes may keep busy while something is measured."""


def busy_with_others(load: float, cpus: int) -> str:
    """Why a measurement decides nothing, if others took too much meanwhile; "" if they did not.

    Args:
        load: CPUs that other processes kept busy.
        cpus: CPUs that this process may use.
    """
    if load <= MOST_BUSY * cpus:
        return ""
    return f"other processes kept {load:.1f} of {cpus} CPUs busy"


def load(seconds: float = 0.5) -> float:
    """CPUs that others keep busy while this process waits: they disturb a measurement."""
    import psutil

    return psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1)


class Watch:
    """Knows how much of the CPUs others take from its making on: what `load` cannot see.

    This process and those that it started are no others.
    """

    def __init__(self) -> None:
        self._start, self._before = time.monotonic(), _taken_by_others()

    def others(self) -> float:
        """CPUs that others kept busy since, on average; what a host gave away counts as well."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        return max(0.0, (_taken_by_others() - self._before) / seconds)


_WAITING = ("idle", "iowait", "guest", "guest_nice")
"""Fields of `psutil.cpu_times` in which a CPU is not busy, or that are part of others."""


def _taken_by_others() -> float:
    """Seconds of all CPUs since the machine's start that went to other processes."""
    import psutil

    times = psutil.cpu_times()._asdict()
    busy = sum(times.values()) - sum(times.get(name, 0.0) for name in _WAITING)
    here = psutil.Process()
    own = 0.0
    for process in (here, *here.children(recursive=True)):
        try:
            # With those of children that ended.
            own += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return float(busy - own)


def peak_memory(proc: Path = Path("/proc/self")) -> int | None:
    """The most memory that this process had at once, in bytes; None where the system does not tell.

    Linux tells of this program alone; `getrusage` would begin with what started it.

    Args:
        proc: The process's folder under /proc; elsewhere than on Linux there is none.
    """
    try:
        lines = (proc / "status").read_text().splitlines()
    except OSError:
        return _peak_elsewhere()
    stated = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(next(stated, "0")) or None


def _peak_elsewhere() -> int | None:
    """The same by psutil on Windows, and by the C library on a Mac."""
    import psutil

    on_windows = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if on_windows is not None:
        return int(on_windows)
    if platform.system() != "Darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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


def resolve_threads(asked: int | None) -> int:
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


def memory(proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of memory that this process may use; infinite where the system does not tell.

    Args:
        proc: The process's folder under /proc; elsewhere than on Linux there is none.
        cgroups: Where the cgroup file systems are mounted.
    """
    try:
        installed = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        installed = math.inf
    return min(installed, _limit(proc, cgroups, "memory", _memory_v2, _memory_v1))


def _quota(proc: Path, cgroups: Path) -> float:
    """CPUs' worth of time that the cgroups of this process grant; infinite without a limit."""
    return _limit(proc, cgroups, "cpu", _quota_v2, _quota_v1)


def _limit(
    proc: Path,
    cgroups: Path,
    controller: str,
    read_v2: Callable[[Path], float],
    read_v1: Callable[[Path], float],
) -> float:
    """The smallest limit of a controller over this process's cgroups; infinite without one."""
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
                limit = min(limit, *(read_v2(f) for f in _up(root, group)))
        elif controller in controllers.split(","):
            for root in (cgroups / controller, cgroups / controllers):
                limit = min(limit, *(read_v1(f) for f in _up(root, group)))
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


def _memory_v2(folder: Path) -> float:
    """`memory.max` holds "max" or a number of bytes."""
    return _bytes(folder / "memory.max")


def _memory_v1(folder: Path) -> float:
    """`memory.limit_in_bytes` is nearly 2^63 without a limit."""
    return _bytes(folder / "memory.limit_in_bytes")


def _bytes(file: Path) -> float:
    try:
        return float(int(file.read_text()))
    except (OSError, ValueError):
        return math.inf
