"""The stage that simplifies the exported graph."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.graphs.compare import TOLERANCE, random_images, relative_difference, run_graph
from pipeline.stages.export import GRAPH, ExportStep
from pipeline.steps.facts.graphs import SimplifyFacts
from pipeline.steps.keys import versions
from pipeline.steps.step import Context, Step


class SimplifyStep(Step):
    """The graph simplified by onnxsim, or as it was where that fails."""

    stage = "simplify"
    code = ("pipeline.stages.onnxsim_process", "pipeline.graphs.metadata")

    def __init__(self, context: Context, export: ExportStep) -> None:
        super().__init__(context, "onnx", [export])
        self.export = export

    def inputs(self) -> Mapping[str, Any]:
        """Whether to simplify at all."""
        return self.context.config.export.model_dump(include={"simplify"})

    def tools(self) -> dict[str, str]:
        """The simplifier."""
        return versions("onnxsim", "onnx")

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Simplify in a process of its own, and compare the results."""
        import onnx

        source = self.export.artifact()
        graph, result = source.path(GRAPH), folder / GRAPH
        network = source.network()
        why_not = self._simplify(graph, result, network.input_shape)
        if why_not:
            result.write_bytes(graph.read_bytes())
        before, after = (len(onnx.load(path).graph.node) for path in (graph, result))
        return SimplifyFacts(
            simplified=not why_not,
            why_not=why_not,
            nodes_before=before,
            nodes=after,
            network=network,
        ).to_facts()

    def _simplify(self, graph: Path, result: Path, shape: tuple[int, int, int]) -> str:
        """Simplify `graph` into `result`; returns why that did not work, if so."""
        settings = self.context.config.export
        if not settings.simplify:
            return "export.simplify is off"
        self.context.progress(0, 2, "onnxsim")
        why_not = simplify_apart(graph, result, settings.simplify_timeout_s)
        if why_not:
            self.context.log(f"simplify: {why_not}")
            return why_not
        self.context.progress(1, 2, "comparing")
        images = random_images(settings.tried_batch, shape)
        difference = relative_difference(run_graph(result, images), run_graph(graph, images))
        if not difference <= TOLERANCE:
            return f"onnxsim changed the logits by {difference:.1e} of the largest"
        return ""


def simplify_apart(graph: Path, result: Path, timeout_s: float) -> str:
    """Run onnxsim in a process of its own, which may crash or hang without harm.

    Returns:
        Why there is no result; "" if there is one.
    """
    command = [sys.executable, "-m", "pipeline.stages.onnxsim_process", str(graph), str(result)]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"onnxsim took more than {timeout_s:g} s"
    if run.returncode or not result.is_file():
        lines = (run.stderr or run.stdout).strip().splitlines()
        return f"onnxsim failed with code {run.returncode}: {lines[-1] if lines else 'no message'}"
    return ""
