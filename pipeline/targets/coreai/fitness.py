"""Is an asset fit for the device? Checks of the saved program, each with advice.

What Core AI's compiler does on a device is not documented. Beside the range of float16 the checks
are of what people reported: wrong numbers without an error, which no runtime on Linux shows.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.core.network import Images
from pipeline.targets.coreai.program import Graph, Operation, Program
from pipeline.targets.findings import Finding, Level

_REPORTS = "https://github.com/apple/coreai-torch/issues"
_SELECTS = {"argmax", "argsort", "gather_along_axis", "gather_nd", "sort"}
_HARD = {"minimum", "hardswish", "hard_sigmoid", "hardsigmoid"}
_PRODUCTS = {"batch_matmul"}
_FLOAT16_LIMIT = 65504.0
_HEADROOM = 8


def fitness(program: Program, images: Images | None = None) -> list[Finding]:
    """Check a program.

    Args:
        program: What was saved.
        images: Real images, preprocessed, (batch, channels, height, width): with them the range of
            float16 is checked too.
    """
    findings = [check(program) for check in _CHECKS]
    if images is not None:
        findings.append(_range(program, images))
    return findings


def _counts(program: Program) -> Finding:
    counts = program.counts()
    common = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(6))
    return Finding("operations", "fine", f"{counts.total()} operations: {common}")


def _is_half(program: Program) -> bool:
    return any(
        kind.dtype == "f16" for operation in program.operations() for _, kind in operation.outputs
    )


def _default_units(program: Program) -> Finding:
    if not _is_half(program):
        return Finding("float16 by default", "fine", "everything computes in float32")
    advice = (
        "on a device compare the logits of the default with those of cpu_only before you ship: "
        f"a float16 model gave wrong numbers without an error there ({_REPORTS}/115); bench "
        "--target coreai --device mac and the program of export coreml-bench --target coreai do so"
    )
    found = "computes in float16, which the default may give to the Neural Engine"
    return Finding("float16 by default", "advice", found, advice)


def _selection(program: Program) -> Finding:
    found = [operation.kind for operation in program.operations() if operation.kind in _SELECTS]
    if not found:
        return Finding("selection", "fine", "no argmax, sort or gather: logits are the answer")
    advice = (
        "leave argmax, topk and gather to the app: with the default specialization an argmax gave "
        f"wrong classes on an iPhone 17 Pro ({_REPORTS}/116)"
    )
    return Finding("selection", "advice", f"{len(found)} operations select", advice, _some(found))


def _products(program: Program) -> Finding:
    found = [
        operation.kind
        for graph in program.graphs.values()
        for operation in graph.operations
        if operation.kind in _PRODUCTS and len(operation.outputs[0][1].shape) == 2
    ]
    if not found:
        return Finding("products", "fine", "no product of matrices with two axes")
    hard = any(_has_hard_activation(graph) for graph in program.graphs.values())
    advice = (
        "write it as a 1x1 convolution: followed by a hardswish it gave wrong numbers on the "
        f"Neural Engine ({_REPORTS}/51)"
    )
    level: Level = "problem" if hard else "advice"
    named = f"{len(found)} products of matrices with two axes"
    return Finding("products", level, named, advice, _some(found))


def _has_hard_activation(graph: Graph) -> bool:
    return any(operation.kind in _HARD for operation in graph.operations)


def _ranks(program: Program) -> Finding:
    high = [_name(operation) for operation in program.operations() if _rank(operation) > 4]
    if not high:
        return Finding("rank", "fine", "no tensor has more than 4 axes")
    advice = "merge axes: the Neural Engine's tensors have 4"
    return Finding(
        "rank", "advice", f"{len(high)} tensors have 5 axes or more", advice, _some(high)
    )


def _rank(operation: Operation) -> int:
    return max(len(kind.shape) for _, kind in operation.outputs)


def _name(operation: Operation) -> str:
    shape = "x".join(map(str, operation.outputs[0][1].shape))
    return f"{operation.kind} {shape}"


def _range(program: Program, images: Images) -> Finding:
    from pipeline.targets.coreai.executor import Executor

    executor = Executor(program, half=False, record=True)
    executor(images)
    largest = executor.largest()
    if not largest:
        return Finding("range", "fine", "nothing is kept in float16")
    over = [name for name, value in largest.items() if not value <= _FLOAT16_LIMIT]
    where, most = max(largest.items(), key=lambda item: item[1])
    found = f"largest magnitude {most:.4g} in {where}, on {len(images)} images"
    if over:
        advice = "rescale what grows, or use precision fp32"
        return Finding("range", "problem", found, advice, _some(over))
    if most * _HEADROOM > _FLOAT16_LIMIT:
        advice = f"less than {_HEADROOM} times the range is left: watch it"
        return Finding("range", "advice", found, advice)
    return Finding("range", "fine", found)


def _some(found: list[str], count: int = 5) -> tuple[str, ...]:
    return tuple(found[:count])


_CHECKS: tuple[Callable[[Program], Finding], ...] = (
    _counts,
    _ranks,
    _products,
    _selection,
    _default_units,
)
