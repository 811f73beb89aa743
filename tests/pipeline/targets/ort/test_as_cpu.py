"""A runtime that sees a lesser CPU: what is hidden, what is not, and what is left to others."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.commands.validate import in_words
from pipeline.core import machine
from pipeline.core.cpu_classes import CLASSES, FEATURES, Purpose
from pipeline.core.errors import UnavailableError
from pipeline.targets.ort import as_cpu
from pipeline.targets.pytorch import TorchRunner

AVX2 = CLASSES["avx2"]
PRELUDE = """\
import ctypes, mmap, sys
from pipeline.core.cpu_classes import CLASSES
from pipeline.targets.ort import as_cpu
helper = as_cpu._helper()
rules = as_cpu._rules(CLASSES["avx2"])
assert helper.as_cpu_start(rules, len(rules), 0, 1) == 0
"""

RESTRICTED = "measured here, restricted"

needs_compiler = pytest.mark.skipif(
    as_cpu.why_not(AVX2) is not None, reason=f"as avx2: {as_cpu.why_not(AVX2)}"
)

LIBRARY = """\
#include <cpuid.h>
void look(unsigned leaf, unsigned sub, unsigned *f) {
  __cpuid_count(leaf, sub, f[0], f[1], f[2], f[3]);
}
/* The bytes of CPUID in the middle of another instruction, alone and before one. */
unsigned constant(void) { return 0xa20f0000; }
unsigned both(unsigned *f) {
  unsigned value;
  __asm__ volatile("movl $0xa20f0000, %0" : "=r"(value));
  __cpuid_count(7, 0, f[0], f[1], f[2], f[3]);
  return value;
}
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler=0", "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=Path(as_cpu.__file__).parents[3]
    )


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "as-cpu-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    as_cpu._helper.cache_clear()
    as_cpu._can_fault.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    "options", [[], ["-fno-asynchronous-unwind-tables", "-Wl,--no-eh-frame-hdr"]], ids=["", "bare"]
)
def test_a_library_whose_cpuid_is_replaced_sees_the_class(
    tmp_path: Path, options: list[str]
) -> None:
    source, library = tmp_path / "look.c", tmp_path / "look.so"
    source.write_text(LIBRARY)
    command = ["cc", "-O2", "-shared", "-fPIC", *options, str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True)
    named = {int(row.split()[0], 16) for row in symbols.stdout.splitlines() if " T " in row}
    begins = set(as_cpu._functions(library.read_bytes()))
    assert (begins & named, bool(begins)) == ((set(), False) if options else (named, True))
    assert as_cpu._replace(library) == 2
    assert as_cpu._replace(library) == 0
    done = python(
        PRELUDE + f"library = ctypes.CDLL({str(library)!r})\n"
        "found = (ctypes.c_uint32 * 4)()\n"
        "library.look(7, 0, found)\n"
        "assert found[1] >> 5 & 1, 'AVX2 stays'\n"
        "assert not found[1] >> 16 & 1, 'AVX-512 goes'\n"
        "library.look(1, 0, found)\n"
        "assert found[2] >> 12 & 1, 'FMA is of another leaf'\n"
        "library.constant.restype = library.both.restype = ctypes.c_uint32\n"
        "assert library.constant() == library.both(found) == 0xa20f0000\n"
        "assert not found[1] >> 16 & 1\n"
    )
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_a_cpuid_that_faults_is_answered_too() -> None:
    # No kernel is asked to let CPUID fault: the instruction lies where nothing may run, so that it
    # raises the same signal, and what follows lies on the next page, where it may.
    done = python(
        PRELUDE + "page = mmap.PAGESIZE\n"
        "memory = mmap.mmap(-1, 2 * page, prot=mmap.PROT_READ | mmap.PROT_WRITE)\n"
        "memory[page - 2 : page] = b'\\x0f\\xa2'\n"
        "memory[page : page + 4] = b'\\x89\\xd8\\x5b\\xc3'  # mov eax, ebx; pop rbx; ret\n"
        "entry = b'\\x53\\xb8\\x07\\x00\\x00\\x00\\x31\\xc9\\xe9'  # push rbx; eax 7; ecx 0; jmp\n"
        "jump = (-2 - 16 - len(entry) - 4).to_bytes(4, 'little', signed=True)\n"
        "memory[page + 16 : page + 16 + len(entry) + 4] = entry + jump\n"
        "start = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n"
        "libc = ctypes.CDLL(None)\n"
        "address = ctypes.c_void_p(start + page)\n"
        "assert libc.mprotect(address, page, mmap.PROT_READ | mmap.PROT_EXEC) == 0\n"
        "found = ctypes.CFUNCTYPE(ctypes.c_uint32)(start + page + 16)()\n"
        "assert found >> 5 & 1 and not found >> 16 & 1, hex(found)\n"
    )
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("code", "signal"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11),
        ("ctypes.string_at(0)", -11),
        ("ctypes.CFUNCTYPE(None)(4096)()", -11),
        (
            "m = mmap.mmap(-1, 4096, prot=7); m[:2] = b'\\x0f\\x0b'\n"
            "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
            -4,
        ),
    ],
    ids=["sent", "read of nothing", "jump into nothing", "trap of a compiler"],
)
def test_other_faults_end_the_process_as_before(code: str, signal: int) -> None:
    assert python(PRELUDE + code).returncode == signal


@needs_compiler
def test_the_bits_are_those_that_linux_names() -> None:
    # Unrestricted, in this process: nothing is hidden before `as_cpu_start`.
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    found = (ctypes.c_uint32 * 4)()
    helper = as_cpu._helper()
    for name, (leaf, subleaf, register, bit) in FEATURES.items():
        if name == "avx10":  # Linux knows it, and has no name for it here
            continue
        helper.as_cpu_real(leaf, subleaf, found)
        assert bool(found["abcd".index(register)] >> bit & 1) == (name in flags), name


@needs_compiler
@pytest.mark.parametrize("hybrid", [False, True])
def test_a_runtime_sees_cores_of_one_kind_or_more_as_the_class_has_them(hybrid: bool) -> None:
    done = python(
        "import ctypes\n"
        "from dataclasses import replace\n"
        "from pipeline.core.cpu_classes import CLASSES\n"
        "from pipeline.targets.ort import as_cpu\n"
        f"as_cpu.enter(replace(CLASSES['avx2'], hybrid={hybrid}))\n"
        "found = (ctypes.c_uint32 * 4)()\n"
        "as_cpu._helper().as_cpu_seen(7, 0, found)\n"
        "print(found[3] >> 15 & 1)\n"
        f"as_cpu._sees = lambda helper, bit: bit == as_cpu.HYBRID and not {hybrid}\n"
        "print(*as_cpu._told_wrongly(as_cpu._helper(), replace(CLASSES['avx2'], "
        f"hybrid={hybrid}), ()))\n"
    )
    assert done.stdout.split() == [str(int(hybrid)), "hybrid"], done.stderr


@needs_compiler
@pytest.mark.slow
def test_onnx_runtime_takes_the_kernels_of_the_class(tmp_path: Path) -> None:
    done = python(
        "from pathlib import Path\n"
        "from pipeline.core import cpu_classes, figures, machine\n"
        "from pipeline.targets.ort import as_cpu\n"
        "as_cpu.enter(cpu_classes.named('avx2'))\n"
        "from pipeline.targets.ort.layout import block_size, write_probe\n"
        f"probe = Path({str(tmp_path / 'probe.onnx')!r})\n"
        "write_probe(probe)\n"
        "print(block_size(probe), machine.kernels(), figures.measured_here())\n"
    )
    assert done.stdout == "8 AVX2 measured here, restricted\n", done.stderr


@needs_compiler
@pytest.mark.slow
def test_kernels_with_vnni_answer_as_they_should_or_only_take_their_time(tmp_path: Path) -> None:
    # Weights and activations whose sums saturate without VNNI: so the other kernels would be seen.
    from onnx import TensorProto, helper, save

    values = np.random.default_rng(3)
    weight = values.integers(-127, 128, (64, 48)).astype(np.int8)
    given = values.integers(128, 256, (5, 64)).astype(np.uint8)
    nodes = [helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [5, 64])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [5, 48])],
        [
            helper.make_tensor("w", TensorProto.INT8, weight.shape, weight.tobytes(), raw=True),
            helper.make_tensor("zero", TensorProto.UINT8, [], [0]),
        ],
    )
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "sums.onnx",
    )
    np.save(tmp_path / "x.npy", given)
    lacking = "avx_vnni" not in machine.instructions()
    exact = given.astype(np.int32) @ weight.astype(np.int32)
    for name, purpose, state, right in (
        ("avx2-vnni", Purpose.ANSWERS, "emulated" if lacking else RESTRICTED, True),
        ("avx2-vnni", Purpose.TIMES, "estimated" if lacking else RESTRICTED, not lacking),
        ("avx2", Purpose.ANSWERS, RESTRICTED, False),
    ):
        done = python(
            "import numpy as np\n"
            "from pipeline.core import cpu_classes, figures, machine\n"
            "from pipeline.targets.ort import as_cpu\n"
            f"as_cpu.enter(cpu_classes.named({name!r}), cpu_classes.Purpose({str(purpose)!r}))\n"
            "import onnxruntime\n"
            f"session = onnxruntime.InferenceSession({str(tmp_path / 'sums.onnx')!r})\n"
            f"(y,) = session.run(None, {{'x': np.load({str(tmp_path / 'x.npy')!r})}})\n"
            f"np.save({str(tmp_path / 'y')!r}, y)\n"
            "found = as_cpu._helper(), (as_cpu.ctypes.c_uint32 * 4)()\n"
            "found[0].as_cpu_seen(7, 0, found[1])\n"
            f"assert found[1][0] or {name == 'avx2'}, 'no leaf 7 beyond the first'\n"
            "print(figures.measured_here(), machine.kernels())\n"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{state} {CLASSES[name].title}\n"
        assert (np.load(tmp_path / "y.npy") == exact).all() == right, (name, purpose)


@needs_compiler
@pytest.mark.slow
def test_runtimes_are_taken_from_copies_without_a_cpuid_and_torch_is_told() -> None:
    done = python(
        "import os\n"
        "from pathlib import Path\n"
        "from pipeline.core import cpu_classes\n"
        "from pipeline.targets.ort import as_cpu\n"
        "found = [name for name in as_cpu.PACKAGES if as_cpu._installed(name)]\n"
        "as_cpu.enter(cpu_classes.named('avx2'))\n"
        "copied = {name: as_cpu._installed(name).parent for name in found}\n"
        "left = [len(as_cpu._places(library.read_bytes())) for name, folder in copied.items()\n"
        "        for library in as_cpu._libraries(folder / name)]\n"
        "faults = as_cpu._can_fault()\n"
        "told = os.environ['ATEN_CPU_CAPABILITY'], os.environ['ONEDNN_MAX_CPU_ISA']\n"
        "print('onnxruntime' in found, len(left) > 0, told)\n"
        "print(faults or (set(copied.values()) == {as_cpu._copies()} and not any(left)))\n"
    )
    assert done.stdout == "True True ('avx2', 'AVX2')\nTrue\n", done.stderr


@needs_compiler
def test_every_library_sees_the_class_where_cpuid_faults() -> None:
    done = python(
        "from pipeline.core import cpu_classes\n"
        "from pipeline.targets.ort import as_cpu\n"
        "as_cpu.enter(cpu_classes.named('avx2'))\n"
        "from numpy._core._multiarray_umath import __cpu_features__ as seen\n"
        "print(as_cpu.reaches_every_library(), seen['AVX512F'])\n"
    )
    reached, seen = done.stdout.split()
    assert (reached, seen) in {
        ("True", "False"),
        ("False", str("avx512f" in machine.instructions())),
    }


def test_kernels_of_openvino_are_chosen_in_what_is_copied(tmp_path: Path) -> None:
    for package, name in (
        ("openvino/libs", "libopenvino.so.2630"),
        ("openvino/libs", "libopenvino_intel_cpu_plugin.so"),
        ("openvino/libs", "libopenvino_ir_frontend.so.2630"),
        ("onnxruntime/capi", "onnxruntime_pybind11_state.cpython-311-x86_64-linux-gnu.so"),
        ("onnxruntime_ep_openvino", "libonnxruntime_providers_openvino.so"),
    ):
        (tmp_path / package).mkdir(parents=True, exist_ok=True)
        (tmp_path / package / name).touch()
    assert {"onnxruntime", "openvino", "onnxruntime_ep_openvino"} == set(as_cpu.PACKAGES)
    assert {file.name.partition(".")[0] for file in as_cpu._libraries(tmp_path)} == {
        "libopenvino",
        "libopenvino_intel_cpu_plugin",
        "onnxruntime_pybind11_state",
    }


def test_copies_in_an_inherited_search_path_are_not_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copies = tmp_path / "care-deploy" / "as-cpu-0123456789abcdef"
    (copies / "onnxruntime").mkdir(parents=True)
    (copies / "onnxruntime" / "__init__.py").touch()
    others = ["", *sys.path]
    monkeypatch.setattr(sys, "path", [str(copies), *others])
    as_cpu._forget_copies()
    assert sys.path == others
    found = as_cpu._installed("onnxruntime")
    assert found is not None
    assert copies not in found.parents


@needs_compiler
@pytest.mark.slow
def test_a_process_that_a_restricted_one_spawned_can_be_restricted_too(tmp_path: Path) -> None:
    (tmp_path / "spawning.py").write_text(
        "import multiprocessing\n"
        "from pipeline.core import cpu_classes, machine\n"
        "from pipeline.targets.ort import as_cpu\n"
        "def enter():\n"
        "    as_cpu.enter(cpu_classes.named('avx2'))\n"
        "    import onnxruntime\n"
        "    print(machine.kernels())\n"
        "if __name__ == '__main__':\n"
        "    enter()\n"
        "    child = multiprocessing.get_context('spawn').Process(target=enter)\n"
        "    child.start()\n"
        "    child.join()\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "spawning.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(as_cpu.__file__).parents[3])},
    )
    assert done.stdout == "AVX2\nAVX2\n", done.stderr


@needs_compiler
@pytest.mark.skipif("avx_vnni" in machine.instructions(), reason="this CPU has AVX-VNNI")
@pytest.mark.slow
def test_what_is_told_wrongly_is_named() -> None:
    done = python(
        "from pipeline.core import cpu_classes\n"
        "from pipeline.targets.ort import as_cpu\n"
        "rules = as_cpu._rules\n"
        "as_cpu._rules = lambda cls, emulated: rules(cls)\n"
        "as_cpu.enter(cpu_classes.named('avx2-vnni'), cpu_classes.Purpose.ANSWERS)\n"
    )
    assert "as avx2-vnni not measured: avx_vnni is told wrongly" in done.stderr


@needs_compiler
def test_a_runtime_that_is_loaded_already_is_refused() -> None:
    done = python(
        "import onnxruntime\n"
        "from pipeline.core import cpu_classes\n"
        "from pipeline.targets.ort import as_cpu\n"
        "as_cpu.enter(cpu_classes.named('avx2'))\n"
    )
    assert "onnxruntime is loaded before" in done.stderr


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(as_cpu, "instructions", lambda: ("avx2", "fma"))
    monkeypatch.setattr(as_cpu, "_can_fault", lambda: False)
    assert as_cpu.why_not(CLASSES["avx2-vnni"]) == (
        "this CPU has no avx_vnni, which AVX2 + VNNI needs"
    )
    assert "no avx512_vnni" in str(as_cpu.why_not(CLASSES["avx512-vnni"], Purpose.ANSWERS))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert as_cpu.why_not(AVX2) == "needs a C compiler (cc, gcc, clang): install gcc"
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "objdump" else name)
    assert "needs objdump" in str(as_cpu.why_not(AVX2))
    monkeypatch.setattr(as_cpu, "_can_fault", lambda: True)
    assert as_cpu.why_not(AVX2) is None
    assert as_cpu.why_not(CLASSES["avx2-vnni"], Purpose.ANSWERS) is None
    assert as_cpu.why_not(CLASSES["avx2-vnni"], Purpose.TIMES) is None
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert as_cpu.why_not(AVX2) == "needs Linux on x86-64, not Linux on arm64"


def test_a_compiler_that_fails_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no room left >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UnavailableError, match=r"cannot compile as_cpu.c: no room left"):
        as_cpu._helper()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_figures_and_keys_tell_a_restriction(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.core import cpu_classes, figures

    flags = ("avx2", "avx512_vnni", "avx512bw", "avx512f", "avx512vl", "avx_vnni", "fma")
    monkeypatch.setattr(machine, "instructions", lambda: flags)
    free = machine.cpu_class()["instructions"]
    monkeypatch.setattr(cpu_classes, "_entered", [])
    cpu_classes.restrict(CLASSES["avx2-vnni"])
    assert figures.measured_here() is figures.State.RESTRICTED
    assert figures.Latency((1.0,)).summary().median("x").state is figures.State.RESTRICTED
    assert machine.cpu_class()["instructions"] == "avx2 avx_vnni fma" != free
    assert machine.kernels() == "AVX2 + VNNI"
    # Whatever runs beside it says so as well: PyTorch is the baseline of the same measurement.
    assert machine.cpu_as_seen() == f"{machine.cpu_name()}, restricted to AVX2 + VNNI"
    with TorchRunner(torch.nn.Identity(), 1) as baseline:
        assert baseline.device.endswith(", restricted to AVX2 + VNNI")


def test_figures_and_keys_tell_what_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.core import cpu_classes, figures

    monkeypatch.setattr(machine, "instructions", lambda: ("avx2", "avx512_vnni", "fma"))
    monkeypatch.setattr(cpu_classes, "_entered", [])
    assert cpu_classes.emulated() == frozenset()
    for purpose, state, how in (
        (Purpose.ANSWERS, "emulated", "emulating"),
        (Purpose.TIMES, "estimated", "imitating"),
    ):
        cpu_classes.restrict(CLASSES["avx2-vnni"], ["avx_vnni"], purpose)
        assert cpu_classes.emulated() == cpu_classes.emulated(purpose) == {"avx_vnni"}
        assert figures.measured_here() == state
        assert machine.visible_instructions() == ("avx2", "avx_vnni", "fma")
        assert machine.kernels() == "AVX2 + VNNI"
        assert machine.cpu_as_seen() == f"{machine.cpu_name()} as AVX2 + VNNI, {how} avx_vnni"
        assert in_words() == f"{state}: AVX2 + VNNI (Intel i9-12900 to 14900)"
    assert cpu_classes.emulated(Purpose.ANSWERS) == frozenset()
    cpu_classes.restrict(CLASSES["avx2-vnni"], [], Purpose.TIMES)
    assert cpu_classes.emulated() == frozenset()
    assert figures.measured_here() is figures.State.RESTRICTED
    cpu_classes.restrict(CLASSES["avx2"])
    told = "measured here, restricted to AVX2 (Intel i9-9900 to 10900, AMD Zen to Zen 3)"
    assert in_words() == told
