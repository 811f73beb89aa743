from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core import machine


def test_memory_is_limited_by_the_cgroup(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroups"
    (cgroups / "pod" / "inner").mkdir(parents=True)
    proc.mkdir()
    (proc / "cgroup").write_text("0::/pod/inner\n")
    free = machine.memory(proc, cgroups)
    assert free >= 2**20
    (cgroups / "pod" / "inner" / "memory.max").write_text("max\n")
    assert machine.memory(proc, cgroups) == free
    (cgroups / "pod" / "memory.max").write_text("1000000\n")
    assert machine.memory(proc, cgroups) == 1e6


def test_memory_is_limited_by_version_1(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroups"
    (cgroups / "memory" / "pod").mkdir(parents=True)
    proc.mkdir()
    (proc / "cgroup").write_text("4:memory:/pod\n3:cpu,cpuacct:/pod\n")
    (cgroups / "memory" / "pod" / "memory.limit_in_bytes").write_text("2000000\n")
    assert machine.memory(proc, cgroups) == 2e6


def test_without_a_limit_it_is_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if "SIZE" in name else 1000)
    assert machine.memory(tmp_path, tmp_path) == 4_096_000
