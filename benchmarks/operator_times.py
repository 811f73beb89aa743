"""Where the time of a network goes on this CPU, by kinds of operators, beside the limit.

    python benchmarks/operator_times.py --model care_s0
    python benchmarks/operator_times.py --as-cpu avx2-vnni --docs docs/benchmarks.md

The same graphs and builds as in cpu_latency.py, one image, one thread, by ONNX Runtime's profiler:
all take turns, of every node the least of its turns' medians counts, summed up by kind. "limit" is
what the dense products and the depthwise convolutions would take in float32 at the highest rate
that a single large operator of their kind reaches; what a build takes beyond it, it takes for the
operators of the other rows, or because its own are smaller than that one. The profiler itself takes
some microseconds a node.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnx
from cpu_latency import (
    BASELINE,
    BY_TANH,
    as_cpu_option,
    build_by_tanh,
    build_ours,
    export_graphs,
    highest_rates,
    kernels,
    play,
    work,
)
from documents import fill
from networks import NETWORKS, SHAPE

from pipeline.core import machine
from pipeline.graphs.links import attribute
from pipeline.steps.artifact import Artifact
from pipeline.targets.ort.profile import NodeRun, trace
from pipeline.targets.ort.session import Settings
from pipeline.targets.ort.target import how_to_open

DENSE, DEPTHWISE, LINEAR = "dense convolutions", "depthwise convolutions", "matrix products"
REST = "the rest"
KINDS: Mapping[str, frozenset[str]] = {
    LINEAR: frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "QGemm", "QLinearMatMul",
                       "MatMulInteger", "MatMulIntegerToFloat"}),
    "GELU": frozenset({"Gelu", "BiasGelu", "FastGelu", "QuickGelu", "Erf", "Tanh",
                       "QLinearSigmoid"}),
    "quantize, dequantize": frozenset({"QuantizeLinear", "DequantizeLinear",
                                       "DynamicQuantizeLinear"}),
    "sums, products and the like": frozenset({"Add", "Mul", "Div", "Sub", "Min", "Max", "Exp",
                                              "Relu", "Clip", "Elu", "Reciprocal", "QLinearAdd",
                                              "QLinearMul"}),
    "joins and splits": frozenset({"Concat", "Split", "Slice", "QLinearConcat"}),
    "reorders between layouts": frozenset({"ReorderInput", "ReorderOutput"}),
}  # fmt: skip
TURNS = 5
"""Of each way to run: the machine is not as fast in one second as in the next."""

_CONVOLUTIONS = frozenset({"Conv", "nchwc.Conv", "FusedConv", "QLinearConv", "ConvInteger"})
_TOKEN = re.compile(r"_token_\d+$")
"""Ends the names of nodes that ONNX Runtime makes of several."""

_SHAPE = re.compile(r"\(([\d,]+)\)")


def kind_of(node: NodeRun, grouped: Collection[str] = frozenset()) -> str:
    """Which row of the table a node belongs to.

    Args:
        node: What ran.
        grouped: Names of the graph's depthwise convolutions: the profiler knows no filters of those
            in 8 bits, which are packed when the graph is opened.
    """
    if node.operator in _CONVOLUTIONS:
        filters = next((dims for dims in map(_dims, node.inputs[1:]) if len(dims) == 4), None)
        if filters is None:
            return DEPTHWISE if _TOKEN.sub("", node.name) in grouped else DENSE
        return DEPTHWISE if filters[1] == 1 and filters[0] > 1 else DENSE
    return next((kind for kind, names in KINDS.items() if node.operator in names), REST)


def depthwise(model: Path) -> frozenset[str]:
    """Names of the depthwise convolutions of a file."""
    nodes = [node for node in onnx.load(model).graph.node if node.op_type == "Conv"]
    return frozenset(node.name for node in nodes if attribute(node, "group", 1) > 1)


def _dims(described: str) -> list[int]:
    found = _SHAPE.search(described)
    return [int(side) for side in found[1].split(",")] if found else []


@dataclass(frozen=True)
class Column:
    """What one way to run a network takes.

    Attributes:
        name: For people.
        milliseconds: By kind of operators; kinds that it has none of are missing.
        nodes: How many nodes it runs; 0 for the limit.
    """

    name: str
    milliseconds: Mapping[str, float]
    nodes: int = 0


@dataclass(frozen=True)
class Way:
    """One way to run a network.

    Attributes:
        name: For people.
        model: An ONNX file.
        settings: How to open it.
    """

    name: str
    model: Path
    settings: Settings


def measure(ways: Sequence[Way], runs: int, turns: int = TURNS) -> list[Column]:
    """Run each way on one image and one thread, in turns, and sum up its nodes' times."""
    image = np.random.default_rng(0).standard_normal((1, *SHAPE)).astype(np.float32)
    seen: list[list[list[NodeRun]]] = [[] for _ in ways]
    for _ in range(turns):
        for way, found in zip(ways, seen, strict=True):
            found.append(trace(way.model, way.settings, 1, image, max(1, runs // turns)))
    return [
        Column(way.name, _sums(found, depthwise(way.model)), len(found[0]))
        for way, found in zip(ways, seen, strict=True)
    ]


def _sums(turns: Sequence[Sequence[NodeRun]], grouped: Collection[str]) -> dict[str, float]:
    """Milliseconds by kind: of every node the least of its turns, which is the least disturbed."""
    sums: Counter[str] = Counter()
    for nodes in zip(*turns, strict=True):
        sums[kind_of(nodes[0], grouped)] += min(node.milliseconds for node in nodes)
    return dict(sums)


def limit(exact: Path) -> Column:
    """What dense products and depthwise convolutions would take at the highest rates."""
    parts = zip((DENSE, DEPTHWISE), work(exact), highest_rates(1), strict=True)
    return Column("limit, float32", {kind: 1e3 * flops / rate for kind, flops, rate in parts})


def columns(model: str, folder: Path, runs: int) -> list[Column]:
    """All ways to run a network."""
    graphs = export_graphs(model, folder)
    ours = build_ours(model, graphs["exact"], folder, int8=True)
    by_tanh = build_by_tanh(model, graphs["exact"], folder)
    built = {"ours fp32": ours["fp32"]}
    built |= {} if by_tanh.missing else {BY_TANH: Path(by_tanh.source)}
    built["ours int8"] = ours["int8"]
    ways = [
        Way(BASELINE, graphs["published"], Settings()),
        Way("exact form", graphs["exact"], Settings()),
        *(Way(name, *how_to_open(Artifact.read(path))) for name, path in built.items()),
    ]
    return [*measure(ways, runs), limit(graphs["exact"])]


def table(model: str, found: Sequence[Column]) -> str:
    """A Markdown table of the kinds that occur."""
    kinds = [DENSE, DEPTHWISE, *KINDS, REST]
    lines = [
        f"| {model}, ms | {' | '.join(each.name for each in found)} |",
        f"|---{'|---' * len(found)}|",
    ]
    for kind in kinds:
        cells = [each.milliseconds.get(kind) for each in found]
        if any(cell is not None for cell in cells):
            told = ["" if cell is None else f"{cell:.2f}" for cell in cells]
            lines.append(f"| {kind} | {' | '.join(told)} |")
    sums = [sum(each.milliseconds.values()) for each in found]
    told = [
        f"**{total:.1f}**" + (f" ({each.nodes} nodes)" if each.nodes else "")
        for total, each in zip(sums, found, strict=True)
    ]
    lines.append(f"| **all** | {' | '.join(told)} |")
    return "\n".join(lines)


def markers(as_cpu: str | None) -> str:
    """The name of the tables in the document."""
    return "operator times" + (f" as {as_cpu}" if as_cpu else "")


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--model", "models", multiple=True, type=click.Choice(NETWORKS), help="Default: all.")
@click.option("--runs", default=100, show_default=True, type=click.IntRange(1), help="Of each.")
@click.option("--docs", type=click.Path(path_type=Path), help="Document that gets the tables.")
@as_cpu_option
def main(models: tuple[str, ...], runs: int, docs: Path | None, as_cpu: str | None) -> None:
    play(as_cpu)
    here = f"cpu {machine.cpu_name()}, date {time.strftime('%Y-%m-%d')}, load {machine.load()}, "
    here += f"kernels of {kernels()}; {runs} runs."
    parts = [here]
    for model in models or NETWORKS:
        with tempfile.TemporaryDirectory(prefix="operator-times-") as name:
            parts.append(table(model, columns(model, Path(name), runs)))
        click.echo(parts[-1])
    if docs is not None:
        fill(docs, markers(as_cpu), "\n\n".join(parts))


if __name__ == "__main__":
    sys.exit(main())
