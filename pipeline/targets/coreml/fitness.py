"""Is a package fit for the Neural Engine? Checks of the saved program, each with advice.

What the Neural Engine takes is not documented; the checks follow what Apple published about layouts
(machinelearning.apple.com/research/neural-engine-transformers). The last word has the compute plan
on a device, see `device.placement`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.network import Pixels
from pipeline.targets.findings import Finding

if TYPE_CHECKING:
    from pipeline.emulate.mil.program import Operation, Program


_MOVES = ("transpose", "reshape", "expand_dims", "squeeze", "pixel_shuffle", "space_to_depth")
_LARGE = 2**16
"""Elements from which on moving a tensor costs more than starting an operation."""

_ELSEWHERE = {
    "gather": "index with constants, or use split and concat",
    "gather_nd": "index with constants, or use split and concat",
    "scatter": "use concat or a multiplication with a mask",
    "scatter_nd": "use concat or a multiplication with a mask",
    "topk": "take the best classes outside of the model",
    "argsort": "sort outside of the model",
    "non_zero": "avoid shapes that depend on values",
    "cumsum": "use a matmul with a triangular matrix",
    "sin": "compute tables of angles once and store them",
    "cos": "compute tables of angles once and store them",
    "lstm": "use convolutions or attention",
    "gru": "use convolutions or attention",
    "while_loop": "unroll the loop",
    "cond": "compute both branches",
    "erf": "use the operation gelu",
}
"""Operations that run on the CPU or GPU, and what to write instead."""

_ALIGNED = 64
"""Bytes to which the last axis of a tensor is padded."""


def fitness(package: Path, pixels: Pixels | None = None) -> list[Finding]:
    """Check a saved package.

    Args:
        package: The package's folder.
        pixels: Real images, (batch, height, width, channels): with them the ranges of all tensors
            are checked too.

    Raises:
        ArtifactError: The package cannot be read.
    """
    from pipeline.emulate.mil.program import read_program

    program = read_program(package)
    findings = [check(program) for check in _CHECKS]
    if pixels is not None:
        findings.append(_ranges(package, pixels))
    return findings


def _run(program: Program) -> Iterator[Operation]:
    """Operations of the network itself: without constants, weights and the classifier."""
    for operation in program.operations:
        if operation.type not in ("const", "classify") and "constexpr" not in operation.type:
            yield operation


def _name(operation: Operation) -> str:
    return f"{operation.outputs[0][0]} ({operation.type})"


def _elements(shape: tuple[int | None, ...]) -> int:
    return math.prod(size or 1 for size in shape)


def _some(found: list[str], count: int = 5) -> tuple[str, ...]:
    return tuple(found[:count])


def _counts(program: Program) -> Finding:
    counts = Counter(operation.type for operation in _run(program))
    common = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(6))
    return Finding("operations", "fine", f"{counts.total()} operations: {common}")


def _ranks(program: Program) -> Finding:
    high = [
        _name(operation)
        for operation in _run(program)
        if any(len(kind.shape) > 4 for _, kind in operation.outputs)
    ]
    if not high:
        return Finding("rank", "fine", "no tensor has more than 4 axes")
    advice = "merge axes: the Neural Engine's tensors have 4"
    return Finding(
        "rank", "problem", f"{len(high)} tensors have 5 axes or more", advice, _some(high)
    )


def _unsupported(program: Program) -> Finding:
    found = [operation for operation in _run(program) if operation.type in _ELSEWHERE]
    if not found:
        return Finding("placement", "fine", "no operation is known to run elsewhere")
    kinds = sorted({operation.type for operation in found})
    advice = "; ".join(f"{kind}: {_ELSEWHERE[kind]}" for kind in kinds)
    names = _some([_name(operation) for operation in found])
    return Finding("placement", "problem", f"{len(found)} operations run elsewhere", advice, names)


def _float32(program: Program) -> Finding:
    # Normalization before the first cast and the outputs are float32 in every float16 package.
    names = [
        _name(operation)
        for operation in _run(program)
        if operation.outputs[0][1].dtype == "FLOAT32"
        and not operation.outputs[0][0].startswith("image__")
        and operation.type != "cast"
    ]
    if not names:
        return Finding("float16", "fine", "everything after normalization computes in float16")
    advice = "the Neural Engine computes in float16 only: use precision fp16 where it is in range"
    found = f"{len(names)} operations compute in float32"
    return Finding("float16", "problem", found, advice, _some(names))


def _moves(program: Program) -> Finding:
    large = [
        _name(operation)
        for operation in _run(program)
        if operation.type in _MOVES
        and any(_elements(kind.shape) >= _LARGE for _, kind in operation.outputs)
    ]
    counts = Counter(operation.type for operation in _run(program) if operation.type in _MOVES)
    found = f"{counts['transpose']} transposes, {counts['reshape']} reshapes, {len(large)} large"
    if not counts["transpose"] and not large:
        return Finding("layout", "fine", found)
    advice = "keep (batch, channels, …, positions) throughout; a transpose copies the tensor"
    return Finding("layout", "advice", found, advice, _some(large))


def _alignment(program: Program) -> Finding:
    wasteful, stored, padded = [], 0, 0
    for operation in _run(program):
        name, kind = operation.outputs[0]
        if kind.dtype != "FLOAT16" or not kind.shape:
            continue
        width = 2 * (kind.shape[-1] or 1)
        lines = _elements(kind.shape[:-1])
        stored += lines * width
        padded += lines * -(-width // _ALIGNED) * _ALIGNED
        if lines * width >= 2**14 and width * 4 <= _ALIGNED:
            wasteful.append(name)
    share = padded / max(stored, 1)
    found = f"padding of the last axis to {_ALIGNED} bytes makes tensors {share:.2f} times as large"
    if not wasteful:
        return Finding("alignment", "fine", found)
    advice = "put a longer axis last: merge height and width, or use a larger image"
    return Finding("alignment", "advice", found, advice, _some(wasteful))


def _ranges(package: Path, pixels: Pixels) -> Finding:
    from pipeline.emulate.mil.executor import MilExecutor

    executor = MilExecutor(package, precision="float32", record=True)
    executor.predict(pixels)
    ranges = [entry for entry in executor.ranges() if not entry.name.startswith("image__")]
    widest = max(ranges, key=lambda entry: entry.largest)
    over = [entry for entry in ranges if entry.overflows]
    small = sum(entry.subnormals + entry.vanished for entry in ranges)
    total = sum(entry.elements for entry in ranges)
    found = (
        f"largest magnitude {widest.largest:.4g} in {widest.name}, "
        f"{sum(entry.overflows for entry in over)} overflows, {small / max(total, 1):.2%} of the "
        f"values below float16's normal range, on {len(pixels)} images"
    )
    if over:
        advice = "rescale what grows, or use precision mixed with these operations in float32"
        names = _some([f"{entry.name} ({entry.operation})" for entry in over])
        return Finding("range", "problem", found, advice, names)
    if widest.headroom < 8:
        return Finding("range", "advice", found, "less than 8 times the range is left: watch it")
    return Finding("range", "fine", found)


_CHECKS: tuple[Callable[[Program], Finding], ...] = (
    _counts,
    _ranks,
    _unsupported,
    _float32,
    _moves,
    _alignment,
)
