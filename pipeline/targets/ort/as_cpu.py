"""Lets ONNX Runtime and OpenVINO see a lesser CPU than there is, at full speed.

    enter(cpu_classes.named("avx2"))  # before anything imports onnxruntime
    session = start(model, settings, threads)  # takes the kernels of a CPU with AVX2 alone

The real kernels run, not an emulation: only what the CPU says of itself is changed. For answers
alone, or for times alone, a CPU may even claim AVX-VNNI that it lacks: `avx_vnni.c` computes the
instructions, or puts one that takes as long in the place of each. Where the kernel lets a process's
CPUID fault (Intel, most machines that are not virtual), each such fault is answered by `as_cpu.c`.
Elsewhere copies of the runtimes are made, in which an illegal instruction of the same length stands
in the place of CPUID. Helper and copies are made at the first use and kept in the user's cache.

PyTorch is not copied; it has settings of its own for the same purpose. A process cannot leave a
class again: what compares classes starts a process for each.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import hashlib
import importlib.util
import itertools
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from pipeline.core import cpu_classes
from pipeline.core.cpu_classes import FEATURES, HYBRID, Bit, CpuClass, Purpose
from pipeline.core.errors import UnavailableError, UnforeseenError
from pipeline.core.machine import instructions

SOURCES = tuple(Path(__file__).with_name(name) for name in ("as_cpu.c", "avx_vnni.c", "avx_vnni.h"))
COMPILERS = ("cc", "gcc", "clang")

PACKAGES = ("onnxruntime", "openvino", "onnxruntime_ep_openvino")
LIBRARIES = ("onnxruntime_pybind11_state", "libonnxruntime.", "libopenvino.so", "intel_cpu")
"""Parts of the names of libraries that choose kernels: others may use CPUID as they like."""

CPUID, ILLEGAL = b"\x0f\xa2", b"\x06\x06"

_REGISTERS = "abcd"
_LOADED, _UNWINDING = 1, 0x6474E550  # types of segments: what is loaded, GNU_EH_FRAME
_EXECUTABLE = 1
_PLAIN_4, _SIGNED_4, _FROM_TABLE = 0x03, 0x0B, 0x3B  # how addresses in GNU_EH_FRAME are written
_PADDING = bytes([0x90]) * 16
"""Instructions of a byte: where code breaks off, what follows begins with an instruction again."""

_WAYS = {Purpose.ANSWERS: 1, Purpose.TIMES: 2}
"""What `as_cpu.c` makes of instructions that are missing, by its numbers: COMPUTE and REPLACE."""

_TORCH: Mapping[str, Mapping[str, str]] = {
    "avx512-vnni": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2-vnni": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
"""PyTorch's own settings for each class, and those of oneDNN in it."""


def why_not(cls: CpuClass, purpose: Purpose = Purpose.BOTH) -> str | None:
    """What is missing here to see a CPU of that class; None if nothing is.

    Args:
        cls: The class.
        purpose: What is to be found out: instructions of `cpu_classes.EMULATED` may be missing
            where that is not both.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"needs Linux on x86-64, not {platform.system()} on {platform.machine()}"
    lacking = cls.why_not(instructions(), purpose)
    if lacking is not None:
        return lacking
    if _compiler() is None:
        return f"needs a C compiler ({', '.join(COMPILERS)}): install gcc"
    if not _can_fault() and shutil.which("objdump") is None:
        return "needs objdump, since this kernel lets no CPUID fault: install binutils"
    return None


def enter(cls: CpuClass, purpose: Purpose = Purpose.BOTH) -> None:
    """Restrict this process to a class, for good.

    Args:
        cls: The class.
        purpose: See `why_not`.

    Raises:
        UnavailableError: Something is missing; the message says what.
        UnforeseenError: A runtime is loaded already, and has seen the CPU.
    """
    reason = why_not(cls, purpose)
    if reason is not None:
        raise UnavailableError(f"as {cls.name} not measured: {reason}")
    loaded = [name for name in PACKAGES if name in sys.modules]
    if loaded:
        raise UnforeseenError(f"{loaded[0]} is loaded before the CPU class was entered")
    helper = _helper()
    if not _can_fault():
        sys.path.insert(0, str(_copies()))
    emulated = cls.emulated(instructions())
    rules = _rules(cls, emulated)
    way = _WAYS[purpose] if emulated else 0
    failure = helper.as_cpu_start(rules, len(rules), int(_can_fault()), way)
    if failure or (wrong := _told_wrongly(helper, cls, emulated)):
        why = os.strerror(failure) if failure else f"{', '.join(sorted(wrong))} is told wrongly"
        raise UnavailableError(f"as {cls.name} not measured: {why}")
    os.environ.update(_TORCH[cls.name])
    cpu_classes.restrict(cls, emulated, purpose)


def reaches_every_library() -> bool:
    """Whether every library of a restricted process sees the class, and not `PACKAGES` alone."""
    return _can_fault()


def _told_wrongly(helper: ctypes.CDLL, cls: CpuClass, emulated: Iterable[str]) -> set[str]:
    """What a runtime sees otherwise than on a CPU of the class."""
    wrong = {name for name in cls.hidden if _sees(helper, FEATURES[name])}
    wrong |= {name for name in emulated if not _sees(helper, FEATURES[name])}
    return wrong | ({"hybrid"} if _sees(helper, HYBRID) is not cls.hybrid else set())


def _sees(helper: ctypes.CDLL, bit: Bit) -> bool:
    """Whether a runtime sees a bit set."""
    leaf, subleaf, register, place = bit
    found = (ctypes.c_uint32 * 4)()
    helper.as_cpu_seen(leaf, subleaf, found)
    return bool(found[_REGISTERS.index(register)] >> place & 1)


class _Rule(ctypes.Structure):
    """Bits to clear and to set in the answer to one leaf of CPUID."""

    _fields_ = (
        ("leaf", ctypes.c_uint32),
        ("subleaf", ctypes.c_uint32),
        ("clear", ctypes.c_uint32 * 4),
        ("set", ctypes.c_uint32 * 4),
    )


def _rules(cls: CpuClass, emulated: Iterable[str] = ()) -> ctypes.Array[_Rule]:
    changes = [(FEATURES[name], "clear") for name in cls.hidden]
    changes.append((HYBRID, "set" if cls.hybrid else "clear"))
    # Register a of leaf 7, subleaf 0, is the last subleaf: without 1 nobody asks for 1.
    changes += [(bit, "set") for name in emulated for bit in (FEATURES[name], (7, 0, "a", 0))]
    rules: dict[tuple[int, int], _Rule] = {}
    for (leaf, subleaf, register, bit), change in changes:
        rule = rules.setdefault((leaf, subleaf), _Rule(leaf, subleaf))
        getattr(rule, change)[_REGISTERS.index(register)] |= 1 << bit
    return (_Rule * len(rules))(*rules.values())


def _compiler() -> str | None:
    wanted = os.environ.get("CC", "").split()[:1]
    return next(filter(None, map(shutil.which, (*wanted, *COMPILERS))), None)


@functools.cache
def _can_fault() -> bool:
    """Whether the kernel lets CPUID fault, so that no runtime has to be copied."""
    return bool(_helper().as_cpu_can_fault())


@functools.cache
def _helper() -> ctypes.CDLL:
    """The compiled sources."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in SOURCES)).hexdigest()[:16]
    file = _cache() / f"as-cpu-{digest}.so"
    if not file.exists():
        _compile(file)
    return ctypes.CDLL(str(file))


def _compile(file: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        raise UnavailableError(f"needs a C compiler ({', '.join(COMPILERS)}): install gcc")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        sources = [str(file) for file in SOURCES if file.suffix == ".c"]
        command = [compiler, "-O2", "-shared", "-fPIC", *sources, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            first = done.stderr.strip().partition("\n")[0]
            raise UnavailableError(f"{compiler} cannot compile {SOURCES[0].name}: {first}")
        made.replace(file)


def _cache() -> Path:
    """Where helper and copies are kept: in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "care-deploy"


def _copies() -> Path:
    """A folder with copies of the runtimes whose CPUID is replaced, made at the first use."""
    _forget_copies()
    found = {name: folder for name in PACKAGES if (folder := _installed(name))}
    known = [f"{name} {_version(name)} {folder}" for name, folder in found.items()]
    known.append(hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
    digest = hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]
    kept = _cache() / f"as-cpu-{digest}"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix="as-cpu-") as temporary:
        made = Path(temporary) / "packages"
        for name, folder in found.items():
            shutil.copytree(folder, made / name)
        replaced = sum(_replace(library) for library in _libraries(made))
        if not replaced:
            raise UnavailableError("no CPUID instruction was found in onnxruntime")
        try:
            made.rename(kept)
        except OSError:
            if not kept.exists():  # else another process was first
                raise
    return kept


def _forget_copies() -> None:
    """Take copies out of the search path: a process that a restricted one spawned inherits them."""
    sys.path[:] = [entry for entry in sys.path if Path(entry).parent != _cache()]


def _installed(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) if folders else None


def _version(name: str) -> str:
    try:
        return metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "unknown"


def _libraries(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*.so*")):
        if not file.is_symlink() and any(part in file.name for part in LIBRARIES):
            yield file


def _replace(library: Path) -> int:
    """Replace every CPUID instruction of a library; returns how many there were."""
    content = library.read_bytes()
    places = _places(content)
    if places:
        replaced = bytearray(content)
        for place in places:
            replaced[place : place + len(CPUID)] = ILLEGAL
        library.write_bytes(replaced)
    return len(places)


def _places(content: bytes) -> list[int]:
    """Where CPUID instructions lie in a 64-bit ELF file.

    The bytes alone are also found in the middle of other instructions. Which of them are one shows
    where instructions are read from the beginning of their function on, and of these functions
    alone: all of a runtime's take a disassembler ten seconds.
    """
    places: list[int] = []
    read: list[bytes] = []
    functions = sorted(_functions(content))
    for offset, address, length in _segments(content, _LOADED, _EXECUTABLE):
        begins = [offset, *(offset + begin - address for begin in functions if begin > address)]
        place = content.find(CPUID, offset, offset + length)
        while place >= 0:
            begin = begins[bisect.bisect_right(begins, place) - 1]
            read.append(content[begin : place + len(CPUID)])
            places.append(place)
            place = content.find(CPUID, place + 1, offset + length)
    found = _ends_with_cpuid(read)
    return [place for place, each in zip(places, found, strict=True) if each]


def _ends_with_cpuid(codes: Sequence[bytes]) -> list[bool]:
    """Whether the last instruction of each code is CPUID; its last bytes are."""
    if not codes:
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        file.write_bytes(b"".join(code + _PADDING for code in codes))
        command = ["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", "--no-show-raw-insn"]
        done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True)
    shown = re.finditer(r"^\s*([0-9a-f]+):\s+cpuid\b", done.stdout, re.M)
    known = {int(each[1], 16) for each in shown}
    ends = itertools.accumulate(len(code) + len(_PADDING) for code in codes)
    return [end - len(_PADDING) - len(CPUID) in known for end in ends]


def _functions(content: bytes) -> Iterator[int]:
    """Addresses where functions begin, by the table that exceptions find their way with.

    It holds pairs of a function's address and its description's, four bytes each, relative to the
    table; a table of another form is left alone.
    """
    for offset, address, _ in _segments(content, _UNWINDING):
        version, frames, count, entries = content[offset : offset + 4]
        if (version, frames & 0x0F, count, entries) != (1, _SIGNED_4, _PLAIN_4, _FROM_TABLE):
            continue
        (functions,) = struct.unpack_from("<I", content, offset + 8)
        table = content[offset + 12 : offset + 12 + 8 * functions]
        for begin, _ in struct.iter_unpack("<ii", table):
            yield address + begin


def _segments(content: bytes, wanted: int, flag: int = 0) -> Iterator[tuple[int, int, int]]:
    """Offset, address and length of segments of a 64-bit ELF file: of a type, with a flag."""
    (table,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    for index in range(count):
        kind, flags, offset, address, _, length = struct.unpack_from(
            "<IIQQQQ", content, table + index * size
        )
        if kind == wanted and flags & flag == flag:
            yield offset, address, length
