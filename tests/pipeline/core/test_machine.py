"""What machine this is, as /proc tells it."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.core import machine
from pipeline.core.errors import InputError


def cgroup(folder: Path, line: str, files: dict[str, str]) -> tuple[Path, Path]:
    proc, root = folder / "proc", folder / "cgroup"
    proc.mkdir()
    (proc / "cgroup").write_text(f"{line}\n")
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return proc, root


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000\n"}, 64),
        ("0::/", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/pod/box", {"pod/cpu.max": "350000 100000\n", "pod/box/cpu.max": "max 100000\n"}, 3),
        ("0::/pod/box", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/", {"unified/cpu.max": "100000 50000"}, 2),
        ("4:cpu,cpuacct:/box", {"cpu/box/cpu.cfs_quota_us": "-1"}, 64),
        (
            "4:cpu,cpuacct:/box",
            {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("0::/", {"cpu.max": "nonsense"}, 64),
        ("0::/../..", {}, 64),
        # Seen from inside a container: what lies outside of the mount limits nothing.
        ("0::/../..", {"top/cpu.max": "max 100000", "../cpu.max": "100000 100000"}, 64),
        ("0::/../pod", {"pod/cpu.max": "200000 100000"}, 2),
    ],
)
def test_threads_follow_the_quota(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    files: dict[str, str],
    expected: int,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert machine.granted(*cgroup(tmp_path, line, files)) == expected


def test_threads_follow_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5})
    assert machine.granted(*cgroup(tmp_path, "0::/", {"cpu.max": "800000 100000"})) == 2
    assert machine.granted(tmp_path / "none", tmp_path / "none") == 2


def test_asked_threads_are_those_granted_or_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "granted", lambda: 4)
    assert machine.resolve_threads(None) == 4
    assert machine.resolve_threads(3) == 3
    for asked in (0, 5):
        with pytest.raises(InputError, match="may use 1 to 4"):
            machine.resolve_threads(asked)


def test_the_machine_is_described_as_far_as_it_can_be_read() -> None:
    facts = machine.describe()
    assert facts["cpus_granted"] == machine.granted()
    assert facts["memory_gib"] > 0
    assert machine.load(0.01) >= 0


def test_the_cpus_name_is_read_or_what_the_platform_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor: 0\nmodel name\t: Intel(R) Core(TM) i9-12900K\n")
    monkeypatch.setattr(machine, "_CPUINFO", info)
    machine.cpu_name.cache_clear()
    assert machine.cpu_name() == "Intel(R) Core(TM) i9-12900K"
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    machine.cpu_name.cache_clear()
    assert machine.cpu_name()
    monkeypatch.undo()
    machine.cpu_name.cache_clear()


def test_importing_it_does_not_read_proc() -> None:
    """Reading /proc at import moves memory, and with it the order of what is built."""
    program = "import sys; from pipeline.core import machine; print('psutil' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"


X86 = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu avx2 avx512_vnni amx_tile hypervisor
processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu avx2 avx512_vnni amx_tile hypervisor avx512f
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test reads the machine anew, and what it played stays with no other."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    machine.cpu_name.cache_clear()
    machine.instructions.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [(X86, ("amx_tile", "avx2", "avx512_vnni")), (ARM, ("asimddp", "i8mm")), ("", ())],
)
def test_extensions_that_kernels_are_chosen_by(
    text: str, expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.instructions() == expected
    assert machine.cpu_class()["instructions"] == " ".join(expected)


def test_a_machine_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    assert machine.instructions() == ()


def test_the_class_of_a_machine_is_the_same_where_nothing_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = machine.cpu_class()
    assert first == machine.cpu_class()
    assert set(first) == {"cpu", "instructions", "cpus_granted"}
    monkeypatch.setattr(machine, "granted", lambda: 99)
    assert machine.cpu_class() == {**first, "cpus_granted": 99}


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


def test_what_is_installed_is_known(tmp_path: Path) -> None:
    assert machine.memory(tmp_path, tmp_path) < math.inf


@pytest.mark.parametrize("extension", ["avx512_bf16", "amx_bf16"])
def test_one_extension_for_bfloat16_is_enough(
    extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : avx2 {extension}\n")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.why_no_bfloat16() is None


def test_a_cpu_without_bfloat16_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Arm's extension is none that x86 kernels can use.
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512_vnni bf16\n")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.why_no_bfloat16() == "this CPU has no amx_bf16 and no avx512_bf16"


EXTENSIONS = (
    "amx_bf16 amx_int8 amx_tile asimddp asimdhp avx avx2 avx512_bf16 avx512_fp16 avx512_vnni "
    "avx512bw avx512f avx512vl avx_vnni bf16 f16c fma i8mm sve sve2"
)


def test_every_extension_with_kernels_of_its_own_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : x {EXTENSIONS} y\n")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert " ".join(machine.instructions()) == EXTENSIONS


def test_cpus_where_there_is_no_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    for count, expected in ((6, 6), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda count=count: count)
        assert machine.granted(tmp_path, tmp_path) == expected


def test_the_name_without_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.processor", lambda: "a processor")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    assert machine.cpu_name() == "a processor"
    machine.cpu_name.cache_clear()
    monkeypatch.setattr("platform.processor", lambda: "")
    assert machine.cpu_name() == "riscv64"
    machine.cpu_name.cache_clear()
    (tmp_path / "cpuinfo").write_text("model : 5\nname : model name : no\n")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_name() == "riscv64"
    machine.cpu_name.cache_clear()
    (tmp_path / "cpuinfo").write_text("model name : Apple: M1\nmodel name : second\n")
    assert machine.cpu_name() == "Apple: M1"


@pytest.mark.parametrize(
    ("governor", "mhz", "expected"),
    [
        (None, None, {}),
        ("performance\n", 0.0, {"governor": "performance"}),
        (None, 2400.4, {"cpu_mhz": 2400}),
    ],
)
def test_all_that_is_told_of_a_machine(
    governor: str | None,
    mhz: float | None,
    expected: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if governor:
        (tmp_path / "governor").write_text(governor)
    monkeypatch.setattr(machine, "_GOVERNOR", tmp_path / "governor")
    frequency = None if mhz is None else SimpleNamespace(current=mhz)
    monkeypatch.setattr("psutil.cpu_freq", lambda: frequency)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=3.04 * 2**30))
    assert machine.describe() == {
        "cpu": machine.cpu_name(),
        "cpus_granted": machine.granted(),
        "cpus_of_host": os.cpu_count(),
        "memory_gib": 3.0,
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        **expected,
    }
    here = machine.Machine.here()
    assert (here.cpu, here.cpus_granted) == (machine.cpu_name(), machine.granted())
    assert here.os == f"{platform.system()} {platform.release()}"
    assert set(here.more) == {"cpus_of_host", "memory_gib", "machine", "python", *expected}


def test_a_system_without_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("psutil.cpu_freq")
    assert "cpu_mhz" not in machine.describe()


def test_load_is_counted_in_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def percent(interval: float) -> float:
        asked.append(interval)
        return 25.0

    monkeypatch.setattr("psutil.cpu_percent", percent)
    monkeypatch.setattr("psutil.cpu_count", lambda: 8)
    assert machine.load() == 2.0
    monkeypatch.setattr("psutil.cpu_count", lambda: None)
    assert machine.load(0.1) == 0.25
    assert asked == [0.5, 0.1]


def test_one_and_all_threads_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "granted", lambda: 4)
    assert [machine.resolve_threads(asked) for asked in (1, 4)] == [1, 4]


@pytest.mark.parametrize(
    ("quota", "period", "expected"),
    [("-1", "100000", 64), ("0", "100000", 64), ("200000", "0", 64), ("350000", "100000", 3)],
)
def test_quotas_of_version_1(
    quota: str, period: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": period}
    for place in ("cpu/box", "cpu,cpuacct/box"):
        folder = tmp_path / place.replace("/", "-")
        folder.mkdir()
        held = {f"{place}/{name}": value for name, value in files.items()}
        assert machine.granted(*cgroup(folder, "4:cpu,cpuacct:/box", held)) == expected


def test_only_the_controllers_own_hierarchy_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    files = {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}
    places = cgroup(tmp_path, "4:memory:/\n5:name=systemd:/a:b", files)
    assert machine.granted(*places) == 64


def test_the_smallest_limit_of_all_groups_counts(tmp_path: Path) -> None:
    files = {"a/memory.max": "3000", "a/b/memory.max": "2000", "unified/a/b/memory.max": "1000"}
    places = cgroup(tmp_path, "0::/a/b", files)
    assert machine.memory(*places) == 1000
    (places[1] / "unified/a/b/memory.max").write_text("nonsense")
    assert machine.memory(*places) == 2000


def test_memory_that_the_system_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (AttributeError, ValueError, OSError):

        def refuse(name: str, error: type[Exception] = error) -> int:
            raise error

        monkeypatch.setattr("os.sysconf", refuse)
        assert machine.memory(tmp_path, tmp_path) == math.inf


class Process:
    """A process that took some seconds, with a child that took others."""

    def __init__(self, *seconds: float, gone: bool = False) -> None:
        self.seconds, self.gone, self.below = seconds, gone, list["Process"]()

    def children(self, recursive: bool) -> list[Process]:
        assert recursive
        return self.below

    def cpu_times(self) -> tuple[float, ...]:
        import psutil

        if self.gone:
            raise psutil.NoSuchProcess(1)
        return self.seconds


def test_others_are_all_but_this_process_and_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    fields = ("user", "system", "idle", "iowait", "steal", "guest")
    times, own = dict.fromkeys(fields, 100.0), Process(5.0, 1.0, 0.0, 0.0, 99.0)
    now = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(_asdict=lambda: times))
    monkeypatch.setattr(psutil, "Process", lambda: own)
    watch = machine.Watch()
    now[0] += 4.0
    times.update(user=109.0, system=101.0, idle=90.0, iowait=150.0, steal=102.0, guest=107.0)
    own.seconds = (8.0, 1.5, 0.5, 0.0, 99.0)
    own.below = [Process(2.0, 0.0, 0.0, 0.0, 0.0), Process(gone=True)]
    # 12 s of all CPUs, 2 of them the host's; 4 of this process and 2 of its child.
    assert watch.others() == pytest.approx((12 - 6) / 4)
    own.below = [Process(50.0)]
    assert watch.others() == 0


def test_the_peak_is_of_this_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n")
    assert machine.peak_memory(tmp_path) == 2 * 2**20
    (tmp_path / "status").write_text("Name:\tx\n")
    assert machine.peak_memory(tmp_path) is None


def test_the_peak_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import psutil

    nothing = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1))
    monkeypatch.setattr(psutil, "Process", lambda: nothing)
    monkeypatch.setattr(platform, "system", lambda: "Plan 9")
    assert machine.peak_memory(tmp_path / "none") is None
    windows = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1, peak_wset=77))
    monkeypatch.setattr(psutil, "Process", lambda: windows)
    assert machine.peak_memory(tmp_path / "none") == 77
