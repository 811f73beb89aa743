"""What machine this is: what a measured number was measured on."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

import psutil

from pipeline.threads import granted

_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@functools.cache
def cpu_name() -> str:
    """Model of the CPU."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe() -> dict[str, Any]:
    """The machine, as far as it can be read; what cannot be read is left out."""
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


def identity() -> dict[str, Any]:
    """What of the machine decides a latency: measured again where this differs."""
    facts = describe()
    return {name: facts[name] for name in ("cpu", "cpus_granted", "memory_gib", "machine")}


def load(seconds: float = 0.5) -> float:
    """CPUs that others keep busy while this process waits: they disturb a measurement."""
    return psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1)
