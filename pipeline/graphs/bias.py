"""Bias correction: the mean error that quantization leaves in a layer's output goes into its bias.

Rounding weights and clipping activations shifts the mean of a layer's output, channel by channel,
and later layers carry the shift on (Nagel et al., "Data-free quantization through weight
equalization and bias correction", ICCV 2019; here with measured means).

Layers must be corrected one after the other: if all measured their errors at once, each would mend
again what those before it have mended, and in a deep network that diverges. So the correction is
part of the run: the quantized graph gets, behind every layer, an addition of the float network's
mean less its own, and one run over a batch corrects every layer with all earlier ones corrected.

    correction = correct_biases(model, quantize(model), images)
    quantized = quantize(correction.model)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from calibration.histogram import Doubles
from calibration.observe import fixed_batch, open_session
from pipeline.core.errors import BuildError, DataError
from pipeline.core.network import whole_batches
from pipeline.graphs.links import Links, attribute

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from pipeline.core.network import Images

BATCH = 32
"""Images of a run: a layer's mean is taken over them and over all positions."""

_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})

Means = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with a constant weight, and where its bias enters.

    Attributes:
        node: Name of the node that multiplies.
        output: The tensor after the bias.
        channels: Number of its channels.
        positions: Number of axes behind that of the channels.
    """

    node: str
    output: str
    channels: int
    positions: int


@dataclass(frozen=True)
class Correction:
    """A float graph with corrected biases.

    Attributes:
        model: The graph; the one that was given is unchanged.
        errors: What was subtracted from the biases, (channels,), by output of the layers.
    """

    model: ModelProto
    errors: Mapping[str, Doubles]


def layers(model: ModelProto) -> list[Layer]:
    """All Conv, Gemm and MatMul nodes with constant weights, in the order of the graph."""
    links = Links(model.graph)
    found = []
    for node in model.graph.node:
        weight = links.constant(node, 1)
        if node.op_type not in _LAYERS or weight is None or weight.ndim < 2:
            continue
        bias = _bias_add(links, node)
        output = (bias[0] if bias else node).output[0]
        first = node.op_type == "Conv" or attribute(node, "transB", 0)
        positions = weight.ndim - 2 if node.op_type == "Conv" else 0
        found.append(Layer(node.name, output, weight.shape[0 if first else -1], positions))
    return found


def _bias_add(links: Links, node: NodeProto) -> tuple[NodeProto, int] | None:
    """The Add that gives a MatMul its bias, and the place of the bias in it."""
    reader = links.only_reader(node.output[0])
    weight = links.constant(node, 1)
    if node.op_type != "MatMul" or reader is None or reader.op_type != "Add" or weight is None:
        return None
    place = 1 - list(reader.input).index(node.output[0])
    bias = links.constant(reader, place)
    return (reader, place) if bias is not None and bias.shape == weight.shape[-1:] else None


def mean_errors(
    quantized: ModelProto,
    reference: ModelProto,
    images: Images,
    chosen: Sequence[Layer],
    *,
    batch: int = BATCH,
    threads: int | None = None,
) -> dict[str, Doubles]:
    """Mean error of layers' outputs, by channel, without correcting any.

    Args:
        quantized: The quantized graph. It must name the layers' outputs as the float one does.
        reference: The float graph.
        images: (images, channels, height, width).
        chosen: Which layers.
        batch: Images of one run; a graph with a fixed batch takes its own.
        threads: CPU threads; None for as many as make a difference on images of this size.

    Returns:
        By output, what the quantized graph gives more than the reference, (channels,).

    Raises:
        BuildError: The quantized graph lacks one of the outputs.
        DataError: There are no images, or a mean is not finite.
    """
    float_means = _open_means(reference, chosen, threads)
    quantized_means = _open_means(quantized, chosen, threads)

    def errors(part: Images) -> Means:
        mine, wanted = quantized_means(part), float_means(part)
        return {name: mine[name] - wanted[name] for name in mine}

    return _averaged(errors, images, chosen, batch, fixed_batch(reference))


def _averaged(
    measure: Callable[[Images], Means],
    images: Images,
    chosen: Sequence[Layer],
    batch: int,
    fixed: int | None,
) -> dict[str, Doubles]:
    """Average over the images of what is measured batch by batch, in the graph's own if fixed."""
    if not len(images):
        raise DataError("there are no calibration images to measure biases with")
    images = whole_batches(images, fixed or 1)
    total = {layer.output: np.zeros(layer.channels) for layer in chosen}
    for part in _batches(images, fixed or batch):
        for name, values in measure(part).items():
            if not np.isfinite(values).all():
                raise DataError(f"tensor {name} is not finite on the calibration images")
            total[name] += values * (len(part) / len(images))
    return total


def _batches(images: Images, size: int) -> Iterator[Images]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _copy(model: ModelProto) -> ModelProto:
    from onnx import ModelProto

    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def _open_means(
    model: ModelProto, chosen: Sequence[Layer], threads: int | None
) -> Callable[[Images], Means]:
    """A function from images to the mean of every layer's output, by channel."""
    copy = _copy(model)
    _require_outputs(copy, chosen)
    means = {layer.output: _append_mean(copy, layer, layer.output) for layer in chosen}
    run = open_session(copy, list(means.values()), threads)
    names = {mean: output for output, mean in means.items()}
    return lambda images: {names[mean]: value for mean, value in run(images).items()}


def _require_outputs(model: ModelProto, chosen: Sequence[Layer]) -> None:
    made = {name for node in model.graph.node for name in node.output}
    for layer in chosen:
        if layer.output not in made:
            raise BuildError(
                f"the quantized graph has no tensor {layer.output}: the quantizer must keep the "
                "names of layers' outputs for bias correction"
            )


def _append_mean(model: ModelProto, layer: Layer, tensor: str) -> str:
    """Append nodes that average a layer's output by channel; gives the mean's name."""
    from onnx import helper, numpy_helper

    # To (batch, channels, positions) or (rows, channels), whatever the number of axes.
    shape = [0, layer.channels, -1] if layer.positions else [-1, layer.channels]
    axes = [0, 2] if layer.positions else [0]
    name = f"{layer.output}_mean"
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array(shape), f"{name}_shape"))
    reshape = helper.make_node("Reshape", [tensor, f"{name}_shape"], [f"{name}_flat"])
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset < 18:  # the axes became an input
        mean = helper.make_node("ReduceMean", [f"{name}_flat"], [name], axes=axes, keepdims=0)
    else:
        graph.initializer.append(numpy_helper.from_array(np.array(axes), f"{name}_axes"))
        inputs = [f"{name}_flat", f"{name}_axes"]
        mean = helper.make_node("ReduceMean", inputs, [name], keepdims=0)
    graph.node.extend([reshape, mean])
    return name


def fold(model: ModelProto, errors: Mapping[str, Doubles]) -> ModelProto:
    """Subtract errors from the biases of layers; layers without a bias get one.

    Args:
        model: The float graph; left unchanged.
        errors: By output of the layer, (channels,), see `mean_errors`.

    Raises:
        DataError: An output is not that of a layer, or a shape does not fit.
    """
    copy = _copy(model)
    outputs = {layer.output for layer in layers(copy)}
    links = Links(copy.graph)
    for output, error in errors.items():
        if output not in outputs:
            raise DataError(f"no Conv, Gemm or MatMul of the graph gives the tensor {output}")
        made_by = links.producer[output]
        if made_by.op_type == "Add":
            bias_place = 1 if links.constant(made_by, 1) is not None else 0
            _shift(links, made_by, bias_place, -error)
        elif made_by.op_type == "MatMul":
            _append_bias(links, made_by, -error)
            links = Links(copy.graph)  # of a graph with one node more
        else:
            scale = attribute(made_by, "beta", 1.0) if made_by.op_type == "Gemm" else 1.0
            _shift(links, made_by, 2, -error / scale)
    return copy


def _shift(links: Links, node: NodeProto, place: int, shift: Doubles) -> None:
    bias = links.constant(node, place)
    if bias is None and place < len(node.input) and node.input[place]:
        raise DataError(f"the bias of {node.output[0]} is computed: it cannot be corrected")
    value = shift if bias is None else bias.astype(np.float64) + shift
    if bias is not None and value.shape != bias.shape and bias.size != 1:
        raise DataError(f"{node.output[0]} has a bias of {bias.shape}, the error is {shift.shape}")
    links.replace(node, place, value.astype(np.float32 if bias is None else bias.dtype))


def _append_bias(links: Links, node: NodeProto, shift: Doubles) -> None:
    from onnx import helper

    output = node.output[0]
    raw = f"{output}_before_bias"
    node.output[0] = raw
    add = helper.make_node("Add", [raw, ""], [output], name=f"{output}_bias")
    place = list(links.graph.node).index(node) + 1
    links.graph.node.insert(place, add)
    links.replace(links.graph.node[place], 1, shift.astype(np.float32))


def float_means(
    model: ModelProto, images: Images, *, batch: int = BATCH, threads: int | None = None
) -> list[Means]:
    """Means of all layers' outputs, batch by batch: what several corrections of a graph share.

    Args:
        model: The float graph.
        images: As for `correct_biases`, and so are the others.
        batch: Images of one run.
        threads: CPU threads.
    """
    fixed = fixed_batch(model)
    means = _open_means(model, layers(model), threads)
    return [means(part) for part in _batches(whole_batches(images, fixed or 1), fixed or batch)]


def correct_biases(
    model: ModelProto,
    quantized: ModelProto,
    images: Images,
    *,
    wanted: Sequence[Means] | None = None,
    batch: int = BATCH,
    threads: int | None = None,
) -> Correction:
    """Correct the biases of all layers of a float graph for what quantization does to it.

    Args:
        model: The float graph.
        quantized: Its quantized form, with the same names of layers' outputs.
        images: Calibration images, (images, channels, height, width). Beyond `batch` of them the
            corrections of the batches are averaged.
        wanted: What `float_means` gave for the same graph, images and batch; None to compute it.
        batch: Images of one run; more give better means and take more memory. A graph with a fixed
            batch takes its own.
        threads: CPU threads; None for as many as make a difference on images of this size.

    Returns:
        The float graph to quantize once more.

    Raises:
        BuildError: The quantized graph lacks an output of a layer.
        DataError: The graph has no layers, there are no images, or a mean is not finite.
    """
    order = layers(model)
    if not order:
        raise DataError("the graph has no Conv, Gemm or MatMul with a constant weight to correct")
    if wanted is None:
        wanted = float_means(model, images, batch=batch, threads=threads)
    correct, names = _open_correcting(quantized, order, threads)
    following = iter(wanted)

    def errors(part: Images) -> Means:
        feeds = {f"{name}_wanted": mean for name, mean in next(following).items()}
        return {names[error]: value for error, value in correct(part, feeds).items()}

    found = _averaged(errors, images, order, batch, fixed_batch(model))
    return Correction(fold(model, found), found)


def _open_correcting(
    quantized: ModelProto, order: Sequence[Layer], threads: int | None
) -> tuple[Callable[..., Means], dict[str, str]]:
    """The quantized graph, correcting itself to the means that it is given as inputs.

    Returns:
        A function from images and wanted means to errors, and the layers' outputs by their names.
    """
    from onnx import TensorProto, helper, numpy_helper

    copy = _copy(quantized)
    _require_outputs(copy, order)
    graph = copy.graph
    names = {}
    for layer in order:
        output, raw, error = layer.output, f"{layer.output}_raw", f"{layer.output}_error"
        names[error] = output
        producer = next(node for node in graph.node if output in node.output)
        producer.output[list(producer.output).index(output)] = raw
        mean = _append_mean(copy, layer, raw)
        shape = np.array([layer.channels] + [1] * layer.positions)
        graph.initializer.append(numpy_helper.from_array(shape, f"{error}_shape"))
        wanted = helper.make_tensor_value_info(
            f"{output}_wanted", TensorProto.FLOAT, [layer.channels]
        )
        graph.input.append(wanted)
        graph.node.extend(
            [
                helper.make_node("Sub", [mean, wanted.name], [error]),
                helper.make_node("Reshape", [error, f"{error}_shape"], [f"{error}_shaped"]),
                helper.make_node("Sub", [raw, f"{error}_shaped"], [output]),
            ]
        )
    # ONNX Runtime sorts nodes itself: those that were appended come before their readers.
    return open_session(copy, list(names), threads), names
