"""8-bit forms for TensorRT: quantize/dequantize pairs around convolutions and linear layers.

Both libraries take quantization from the graph: symmetric, one scale for an activation, one for
each output channel of a weight, no zero points, no quantized biases. Weights are stored in 8 bits.
Everything else, matrix products of two activations included, is float16, and so are the scales: a
scale has the type of what it scales. They are rounded to float16 *before* values are quantized with
them, so that nothing is lost by it.

float8 has kernels for dense convolutions and linear layers only, see `Fp8Trt`.

Blocks of the network that lose too much keep float16. Which ones is decided by running the very
graph that is built, on the calibration images, with the strict executor. Where that lacks an
operator of the graph, all layers are quantized, and `why_not` tells the choice that nobody looked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from calibration.sample import CalibrationSet
from pipeline.core.errors import BuildError, UnsupportedOperatorError
from pipeline.steps.keys import versions
from pipeline.targets.forms import Form, FormJob

if TYPE_CHECKING:
    import onnx

    from calibration.ranges import Method, Scheme
    from calibration.table import Table
    from pipeline.graphs.qdq import Layer
    from pipeline.graphs.repair import Repaired

OPSET = 19
"""First opset in which quantization takes float16."""

FP8_CHANNELS = 16
"""Fewest input and output channels of a layer in float8."""

DECISION_VALUES = 512 * 3 * 64 * 64
DECISION_IMAGES = 128
"""Blocks are judged on so many input values, but at least on so many images: all of a usual
calibration set of small images, and 128 of 224 pixels, which take seconds for each judgement."""


class Quantized(Form):
    """What both 8-bit forms share.

    Attributes:
        stored: Type of the stored values, as `calibration.ranges.DType` names it.
    """

    calibrated = True
    observes = True
    stored: ClassVar[str]

    def takes(self, layer: Layer) -> bool:
        """Whether TensorRT has kernels for a layer with weights in this type."""
        return True

    def versions(self) -> dict[str, str]:
        """What decides the result: see `Form`."""
        return versions("onnx", "onnxruntime", "torch")

    def convert(self, job: FormJob, destination: Path) -> dict[str, Any]:
        """Write the quantized graph; see `Form`.

        Options: `method`, how ranges are chosen; `max_top1_drop`, the share of calibration images
        that may be lost before blocks are left in float16; one image is always allowed.
        """
        from calibration.ranges import method_named
        from calibration.show import rows
        from pipeline.graphs import float16, qdq

        source = _source(job.source)
        repaired = self.repaired(source, job)
        found = qdq.layers_of(source)
        layers = self._layers(found, job.source)
        if repaired is not None:
            raised = repaired.raises
            layers = [layer for layer in layers if not raised(source.graph.node[layer.node])]
        if not layers:
            raise self._no_layers(job.source)
        images = job.calibration()
        method = method_named(str(job.options.get("method", "mse")))
        schemes = _schemes(self.stored)
        table = _ranges(job, qdq.activations(layers), images, method, schemes[0])
        convert = repaired.conversion if repaired else None
        quantizer = qdq.Quantizer(source, layers, table.ranges, *schemes, convert)
        doubt: dict[str, Any] = {}
        try:
            search = _search(quantizer, job, images)
        except UnsupportedOperatorError as error:
            # A gap of the executor says nothing about the graph, only that nobody looked at it.
            search = {"excluded": []}
            doubt = {"why_not": f"which blocks lose too much was not measured: {error}"}
            job.log(f"all layers are quantized; {doubt['why_not']}")
        model, facts = quantizer.build(frozenset(search["excluded"]))
        float16.write_graph(model, destination)
        return {
            **facts,
            **doubt,
            "layers_without_kernels": [layer.name for layer in found if not self.takes(layer)],
            "method": str(method),
            "calibration_images": len(images.images),
            "warnings": list(table.warnings),
            "ranges": [row.to_dict() for row in rows(table)],
            "sensitivity": search,
            **(self.told(repaired) if repaired else {}),
        }

    def observed(self, source: Path) -> tuple[Path | onnx.ModelProto, Sequence[str]]:
        """See `Form.observed`."""
        from pipeline.graphs import qdq

        layers = self._layers(qdq.layers_of(_source(source)), source)
        return source, qdq.activations(layers)

    def _layers(self, found: Sequence[Layer], source: Path) -> list[Layer]:
        """Those that TensorRT runs in this type.

        Raises:
            BuildError: There are none.
        """
        layers = [layer for layer in found if self.takes(layer)]
        if not layers:
            raise self._no_layers(source)
        return layers

    def _no_layers(self, source: Path) -> BuildError:
        return BuildError(
            f"{source} has no convolution or linear layer that TensorRT runs in {self.stored}; "
            "build fp16"
        )

    def repaired(self, source: onnx.ModelProto, job: FormJob) -> Repaired | None:
        """How the network was repaired in float16 before it is quantized; None if it was not."""
        return None

    def told(self, repaired: Repaired) -> dict[str, Any]:
        """Facts about that."""
        return {}


class Int8Trt(Quantized):
    """int8 weights and activations where a layer has weights, float16 elsewhere."""

    name = "int8-trt"
    stored = "int8"


class Fp8Trt(Quantized):
    """float8 (e4m3) weights and activations in dense layers, float16 elsewhere.

    TensorRT's release notes say that it has no optimized float8 kernels for grouped and depthwise
    convolutions, and it finds none for few channels, such as those of a stem
    (github.com/NVIDIA/TensorRT, issues 4524 and 3987): there, pairs would only cost time and
    accuracy.
    """

    name = "fp8-trt"
    stored = "float8e4m3fn"

    def takes(self, layer: Layer) -> bool:
        """Dense, and with enough channels."""
        return layer.groups == 1 and layer.channels >= FP8_CHANNELS


def _source(path: Path) -> onnx.ModelProto:
    from pipeline.graphs import float16

    return float16.raise_opset(float16.read_graph(path), OPSET)


def _schemes(stored: str) -> tuple[Scheme, Scheme]:
    """Schemes of activations and of weights."""
    from calibration.ranges import ACTIVATIONS_INT8, FLOAT8_E4M3, WEIGHTS_INT8

    if stored == "int8":
        return ACTIVATIONS_INT8, WEIGHTS_INT8
    return FLOAT8_E4M3, FLOAT8_E4M3


def _ranges(
    job: FormJob, tensors: list[str], images: CalibrationSet, method: Method, scheme: Scheme
) -> Table:
    from calibration.table import make_table

    job.log(f"observing {len(tensors)} tensors over {len(images.images)} images")
    statistics = job.look(job.source, images.images, tensors)
    return make_table(statistics, method, scheme, images=len(images.images))


def _search(quantizer: Any, job: FormJob, images: CalibrationSet) -> dict[str, Any]:
    """Decide which blocks stay in float16."""
    from calibration.judge import Judge
    from calibration.kept import Kept
    from calibration.prefixes import SharedBeginnings
    from calibration.sensitivity import Groups, Limits, Outcome, search

    values = int(np.prod(images.images.shape[1:]))
    count = max(DECISION_IMAGES, DECISION_VALUES // values)
    judge = Judge(job.source, images, count, SharedBeginnings(), Kept(job.evaluations))

    def evaluate(excluded: Groups) -> Outcome:
        outcome = judge(quantizer.build(excluded)[0])
        kept = ", ".join(sorted(excluded)) or "nothing"
        job.log(f"top-1 {outcome.top1:.2%}, agreement {outcome.agreement:.2%}; float16: {kept}")
        return outcome

    found = search(
        quantizer.blocks,
        evaluate,
        baseline=judge.baseline,
        # A single image is less than so few of them can tell.
        limits=Limits(max(float(job.options.get("max_top1_drop", 0.003)), 1 / judge.count)),
        always_rank=False,
    )
    if not found.holds:
        job.log("the limit does not hold even with all blocks in float16")
    return {**found.to_dict(), "images": judge.count}
