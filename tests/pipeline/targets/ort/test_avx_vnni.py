"""AVX-VNNI on a CPU that lacks it: every instruction, in stubs and in signals, and by threads.

Functions of one instruction each run on registers of random bytes; NumPy says what has to come out.
Where only time counts, that is what VPMADDUBSW gives, and nothing else in the code may change.
On a CPU that has AVX-VNNI they show that this file is right, and nothing of ours.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.core.cpu_classes import CLASSES
from pipeline.core.machine import instructions
from pipeline.targets.ort import as_cpu

Vectors = npt.NDArray[np.uint8]

SATURATES, WORDS = frozenset({"vpdpbusds", "vpdpwssds"}), frozenset({"vpdpwssd", "vpdpwssds"})
OPERATIONS = ("vpdpbusd", "vpdpbusds", "vpdpwssd", "vpdpwssds")
REGISTERS = ((0, 1, 2), (15, 8, 9), (3, 3, 4), (5, 6, 5), (7, 1, 1), (2, 2, 2), (0, 15, 7))
"""Of the sum, and of both factors."""

IN_MEMORY = {
    "(%rsi)": "",
    "0x20(%rsi)": "sub $0x20, %rsi",
    "-0x80(%r10)": "lea 0x80(%rsi), %r10",
    "0x1000(%rsi)": "sub $0x1000, %rsi",
    "(%r12)": "mov %rsi, %r12",
    "(%r13)": "mov %rsi, %r13",
    "0x40(%rax,%rcx,4)": "mov $0x10, %ecx; lea -0x80(%rsi), %rax",
    "(%r8,%r9,1)": "mov $-0x30, %r9; lea 0x30(%rsi), %r8",
    "-0x8(,%rsi,2)": "add $8, %rsi; shr $1, %rsi",
    "(%rsp)": "",
    "0x8(%rsp,%rcx,8)": "mov $-1, %rcx",
    "constant(%rip)": "",
}
"""Where second factors lie, and what sets that up; `rsi` has their address."""

BY_SIGNAL = ("(%rsp)", "0x8(%rsp,%rcx,8)", "constant(%rip)")
"""No stub is made for these."""

FUNCTION = """
.globl {name}
{name}:
  push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15
  mov %rdx, %r14
  {load}
  pushq 24(%rsi); pushq 16(%rsi); pushq 8(%rsi); pushq (%rsi)
  {setup}
  mov %rsp, %r15
  movq $0x1234, -8(%rsp); movq $0x5678, -128(%rsp)
  mov %rsi, %rbx; mov %rax, %rbp
  stc
at_{name}:
  {{vex}} {operation} {operands}
  setc (%r14)
  cmp %rsp, %r15; sete 1(%r14)
  cmpq $0x1234, -8(%rsp); sete 2(%r14)
  cmpq $0x5678, -128(%rsp); sete 3(%r14)
  cmp %rsi, %rbx; sete 4(%r14)
  cmp %rax, %rbp; sete 5(%r14)
  {store}
  add $32, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx
  vzeroupper
  ret
"""


@dataclass(frozen=True)
class Form:
    """An instruction with its operands; `second` is a register, or where the factors lie."""

    operation: str
    wide: bool
    sum: int
    first: int
    second: int | str

    @property
    def name(self) -> str:
        second = "".join(f"{ord(c):02x}" for c in str(self.second))
        return f"{self.operation}_{256 if self.wide else 128}_{self.sum}_{self.first}_{second}"

    @property
    def by_signal(self) -> bool:
        """No stub does it."""
        return self.second in BY_SIGNAL or self.operation == "vpdpwssds"

    @property
    def is_narrow(self) -> bool:
        """It runs where no upper half of any register is in use."""
        return not self.wide and isinstance(self.second, str)

    def source(self) -> str:
        kind = "y" if self.wide else "x"
        second = self.second if isinstance(self.second, str) else f"%{kind}mm{self.second}"
        return FUNCTION.format(
            name=self.name,
            operation=self.operation,
            load="; ".join(f"vmovdqu {32 * i}(%rdi), %ymm{i}" for i in range(16))
            + ("; vzeroupper" if self.is_narrow else ""),
            store="; ".join(f"vmovdqu %ymm{i}, {32 * i}(%rdi)" for i in range(16)),
            setup=IN_MEMORY[self.second] if isinstance(self.second, str) else "",
            operands=f"{second}, %{kind}mm{self.first}, %{kind}mm{self.sum}",
        )

    def expected(self, vectors: Vectors, memory: Vectors, imitated: bool) -> Vectors:
        """What is in the registers afterwards."""
        bytes_ = 32 if self.wide else 16
        is_words = self.operation in WORDS and not imitated
        kind, other = ("i2", "i2") if is_words else ("u1", "i1")
        first = vectors[self.first, :bytes_].view(kind).astype(np.int64)
        given = memory if isinstance(self.second, str) else vectors[self.second]
        products = first * given[:bytes_].view(other).astype(np.int64)
        after = vectors.copy()
        if self.is_narrow:
            after[:, 16:] = 0
        after[self.sum] = 0
        if imitated:
            pairs = products.reshape(-1, 2).sum(1).clip(-(2**15), 2**15 - 1)
            after[self.sum, :bytes_] = pairs.astype(np.int16).view(np.uint8)
            return after
        sums = vectors[self.sum, :bytes_].view(np.int32).astype(np.int64)
        sums = sums + products.reshape(len(sums), -1).sum(1)
        if self.operation in SATURATES:
            sums = sums.clip(-(2**31), 2**31 - 1)
        after[self.sum, :bytes_] = sums.astype(np.uint32).view(np.uint8)
        return after


FORMS = [
    *(
        Form(name, wide, *registers)
        for name in OPERATIONS
        for wide in (True, False)
        for registers in REGISTERS
    ),
    *(
        Form(name, wide, sum_, 9, place)
        for name in OPERATIONS
        for place in IN_MEMORY
        for wide, sum_ in ((True, 12), (False, 1), (True, 9))
    ),
]
LACKING = "avx_vnni" not in instructions()
CONSTANT = np.random.default_rng(5).integers(0, 256, 32, np.uint8)


def assembles() -> bool:
    """Whether the assembler knows the instructions."""
    if shutil.which("as") is None or as_cpu.why_not(CLASSES["avx2"]) is not None:
        return False
    code = b"{vex} vpdpbusd %ymm0, %ymm1, %ymm2\n"
    return not subprocess.run(["as", "-o", os.devnull], input=code, capture_output=True).returncode


pytestmark = pytest.mark.skipif(not assembles(), reason="the assembler knows no AVX-VNNI")


class Library:
    """The functions, in a file that is nothing but their code."""

    def __init__(self, folder: Path) -> None:
        source, made, self.code = folder / "f.s", folder / "f.o", folder / "f.bin"
        constant = ", ".join(map(str, CONSTANT))
        parts = [".text", *(form.source() for form in FORMS), f"constant: .byte {constant}", ""]
        source.write_text("\n".join(parts))
        subprocess.run(["as", str(source), "-o", str(made)], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", made, self.code], check=True)
        listed = subprocess.run(["nm", str(made)], capture_output=True, text=True, check=True)
        found = re.findall(r"^([0-9a-f]+) [tT] (\w+)$", listed.stdout, re.M)
        self.at = {name: int(place, 16) for place, name in found}

    def load(self, shared: bool) -> mmap.mmap:
        """Map the code; what is shared with a file that may not be written cannot be changed."""
        with self.code.open("rb") as stream:
            return mmap.mmap(
                stream.fileno(),
                0,
                flags=mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_EXEC,
            )


def address_of(code: mmap.mmap) -> int:
    return int(np.frombuffer(code, np.uint8).ctypes.data)


def function_of(library: Library, address: int, form: Form) -> Callable[..., None]:
    made = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return made(address + library.at[form.name])


def inputs(seed: int) -> tuple[Vectors, Vectors]:
    """Registers and memory; many sums are near the ends of their range, many factors extreme."""
    generator = np.random.default_rng(seed)
    vectors = generator.integers(0, 256, (16, 32), np.uint8)
    memory = generator.integers(0, 256, 32, np.uint8)
    for values in (*vectors, memory):
        if generator.random() < 0.6:
            values.view(np.int32)[:] = generator.choice(
                [2**31 - 1, -(2**31), 2**31 - 9, -(2**31) + 9, 0x7F7F7F7F, -0x7F7F7F80, -1, 0], 8
            )
    return vectors, memory


def check(
    library: Library,
    code: mmap.mmap,
    forms: list[Form],
    seeds: Iterable[int],
    *,
    imitated: bool = False,
) -> None:
    """See that functions do what they should."""
    for seed in seeds:
        before, memory = inputs(seed)
        for form in forms:
            call = function_of(library, address_of(code), form)
            for _ in range(2):  # the first may meet the instruction, the second its stub
                after, kept = before.copy(), np.zeros(6, np.uint8)
                given = CONSTANT if form.second == "constant(%rip)" else memory
                call(after.ctypes.data, memory.ctypes.data, kept.ctypes.data)
                assert np.array_equal(after, form.expected(before, given, imitated)), form.name
                assert kept.all(), (form.name, kept)


def run_all(folder: Path, way: str) -> None:
    """In a process of its own: all functions, in the way that is named."""
    assert as_cpu._helper().as_cpu_start(None, 0, 0, 1) == 0
    library = Library(folder)
    code = library.load(shared=way == "signals")
    check(library, code, FORMS, range(8))
    jumps = {form.name: is_jump(code, library, form) for form in FORMS}
    if LACKING:
        assert jumps == {form.name: way != "signals" and not form.by_signal for form in FORMS}
    if way == "threads":
        for _ in range(30):
            check_by_threads(library, library.load(shared=False), FORMS[::3])
    elif way == "many":
        for _ in range(9_000 // sum(not form.by_signal for form in FORMS)):
            code = library.load(shared=False)
            check(library, code, FORMS, (3,))
        assert not any(is_jump(code, library, form) for form in FORMS)
    elif way == "overwritten":
        # As where a runtime makes code of its own: what is there now is another's illegal one.
        place = address_of(code) + library.at[f"at_{FORMS[0].name}"]
        ctypes.memmove(place, b"\x0f\x0b", 2)
        check(library, code, FORMS[:1], (3,))


def imitate_all(folder: Path, way: str) -> None:
    """In a process of its own: all functions, where only their time counts."""
    assert as_cpu._helper().as_cpu_start(None, 0, 0, 2) == 0
    library = Library(folder)
    written = library.code.read_bytes()
    code = library.load(shared=way == "no writing")
    check(library, code, FORMS, range(3), imitated=True)
    changed = {i for i, (new, old) in enumerate(zip(code[:], written, strict=True)) if new != old}
    assert changed == {library.at[f"at_{form.name}"] + 3 for form in FORMS}
    for _ in range(30):
        check_by_threads(library, library.load(shared=False), FORMS[::3], imitated=True)


def check_by_threads(
    library: Library, code: mmap.mmap, forms: list[Form], *, imitated: bool = False
) -> None:
    """All at once, so that one meets what another is rewriting."""
    barrier = threading.Barrier(4)

    def work(_: int) -> None:
        barrier.wait()
        check(library, code, forms, (3,), imitated=imitated)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def is_jump(code: mmap.mmap, library: Library, form: Form) -> bool:
    return code[library.at[f"at_{form.name}"]] == 0xE9


@pytest.mark.parametrize("way", ["stubs", "signals", "threads", "many"])
def test_every_instruction_does_what_the_manual_says(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = python(f"import test_avx_vnni as t\nt.run_all(t.Path({str(tmp_path)!r}), {way!r})")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not LACKING, reason="this CPU has AVX-VNNI: nothing is rewritten")
def test_a_jump_that_is_gone_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = f"import test_avx_vnni as t\nt.run_all(t.Path({str(tmp_path)!r}), 'overwritten')"
    assert python(code).returncode == -signal.SIGILL


@pytest.mark.skipif(not LACKING, reason="this CPU has AVX-VNNI: nothing is imitated")
@pytest.mark.parametrize(
    ("way", "ends"), [("writing", 0), ("no writing", -signal.SIGILL)], ids=["writing", "no writing"]
)
def test_where_time_counts_a_single_byte_of_each_instruction_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, ends: int
) -> None:
    """Where code cannot be written to, the process ends rather than being timed otherwise."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = python(f"import test_avx_vnni as t\nt.imitate_all(t.Path({str(tmp_path)!r}), {way!r})")
    assert done.returncode == ends, done.stderr[-3000:]


def python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(as_cpu.__file__).parents[3]
    environment: dict[str, Any] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(root), str(Path(__file__).parent))),
    }
    command = [sys.executable, "-X", "faulthandler=0", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
