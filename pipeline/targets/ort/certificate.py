"""On which CPUs an 8-bit graph gives the answers that were judged.

x86 CPUs without VNNI add two products in 16 bits, with saturation, see `calibration.pairs`. Where
no weights allow that, the graph is certified for every class of CPUs by construction. Else it is
certified for those with VNNI, and an emulation says what the others make of it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.cpu_classes import CLASSES, class_of
from pipeline.core.figures import State
from pipeline.core.machine import visible_instructions
from pipeline.core.plain import Plain

if TYPE_CHECKING:
    import onnx

    from calibration.judge import Graph, Judge
    from pipeline.core.network import Images, Logits
    from pipeline.emulate.onnx.saturating import Saturation

X86 = frozenset({"x86_64", "AMD64"})
"""What systems call it: Linux and macOS, and Windows."""

WITHOUT_VNNI = f"{State.EMULATED}: x86 without VNNI"


class CertificateWarning(UserWarning):
    """A graph is opened on a CPU that it is not certified for."""


@dataclass(frozen=True)
class UnsafeLayer(Plain):
    """A layer whose pairs of products can saturate.

    Attributes:
        layer: Name of its output.
        pairs: Share of the pairs of its weights that some activations make saturate.
        saturated: Share of the products that saturated over the calibration images; None if
            nothing was run.
        largest: Largest magnitude of two products' sum; None likewise.
        error: Relative error of the layer's sums by that alone; None likewise.
    """

    layer: str
    pairs: float
    saturated: float | None = None
    largest: int | None = None
    error: float | None = None


@dataclass(frozen=True)
class Certificate(Plain):
    """Where a graph gives the answers that were judged.

    Attributes:
        certified_for: Names of classes of CPUs.
        measured_on: The class of the CPU that judged it; "" if it is none.
        unsafe: Layers that can saturate elsewhere.
        state: How the figures below came about; "" if there are none.
        top1: Share of calibration images with the right class on CPUs without VNNI.
        agreement: Share with float32's class there.
        logit_error: Error of the logits there.
    """

    certified_for: tuple[str, ...]
    measured_on: str
    unsafe: tuple[UnsafeLayer, ...] = ()
    state: str = ""
    top1: float | None = None
    agreement: float | None = None
    logit_error: float | None = None


def unsafe_layers(model: onnx.ModelProto) -> list[UnsafeLayer]:
    """Layers with 8-bit weights that some activations make saturate, in the order of the graph."""
    from onnx import numpy_helper

    from calibration.pairs import excess

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        maker = makers.get(node.input[1]) if node.op_type in ("Conv", "Gemm") else None
        if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in constants:
            continue
        weight = numpy_helper.to_array(constants[maker.input[0]])
        if weight.dtype != np.int8 or _is_depthwise(node, weight):
            continue
        over = excess(weight, _axis(node))
        if over.any():
            found.append(UnsafeLayer(node.output[0], float((over > 0).mean())))
    return found


def _is_depthwise(node: onnx.NodeProto, weight: np.ndarray) -> bool:
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    return node.op_type == "Conv" and weight.shape[1] == 1 and groups == len(weight) > 1


def _axis(node: onnx.NodeProto) -> int:
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def here() -> str:
    """Name of the class of this CPU, as a runtime sees it; "" if it is none."""
    found = class_of(visible_instructions())
    return found.name if found else ""


def certify(model: onnx.ModelProto, judge: Judge | None = None) -> Certificate:
    """Say where a graph gives the answers that were judged.

    Args:
        model: A graph with quantize/dequantize pairs.
        judge: Judges an emulation on calibration images, where some layers are unsafe; None to go
            without.
    """
    unsafe = unsafe_layers(model)
    classes = tuple(name for name, cls in CLASSES.items() if cls.vnni or not unsafe)
    if not unsafe or judge is None:
        return Certificate(classes, here(), tuple(unsafe))
    saturation: dict[str, Saturation] = {}
    outcome = judge.by(_emulation(saturation), model)
    return Certificate(
        classes,
        here(),
        tuple(_with_figures(layer, saturation) for layer in unsafe),
        WITHOUT_VNNI,
        outcome.top1,
        outcome.agreement,
        outcome.logit_error,
    )


def _emulation(found: dict[str, Saturation]) -> Callable[[Graph, Images], Logits]:
    """What a CPU without VNNI answers; fills in what saturated."""

    def run(model: Graph, images: Images) -> Logits:
        from pipeline.emulate.onnx.saturating import SaturatingExecutor

        executor = SaturatingExecutor(model)
        logits = executor.run_all(images)
        found.update(executor.saturation())
        return logits

    return run


def _with_figures(layer: UnsafeLayer, found: dict[str, Saturation]) -> UnsafeLayer:
    seen = found.get(layer.layer)
    if seen is None:
        return layer
    return UnsafeLayer(layer.layer, layer.pairs, seen.share, seen.largest, seen.error)


def of_graph(graph: Path) -> Certificate:
    """The certificate of a file, without an emulation."""
    import onnx

    return certify(onnx.load(graph))


def warning(certified_for: tuple[str, ...], name: str) -> str | None:
    """What to say where an artifact is opened on a CPU that it is not certified for; None if it is.

    Args:
        certified_for: Names of classes.
        name: What is opened.
    """
    cls = class_of(visible_instructions())
    if not set(CLASSES) - set(certified_for) or (cls is not None and cls.name in certified_for):
        return None
    if cls is None and platform.machine() not in X86:
        return None  # other kernels, which add in 32 bits
    titles = ", ".join(CLASSES[known].title for known in certified_for if known in CLASSES)
    here, do = (cls.title, "saturate") if cls else ("whose class is not known", "may saturate")
    return (
        f"{name} is certified for {titles}, not for this CPU ({here}): 8-bit products {do} here, "
        "and accuracy is not what was judged; build it with calibration.cpus: any"
    )
