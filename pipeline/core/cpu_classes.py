"""Classes of x86 CPUs, as kernels choose by them, and the one that this process is restricted to.

A runtime looks at the CPU once and takes its kernels by what it finds. Figures of one class say
little of another: blocks of 8 or 16 channels, 8-bit products that saturate or not. A process can be
made to see a lesser CPU than it runs on, see `pipeline.targets.ort.as_cpu`; what it measures then
is a state of its own. Where the CPU lacks an extension of the class, others may stand in for its
instructions, for one `Purpose` at a time: answers are emulated then, and times estimated.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from pipeline.core.errors import InputError
from pipeline.core.words import nearest_or_all

Bit = tuple[int, int, str, int]
"""Leaf and subleaf of CPUID, register, and bit."""

FEATURES: dict[str, Bit] = {
    "avx512f": (7, 0, "b", 16),
    "avx512dq": (7, 0, "b", 17),
    "avx512ifma": (7, 0, "b", 21),
    "avx512pf": (7, 0, "b", 26),
    "avx512er": (7, 0, "b", 27),
    "avx512cd": (7, 0, "b", 28),
    "avx512bw": (7, 0, "b", 30),
    "avx512vl": (7, 0, "b", 31),
    "avx512vbmi": (7, 0, "c", 1),
    "avx512_vbmi2": (7, 0, "c", 6),
    "avx512_vnni": (7, 0, "c", 11),
    "avx512_bitalg": (7, 0, "c", 12),
    "avx512_vpopcntdq": (7, 0, "c", 14),
    "avx512_4vnniw": (7, 0, "d", 2),
    "avx512_4fmaps": (7, 0, "d", 3),
    "avx512_vp2intersect": (7, 0, "d", 8),
    "amx_bf16": (7, 0, "d", 22),
    "avx512_fp16": (7, 0, "d", 23),
    "amx_tile": (7, 0, "d", 24),
    "amx_int8": (7, 0, "d", 25),
    "avx_vnni": (7, 1, "a", 4),
    "avx512_bf16": (7, 1, "a", 5),
    "amx_fp16": (7, 1, "a", 21),
    "avx_ifma": (7, 1, "a", 23),
    "avx_vnni_int8": (7, 1, "d", 4),
    "avx_ne_convert": (7, 1, "d", 5),
    "amx_complex": (7, 1, "d", 8),
    "avx_vnni_int16": (7, 1, "d", 10),
    "avx10": (7, 1, "d", 19),
}
"""Extensions beyond AVX2 that kernels choose by, as Linux names them, and where CPUID tells of them
(Intel's Software Developer's Manual, volume 2, CPUID, leaf 7)."""

HYBRID: Bit = (7, 0, "d", 15)
"""The CPU has cores of more than one kind. ONNX Runtime then divides an operator into four parts
for each thread, so that fast cores can take what a slow one has not begun."""

_AVX2 = frozenset({"avx2", "fma"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl"})


EMULATED = frozenset({"avx_vnni"})
"""Extensions whose instructions others can stand in for, by `pipeline.targets.ort.as_cpu`."""


class Purpose(StrEnum):
    """What a process that is restricted to a class is to find out.

    It decides what becomes of instructions of `EMULATED` that the CPU lacks. For BOTH, none may be
    lacking. For ANSWERS, others compute the same, in several times as long. For TIMES, one that
    takes as long stands in for each, and what the process computes is worth nothing.
    """

    BOTH = "answers and times"
    ANSWERS = "answers"
    TIMES = "times"


@dataclass(frozen=True)
class CpuClass:
    """CPUs for which a runtime takes the same kernels.

    Attributes:
        name: For commands and files.
        title: For people.
        examples: Some that belong to it.
        needs: Extensions that it has to have, as Linux names them.
        keeps: Those of `FEATURES` that it may have beside these.
        hybrid: See `HYBRID`. It changes how work is divided between threads, and no answer.
    """

    name: str
    title: str
    examples: str
    needs: frozenset[str]
    keeps: frozenset[str] = frozenset()
    hybrid: bool = False

    @property
    def vnni(self) -> bool:
        """It sums products of 8 bits in 32: no pair of them saturates."""
        return bool(self.needs & {"avx_vnni", "avx512_vnni"})

    @property
    def hidden(self) -> frozenset[str]:
        """The extensions that a process restricted to it must not see."""
        return frozenset(FEATURES) - self.needs - self.keeps

    def emulated(self, instructions: Collection[str]) -> frozenset[str]:
        """The extensions that a CPU lacks, and whose instructions others can stand in for."""
        return (self.needs & EMULATED) - set(instructions)

    def why_not(self, instructions: Collection[str], purpose: Purpose = Purpose.BOTH) -> str | None:
        """Why a CPU cannot stand for the class; None if it can.

        Args:
            instructions: Extensions of the CPU, as Linux names them.
            purpose: What is to be found out.
        """
        emulated = frozenset() if purpose is Purpose.BOTH else self.emulated(instructions)
        lacking = sorted(self.needs - set(instructions) - emulated)
        if not lacking:
            return None
        return f"this CPU has no {', '.join(lacking)}, which {self.title} needs"


CLASSES = {
    cls.name: cls
    for cls in (
        CpuClass(
            "avx512-vnni",
            "AVX-512 + VNNI",
            "Intel i9-10900X, i9-11900, Xeon since 2019, AMD since Zen 4",
            _AVX2 | _AVX512 | {"avx512_vnni"},
            frozenset({"avx512dq", "avx512cd", "avx512ifma", "avx512vbmi", "avx512_vbmi2"})
            | {"avx512_bitalg", "avx512_vpopcntdq"},
        ),
        CpuClass(
            "avx512",
            "AVX-512 without VNNI",
            "Intel i9-7900X to 9980XE",
            _AVX2 | _AVX512,
            frozenset({"avx512dq", "avx512cd"}),
        ),
        CpuClass(
            "avx2-vnni",
            "AVX2 + VNNI",
            "Intel i9-12900 to 14900",
            _AVX2 | {"avx_vnni"},
            hybrid=True,
        ),
        CpuClass("avx2", "AVX2", "Intel i9-9900 to 10900, AMD Zen to Zen 3", _AVX2),
    )
}
"""The most able first."""


def named(name: str) -> CpuClass:
    """The class of that name.

    Raises:
        InputError: There is none.
    """
    if name not in CLASSES:
        raise InputError(f"{name!r} is no class of CPUs{nearest_or_all(name, list(CLASSES))}")
    return CLASSES[name]


def class_of(instructions: Collection[str]) -> CpuClass | None:
    """The most able class that a CPU belongs to; None if it has no AVX2, or is no x86.

    Args:
        instructions: Its extensions, as Linux names them.
    """
    able = (cls for cls in CLASSES.values() if cls.why_not(instructions) is None)
    return next(able, None)


@dataclass(frozen=True)
class Restriction:
    """What a process sees of the CPU.

    Attributes:
        cls: The class that it is restricted to.
        emulated: Extensions that it is told of, and whose instructions others stand in for.
        purpose: What they stand in for; it says nothing where there are none.
    """

    cls: CpuClass
    emulated: frozenset[str] = frozenset()
    purpose: Purpose = Purpose.BOTH


_entered: list[Restriction] = []


def restrict(
    cls: CpuClass, emulated: Collection[str] = (), purpose: Purpose = Purpose.BOTH
) -> None:
    """Note that this process sees a CPU of that class from now on: see `Restriction`."""
    _entered[:] = [Restriction(cls, frozenset(emulated), purpose)]


def restriction() -> CpuClass | None:
    """The class that this process is restricted to; None if it sees the CPU as it is."""
    return _entered[0].cls if _entered else None


def emulated(purpose: Purpose | None = None) -> frozenset[str]:
    """The extensions whose instructions others stand in for in this process.

    Args:
        purpose: Only if that is what they stand in for; None for either.
    """
    if not _entered or (purpose is not None and _entered[0].purpose is not purpose):
        return frozenset()
    return _entered[0].emulated
