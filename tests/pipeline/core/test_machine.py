"""What machine this is, as /proc tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core import machine

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
def forget() -> None:
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
