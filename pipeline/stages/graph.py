"""Stages that make ONNX graphs: export, simplify, precision."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import BuildError
from pipeline.precisions import FORMS
from pipeline.precisions.base import CalibrationSet, FormJob
from pipeline.stages.base import Context, Step, versions
from pipeline.stages.samples import CalibrationStep, read_calibration

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from pipeline.targets.base import Images

GRAPH = "model.onnx"

TOLERANCE = 1e-4
"""Largest difference between two graphs' logits, relative to the largest logit, in float32."""

KEPT_METADATA = "pkg.torch.onnx.name_scopes"
"""Names of the modules around a node: what reports need. The exporter's other notes hold file paths
of the machine and would make the graph depend on where it was exported."""


class ExportStep(Step):
    """The fused module as an ONNX graph, with labels and preprocessing in its metadata."""

    stage = "export"

    def __init__(self, context: Context) -> None:
        super().__init__(context, "export")

    def inputs(self) -> Mapping[str, Any]:
        """Network, and how it is exported."""
        export = self.context.config.export
        return {
            "network": self.context.source.network_inputs(),
            "opset": export.opset,
            "batch": export.batch,
        }

    def made_from(self) -> dict[str, str]:
        """The checkpoint."""
        return {"checkpoint": self.context.source.checkpoint_hash}

    def tools(self) -> dict[str, str]:
        """The exporter's packages."""
        return versions("torch", "timm", "onnx", "onnxscript")

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Export, strip, describe and check the graph."""
        import onnx
        import torch

        source, settings = self.context.source, self.context.config.export
        self.context.progress(0, 3, "loading the network")
        module, network = source.fused(), source.network
        dynamic = settings.batch == "dynamic"
        images = random_images(settings.tried_batch, network.input_shape)
        self.context.progress(1, 3, "tracing")
        try:
            model = trace(module, images, opset=settings.opset, dynamic=dynamic)
        except Exception as error:  # the exporter raises whatever the network's code raises
            raise BuildError(
                f"{self.context.config.model.name} does not export to ONNX: {error}"
            ) from error
        labels = json.dumps(network.labels, ensure_ascii=False)
        onnx.helper.set_model_props(
            model,
            {
                "labels": labels,
                "preprocess": json.dumps(dict(network.preprocess)),
                "name": network.name,
                **network.description,
            },
        )
        onnx.save(model, folder / GRAPH)
        self.context.progress(2, 3, "comparing with PyTorch")
        with torch.no_grad():
            expected = module(torch.from_numpy(images)).numpy()
        difference = relative_difference(run_graph(folder / GRAPH, images), expected)
        if not difference <= TOLERANCE:
            raise BuildError(
                f"the exported graph differs from PyTorch by {difference:.1e} of the largest "
                f"logit, more than {TOLERANCE:.0e}: the exporter mistook the network"
            )
        return {
            "nodes": len(model.graph.node),
            "opset": settings.opset,
            "difference_to_pytorch": difference,
            "checkpoint": str(source.checkpoint()),
            "network": network.to_facts(),
        }


class SimplifyStep(Step):
    """The graph simplified by onnxsim, or as it was where that fails."""

    stage = "simplify"
    code = ("pipeline.stages.onnxsim_process", "pipeline.metadata")

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
        shape = tuple(source.facts["network"]["input_shape"])
        why_not = self._simplify(graph, result, (shape[0], shape[1], shape[2]))
        if why_not:
            result.write_bytes(graph.read_bytes())
        before, after = (len(onnx.load(path).graph.node) for path in (graph, result))
        return {
            "simplified": not why_not,
            "why_not": why_not,
            "nodes_before": before,
            "nodes": after,
            "network": source.facts["network"],
        }

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


class PrecisionStep(Step):
    """The graph in the form that a precision needs."""

    stage = "precision"

    def __init__(
        self, context: Context, form: str, simplify: SimplifyStep, calibration: CalibrationStep
    ) -> None:
        self.form = FORMS[form]
        needed = [simplify, calibration] if self.form.calibrated else [simplify]
        super().__init__(context, f"precision/{form}", needed)
        self.simplify, self.calibration = simplify, calibration
        own = (type(self.form).__module__, *self.form.code)
        self.code = (*own, "calibration") if self.form.calibrated else own

    def inputs(self) -> Mapping[str, Any]:
        """Settings of the calibration, for forms that need it."""
        return {"options": self._options()}

    def _options(self) -> dict[str, Any]:
        if not self.form.calibrated:
            return {}
        return self.context.config.calibration.model_dump(mode="json")

    def tools(self) -> dict[str, str]:
        """What the form says."""
        return self.form.versions()

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Convert the graph."""
        self.context.progress(0, None, f"making the {self.form.name} graph")
        source, step = self.simplify.artifact(), self.calibration

        def calibration() -> CalibrationSet:
            return read_calibration(step.artifact(), self.context.source)

        job = FormJob(
            source=source.path(GRAPH),
            network=self.context.source.network,
            options=self._options(),
            calibration=calibration,
            log=self.context.log,
        )
        return {**self.form.convert(job, folder / GRAPH), "network": source.facts["network"]}


def trace(
    module: nn.Module, images: Images, *, opset: int = 20, dynamic: bool = True
) -> onnx.ModelProto:
    """Export a module in evaluation mode as an ONNX graph from `image` to `logits`.

    Args:
        module: A classifier.
        images: (batch, channels, height, width): the shape that is traced. A dynamic batch must be
            traced with more than one image.
        opset: Version of the operator set.
        dynamic: The graph takes any batch, not only that of `images`.
    """
    import torch

    program = torch.onnx.export(
        module,
        (torch.from_numpy(images),),
        dynamo=True,
        opset_version=opset,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic else None,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _strip(model)
    return model


def random_images(batch: int, shape: tuple[int, int, int]) -> Images:
    """Images of seeded noise, (batch, *shape), to compare two forms of one network with."""
    return np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)


def relative_difference(logits: Images, expected: Images) -> float:
    """Largest difference, relative to the largest expected value; NaN if there is a NaN."""
    return float(np.abs(logits - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def run_graph(path: Path, images: Images) -> Images:
    """Logits of a float32 graph by ONNX Runtime, unoptimized: a reference, not a deployment."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    output: Images = session.run(None, {session.get_inputs()[0].name: images})[0]
    return output


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


def _strip(model: onnx.ModelProto) -> None:
    """Drop what depends on the machine or only serves the exporter's debugging."""
    for node in model.graph.node:
        node.doc_string = ""
        kept = [prop for prop in node.metadata_props if prop.key == KEPT_METADATA]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    del model.graph.metadata_props[:]
