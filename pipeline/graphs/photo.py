"""Preprocessing inside of an ONNX graph: a photograph in, logits out.

The graph takes one decoded photograph, RGB and upright, uint8 (height, width, 3), of any size. It
resizes with antialias, crops and normalizes as `pipeline.core.preprocess` does with Pillow, within
one level of each pixel. One photograph at a time: a batch of several would have to be of one size.

It resizes as Pillow does, along one axis and then the other, in Pillow's order, and cuts to 0 … 255
in between, but rounds once, at the end: Pillow's second rounding moves a value by 0.64 at most, so
that no pixel is off by two. With both roundings fewer pixels differ, but ties, which fall by chance
of the last bits, can add up to two levels.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.core.errors import BuildError
from pipeline.core.network import Pixels
from pipeline.core.preprocess import GRAPH_FILTERS, Preprocess

PHOTO = "photo"
"""Name of the input."""

PIXELS = "photo.pixels"
"""The resized and cropped photograph: whole numbers of 0 to 255 as float32, (1, channels, size,
size)."""

OLDEST_OPSET = 18
"""The first in which Resize has antialias."""

_MODES = dict(zip(GRAPH_FILTERS, ("linear", "cubic"), strict=True))
"""What Resize calls the filters."""

MOST_LEVELS = 1
"""How far a pixel may be from Pillow's."""

_CUBIC_A = -0.5  # Pillow's; ONNX's own default is -0.75
_LUMA = (19595, 38470, 7471)
"""Pillow's weights of red, green and blue, of 65536."""
_SIZES = ((1, 1.0), (1.4, 2.3), (0.6, 0.5), (3.1, 1.7), (4.3, 1.4))
"""Height and width of the photographs that are tried, relative to the input."""


def why_not(preprocess: Preprocess, opset: int) -> str | None:
    """What keeps this preprocessing out of a graph; None if nothing does.

    Args:
        preprocess: The network's.
        opset: Version of the graph's operator set.
    """
    if preprocess.interpolation not in GRAPH_FILTERS:
        known = " and ".join(GRAPH_FILTERS)
        return (
            f"ONNX resizes by {known}, and preprocess.interpolation is {preprocess.interpolation}"
        )
    if opset < OLDEST_OPSET:
        return (
            f"Resize has antialias since operator set {OLDEST_OPSET}, and the graph is of {opset}: "
            "export it anew"
        )
    return None


def with_photo_input(model: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto:
    """A copy of a graph that takes a photograph in place of its normalized images.

    Args:
        model: From (batch, channels, height, width), float32, to logits. Any batch, or one of 1.
        preprocess: How the network's images are made.

    Raises:
        BuildError: It cannot be said in ONNX, or the graph takes several images at once.
    """
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if problem := why_not(preprocess, opset):
        raise BuildError(f"export.preprocessing: {problem}")
    (taken,) = model.graph.input
    batch = taken.type.tensor_type.shape.dim[0]
    if batch.HasField("dim_value") and batch.dim_value != 1:
        raise BuildError(
            f"export.preprocessing: the graph takes {batch.dim_value} images at once, and a "
            "photograph comes alone: leave export.batch out, or set it to 1"
        )
    made = onnx.ModelProto()
    made.CopyFrom(model)
    before = _Nodes()
    _write(before, preprocess)
    _normalize(before, preprocess, taken.name)
    own = list(made.graph.node)
    del made.graph.node[:], made.graph.input[:], made.graph.value_info[:]
    made.graph.node.extend([*before.nodes, *own])
    made.graph.initializer.extend(before.constants)
    made.graph.input.append(_photo_input())
    for output in made.graph.output:
        output.type.tensor_type.shape.dim[0].dim_value = 1
    return made


def pixels_model(preprocess: Preprocess, opset: int = 20) -> onnx.ModelProto:
    """The part that resizes and crops, alone: from a photograph to `PIXELS`.

    Args:
        preprocess: How the network's images are made.
        opset: Version of the operator set.
    """
    before = _Nodes()
    _write(before, preprocess)
    shape = [1, preprocess.depth, preprocess.size, preprocess.size]
    output = helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, shape)
    graph = helper.make_graph(before.nodes, "photo", [_photo_input()], [output], before.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def difference_to_pillow(preprocess: Preprocess, photos: Sequence[Pixels] | None = None) -> int:
    """Largest difference of a pixel between ONNX Runtime and Pillow, of 255 levels.

    Args:
        preprocess: How the network's images are made.
        photos: uint8 (height, width, 3); None for seeded noise of several sizes.
    """
    import onnxruntime
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="photo-") as folder:
        path = Path(folder) / "pixels.onnx"
        onnx.save(pixels_model(preprocess), path)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, settings, ["CPUExecutionProvider"])
        largest = 0
        for photo in photos or noise(preprocess.size):
            expected = preprocess.pixels(Image.fromarray(photo)).transpose(2, 0, 1)
            found = session.run([PIXELS], {PHOTO: photo})[0][0]
            largest = max(largest, int(np.abs(found - expected).max()))
    return largest


def require_pillows(preprocess: Preprocess) -> None:
    """Hold ONNX Runtime's resize against Pillow's.

    Args:
        preprocess: How the network's images are made.

    Raises:
        BuildError: A pixel is off by more than a level.
    """
    levels = difference_to_pillow(preprocess)
    if levels > MOST_LEVELS:
        raise BuildError(
            f"export.preprocessing: ONNX Runtime resizes otherwise than Pillow here, by {levels} "
            f"of 255 levels, where {MOST_LEVELS} is allowed: leave export.preprocessing out"
        )


def noise(size: int) -> list[Pixels]:
    """Seeded photographs of several sizes around the network's: what is hardest to resize."""
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, (max(1, int(size * down)), max(1, int(size * across)), 3), np.uint8)
        for down, across in _SIZES
    ]


def _photo_input() -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(PHOTO, TensorProto.UINT8, ["height", "width", 3])


class _Nodes:
    """Nodes and constants of the part that is put before a network."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Any, dtype: type[np.generic]) -> str:
        """Add a constant; returns its name."""
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), f"photo.{name}"))
        return f"photo.{name}"

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node; returns what it writes."""
        self.nodes.append(helper.make_node(kind, inputs, [output], f"photo/{output}", **attributes))
        return output


def _write(to: _Nodes, preprocess: Preprocess) -> None:
    """Nodes from `PHOTO` to `PIXELS`."""
    gray = _gray(to) if preprocess.channels == "gray" else PHOTO
    planes = to.add("Transpose", [gray], "photo.planes", perm=[2, 0, 1])
    first = to.constant("axis0", [0], np.int64)
    batch = to.add("Unsqueeze", [planes, first], "photo.batch")
    values = to.add("Cast", [batch], "photo.values", to=TensorProto.FLOAT)
    flat, shape = _new_shapes(to, preprocess)
    mode = _MODES[preprocess.interpolation]
    between = _resize(to, values, flat, "photo.pass1", mode)
    resized = _resize(to, between, shape, "photo.pass2", mode)
    if preprocess.crop_mode == "border":
        _border(to, resized, preprocess)
    else:
        _crop(to, resized, preprocess)


def _gray(to: _Nodes) -> str:
    """Brightness as Pillow has it: a weighted sum in whole numbers, its halves rounded up."""
    wide = to.add("Cast", [PHOTO], "photo.wide", to=TensorProto.INT32)
    weights = to.constant("luma", _LUMA, np.int32)
    weighted = to.add("Mul", [wide, weights], "photo.weighted")
    last = to.constant("axis2", [2], np.int64)
    total = to.add("ReduceSum", [weighted, last], "photo.total", keepdims=1)
    half = to.constant("half", 0x8000, np.int32)
    raised = to.add("Add", [total, half], "photo.raised")
    whole = to.constant("whole", 0x10000, np.int32)
    luma = to.add("Div", [raised, whole], "photo.brightness")
    return to.add("Cast", [luma], "photo.gray", to=TensorProto.UINT8)


def _resize(to: _Nodes, values: str, shape: str, name: str, mode: str) -> str:
    """One pass of Pillow's: antialiased, and cut to what bytes can hold."""
    smooth = to.add(
        "Resize",
        [values, "", "", shape],
        f"{name}.smooth",
        mode=mode,
        antialias=1,
        exclude_outside=1,
        cubic_coeff_a=_CUBIC_A,
        coordinate_transformation_mode="half_pixel",
    )
    low, high = (to.constant(f"{name}.{end}", end, np.float32) for end in (0, 255))
    return to.add("Clip", [smooth, low, high], f"{name}.cut")


def _new_sides(to: _Nodes, preprocess: Preprocess) -> str:
    """Height and width after the resize, as `Preprocess.resized_shape` has them."""
    sides = to.add("Shape", [PHOTO], "photo.sides", start=0, end=2)
    if preprocess.crop_mode == "border":
        wide = to.add("Cast", [sides], "photo.sides.wide", to=TensorProto.DOUBLE)
        long = to.add("ReduceMax", [wide], "photo.long", keepdims=1)
        side = to.constant("side", [preprocess.resized], np.float64)
        ratio = to.add("Div", [long, side], "photo.ratio")
        rounded = to.add("Round", [to.add("Div", [wide, ratio], "photo.exact")], "photo.rounded")
        return to.add("Cast", [rounded], "photo.new", to=TensorProto.INT64)
    side = to.constant("side", [preprocess.resized], np.int64)
    larger = to.add("Mul", [sides, side], "photo.larger")
    if preprocess.crop_mode == "squash":  # by itself: every side becomes the same
        return to.add("Div", [larger, sides], "photo.new")
    short = to.add("ReduceMin", [sides], "photo.short", keepdims=1)
    return to.add("Div", [larger, short], "photo.new")


def _new_shapes(to: _Nodes, preprocess: Preprocess) -> tuple[str, str]:
    """Shapes after the first and the second pass: each pass resizes along one axis."""
    new = _new_sides(to, preprocess)
    zero, one, two = (to.constant(f"at{i}", [i], np.int64) for i in range(3))
    height, width = (f"photo.sides.{name}" for name in ("height", "width"))
    to.add("Slice", ["photo.sides", zero, one], height)
    to.add("Slice", ["photo.sides", one, two], width)
    rows = to.add("Slice", [new, zero, one], "photo.new.height")
    columns = to.add("Slice", [new, one, two], "photo.new.width")
    between = to.add("Concat", [height, columns], "photo.across.sides", axis=0)
    if takes_fewest_rows_first():
        down = to.add("Concat", [rows, width], "photo.down.sides", axis=0)
        is_tall = _is_tall(to, to.add("Sub", ["photo.sides", new], "photo.lost"))
        between = to.add("Where", [is_tall, down, between], "photo.between")
    before = to.add("Shape", ["photo.values"], "photo.before", start=0, end=2)
    flat = to.add("Concat", [before, between], "photo.flat", axis=0)
    return flat, to.add("Concat", [before, new], "photo.shape", axis=0)


def _is_tall(to: _Nodes, lost: str) -> str:
    """Whether so many more rows are lost than columns that Pillow resizes downwards first."""
    zero, one, two = (f"photo.at{i}" for i in range(3))
    rows = to.add("Slice", [lost, zero, one], "photo.lost.rows")
    columns = to.add("Slice", [lost, one, two], "photo.lost.columns")
    doubled = to.add("Mul", [columns, two], "photo.lost.twice")
    shrinks = to.add("Greater", [rows, zero], "photo.shrinks")
    more = to.add("Greater", [rows, doubled], "photo.morerows")
    return to.add("And", [shrinks, more], "photo.istall")


@functools.cache
def takes_fewest_rows_first() -> bool:
    """Whether the Pillow that is here resizes downwards first what loses many rows.

    Its order is a matter of speed, and not documented: Pillow 13 begins with the rows where it
    loses some, and more than twice as many as columns; others may always begin with the columns. A
    cubic filter overshoots, and what is cut between the passes depends on their order.
    """
    from PIL import Image

    stripes = np.random.default_rng(0).integers(0, 2, (61, 40), np.uint8) * 255
    image, cubic = Image.fromarray(stripes), Image.Resampling.BICUBIC
    down_first = image.resize((40, 24), cubic).resize((24, 24), cubic)
    return image.resize((24, 24), cubic).tobytes() == down_first.tobytes()


def _start(to: _Nodes, preprocess: Preprocess) -> str:
    """Where the middle begins; its offset is rounded to the next even number, as Python does."""
    side = to.constant("size", [preprocess.size], np.int64)
    left_over = to.add("Sub", ["photo.new", side], "photo.margin")
    margin = to.add("Cast", [left_over], "photo.marginfloat", to=TensorProto.FLOAT)
    halved = to.add("Mul", [margin, to.constant("halve", 0.5, np.float32)], "photo.halved")
    rounded = to.add("Round", [halved], "photo.offset")
    return to.add("Cast", [rounded], "photo.start", to=TensorProto.INT64)


def _rounded(to: _Nodes, values: str, output: str) -> None:
    """Whole numbers; halves are rounded up, as Pillow does."""
    raised = to.add("Add", [values, to.constant("up", 0.5, np.float32)], "photo.up.raised")
    to.add("Floor", [raised], output)


def _crop(to: _Nodes, resized: str, preprocess: Preprocess) -> None:
    """The middle of what is larger than the input, or as large."""
    start = _start(to, preprocess)
    end = to.add("Add", [start, "photo.size"], "photo.end")
    axes = to.constant("axes", [2, 3], np.int64)
    _rounded(to, to.add("Slice", [resized, start, end, axes], "photo.middle"), PIXELS)


def _border(to: _Nodes, resized: str, preprocess: Preprocess) -> None:
    """The middle; where the image is smaller, the mean colour around it.

    A pad is of one value for all channels: so the colour is zero while it is put around.
    """
    start = _start(to, preprocess)
    lacking = to.add("Sub", ["photo.size", "photo.new"], "photo.lacking")
    # What is put before, rounded down; where the image is larger a negative pad crops.
    two = to.constant("pad.two", [2], np.int64)
    before = to.add("Div", [lacking, two], "photo.before.lacking")
    cut = to.add("Neg", [start], "photo.before.cut")
    nothing = to.constant("nothing", [0], np.int64)
    is_smaller = to.add("Greater", [lacking, nothing], "photo.issmaller")
    first = to.add("Where", [is_smaller, before, cut], "photo.pad.first")
    last = to.add("Sub", [lacking, first], "photo.pad.last")
    pads = to.add("Concat", [first, last], "photo.pads", axis=0)
    colour = to.constant("colour", np.reshape(preprocess.fill, (-1, 1, 1)), np.float32)
    _rounded(to, resized, "photo.levels")
    without = to.add("Sub", ["photo.levels", colour], "photo.without")
    axes = to.constant("axes", [2, 3], np.int64)
    padded = to.add("Pad", [without, pads, "", axes], "photo.padded")
    to.add("Add", [padded, colour], PIXELS)


def _normalize(to: _Nodes, preprocess: Preprocess, result: str) -> None:
    """In the order of `Preprocess.normalize`, so that the roundings are the same."""
    full = to.constant("full", 255, np.float32)
    scaled = to.add("Div", [PIXELS, full], "photo.normalize.scaled")
    mean = to.constant("mean", np.reshape(preprocess.mean, (-1, 1, 1)), np.float32)
    std = to.constant("std", np.reshape(preprocess.std, (-1, 1, 1)), np.float32)
    centred = to.add("Sub", [scaled, mean], "photo.normalize.centred")
    to.add("Div", [centred, std], result)
