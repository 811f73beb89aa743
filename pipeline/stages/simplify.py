"""The stage that simplifies the exported graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.graphs.compare import TOLERANCE, images_for, relative_difference, run_graph
from pipeline.stages import onnxsim_process
from pipeline.stages.context import RunContext, StageStep
from pipeline.stages.names import GRAPH
from pipeline.steps.facts.graphs import SimplifyFacts
from pipeline.steps.keys import versions
from pipeline.steps.step import Elsewhere

if TYPE_CHECKING:
    from pipeline.stages.export import ExportStep

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Refusal:
    """Why a graph was not simplified.

    Attributes:
        why: The reason, for people.
        fault: It was the tool that crashed or hung, whatever the graph is.
    """

    why: str
    fault: bool = False


class SimplifyStep(StageStep):
    """The graph simplified by onnxsim, or as it was where that fails."""

    stage = "simplify"

    def __init__(self, context: RunContext, export: ExportStep) -> None:
        super().__init__(context, "onnx", [export])
        self.export = export

    def inputs(self) -> Mapping[str, Any]:
        """Whether to simplify at all."""
        settings = self.context.config.export.model_dump(include={"simplify"})
        return {"settings export": settings}

    def tools(self) -> dict[str, str]:
        """The simplifier."""
        return versions("onnxsim", "onnx")

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Simplify in a process of its own, and compare the results."""
        import onnx

        source = self.export.artifact()
        graph, result = source.path(GRAPH), folder / GRAPH
        network = source.network()
        refusal = self._simplify(graph, result, network.input_shape)
        if refusal:
            self.context.log(f"simplify: {refusal.why}")
            result.write_bytes(graph.read_bytes())
        if refusal and refusal.fault:
            self.notes.append(f"{refusal.why}; the graph goes on as it was exported")
        before, after = (len(onnx.load(path).graph.node) for path in (graph, result))
        return SimplifyFacts(
            simplified=refusal is None,
            why_not=refusal.why if refusal else "",
            nodes_before=before,
            nodes=after,
            network=network,
            fault=refusal is not None and refusal.fault,
        ).to_facts()

    def stale(self, *, verify: bool = True, elsewhere: Elsewhere | None = None) -> str | None:
        """See `Step.stale`; a crash of the tool is no property of the graph: it is tried again."""
        why = super().stale(verify=verify, elsewhere=elsewhere)
        if why is None and self.artifact().facts.get("fault"):
            return "onnxsim failed the last time"
        return why

    def _simplify(self, graph: Path, result: Path, shape: tuple[int, int, int]) -> Refusal | None:
        """Simplify `graph` into `result`; returns why that did not work, if so."""
        settings = self.context.config.export
        if not settings.simplify:
            return Refusal("export.simplify is off")
        self.context.progress(0, 2, "onnxsim")
        refusal = simplify_apart(graph, result, settings.simplify_timeout_s)
        if refusal:
            return refusal
        self.context.progress(1, 2, "comparing")
        images = images_for(graph, shape)
        difference = relative_difference(run_graph(result, images), run_graph(graph, images))
        if not difference <= TOLERANCE:
            return Refusal(f"onnxsim changed the logits by {difference:.1e} of the largest")
        return None


def simplify_apart(graph: Path, result: Path, timeout_s: float) -> Refusal | None:
    """Run onnxsim in a process of its own, which may crash or hang without harm.

    Returns:
        Why there is no result; None if there is one.
    """
    # Without -P, files of the working directory, whatever they are, would be imported first.
    command = [sys.executable, "-P", "-m", onnxsim_process.__name__, str(graph), str(result)]
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    try:
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Refusal(f"onnxsim took more than {timeout_s:g} s", fault=True)
    if run.returncode or not result.is_file():
        lines = (run.stderr or run.stdout).strip().splitlines()
        said = lines[-1] if lines else "no message"
        why = f"onnxsim failed with code {run.returncode}: {said}"
        return Refusal(why, fault=run.returncode < 0)
    return None
