"""What a session really runs: every node with its operator, layout, types, provider and time.

ONNX Runtime's own profiler is asked, not the file: the graph that runs is the one after its
optimization, and nodes that a provider does not take run elsewhere.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import BuildError
from pipeline.core.network import Images
from pipeline.core.plain import read_json
from pipeline.targets.ort.session import Settings, start

_MOST_BYTES = 2_000_000_000
"""Of what the profiler writes: it is ours, and has a line for each operator of each run."""

_KERNEL = "_kernel_time"
_BLOCKED = ("Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Upsample")


@dataclass(frozen=True)
class NodeRun:
    """One node of the graph that runs.

    Attributes:
        name: Its name.
        operator: Its operator; of ONNX Runtime's own layout with the prefix "nchwc.".
        provider: The execution provider that ran it.
        inputs: Type and shape of every input, such as "float(1,32,56,56)".
        outputs: Type and shape of every output.
        milliseconds: Median time of its kernel.
    """

    name: str
    operator: str
    provider: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    milliseconds: float

    @property
    def type(self) -> str:
        """Type that it computes in: that of its first input, or of its output without inputs."""
        return (self.inputs or self.outputs or ("none",))[0].split("(")[0]

    @property
    def layout(self) -> str:
        """Which order of axes it works on, as far as the operator says."""
        if self.operator in ("ReorderInput", "ReorderOutput"):
            return "NCHW -> NCHWc" if self.operator == "ReorderInput" else "NCHWc -> NCHW"
        return "NCHWc" if self.operator.startswith("nchwc.") else ""


@dataclass(frozen=True)
class Row:
    """Nodes of the same operator and shapes, together.

    Attributes:
        operator: See `NodeRun`.
        layout: See `NodeRun`.
        shapes: Inputs -> outputs.
        type: Type that they compute in.
        nodes: How many there are.
        milliseconds: Their time in one run.
        share: Of the time of all nodes.
    """

    operator: str
    layout: str
    shapes: str
    type: str
    nodes: int
    milliseconds: float
    share: float


def trace(
    model: Path, settings: Settings, threads: int, images: Images, runs: int
) -> list[NodeRun]:
    """Run a model and say what ran, in order.

    Args:
        model: An ONNX file.
        settings: How to open it.
        threads: How many threads.
        images: Input, (batch, channels, height, width).
        runs: How many runs to take the median of; as many again, at most 10, warm up.

    Raises:
        ArtifactError, UnavailableError: See `session.start`.
    """
    with tempfile.TemporaryDirectory(prefix="ort-profile-") as folder:
        session = start(model, settings, threads, Path(folder) / "profile")
        feed = {session.get_inputs()[0].name: images}
        warmup = min(runs, 10)
        for _ in range(warmup + runs):
            session.run(None, feed)
        events = read_json(Path(session.end_profiling()), BuildError, _MOST_BYTES)
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)]
    times: dict[str, list[float]] = defaultdict(list)
    last: dict[str, dict[str, Any]] = {}
    for event in kernels:
        # Names alone may repeat; the index in the graph does not.
        key = event["args"].get("node_index", event["name"])
        times[key].append(event["dur"] / 1e3)
        last[key] = event
    return [_node(last[key], float(np.median(times[key][warmup:]))) for key in last]


def _node(event: dict[str, Any], milliseconds: float) -> NodeRun:
    args = event["args"]
    name = event["name"].removesuffix(_KERNEL)
    operator = args["op_name"]
    # The profiler leaves the domain out: NCHWc operators are known by the suffix of their names.
    if "nchwc" in name and operator in _BLOCKED:
        operator = f"nchwc.{operator}"
    return NodeRun(
        name,
        operator,
        args["provider"],
        _shapes(args["input_type_shape"]),
        _shapes(args["output_type_shape"]),
        milliseconds,
    )


def _shapes(listed: Iterable[dict[str, list[int]]]) -> tuple[str, ...]:
    return tuple(
        f"{kind}({','.join(map(str, shape))})" for entry in listed for kind, shape in entry.items()
    )


def counts(nodes: Iterable[NodeRun]) -> dict[str, dict[str, int]]:
    """Nodes that ran, by provider and type: {"CPUExecutionProvider": {"float": 512}}."""
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for node in nodes:
        counted[node.provider][node.type] += 1
    return {provider: dict(sorted(types.items())) for provider, types in sorted(counted.items())}


def table(nodes: Iterable[NodeRun]) -> list[Row]:
    """Nodes grouped by operator and shapes, the most expensive first."""
    groups: dict[tuple[str, str, str, str], list[NodeRun]] = defaultdict(list)
    for node in nodes:
        # Weights are part of the shapes' meaning; what they are called is not.
        shapes = f"{', '.join(node.inputs)} -> {', '.join(node.outputs)}"
        groups[node.operator, node.layout, shapes.replace("float", ""), node.type].append(node)
    total = sum(node.milliseconds for group in groups.values() for node in group) or 1.0
    rows = [
        Row(*key, len(group), spent, spent / total)
        for key, group in groups.items()
        for spent in [sum(node.milliseconds for node in group)]
    ]
    return sorted(rows, key=lambda row: -row.milliseconds)
