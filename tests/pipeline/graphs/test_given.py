"""Graphs that somebody gives: what they say of themselves, and what is refused in which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from pipeline.core.errors import ModelError
from pipeline.emulate.onnx.graph import MINIMUM_OPSET
from pipeline.graphs import given

SmallGraph = Callable[..., onnx.ModelProto]
Change = Callable[[onnx.ModelProto], object]


@pytest.fixture
def saved(tmp_path: Path, small_graph: SmallGraph) -> Callable[..., Path]:
    """Saves the small graph after a change: (change, external)."""

    def save(change: Change = lambda model: None, *, external: str | None = None) -> Path:
        model = small_graph()
        change(model)
        path = tmp_path / "model.onnx"
        if external is None:
            onnx.save(model, path)
        else:
            onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=0)
        return path

    return save


def input_type(model: onnx.ModelProto) -> onnx.TypeProto.Tensor:
    tensor: onnx.TypeProto.Tensor = model.graph.input[0].type.tensor_type
    return tensor


def with_shape(*sides: int | str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        value = helper.make_tensor_value_info("image", TensorProto.FLOAT, sides)
        model.graph.input[0].CopyFrom(value)

    return change


def add_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch"]))


def add_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("x5", TensorProto.FLOAT, None))


def of_pixels(model: onnx.ModelProto) -> None:
    input_type(model).elem_type = TensorProto.UINT8


def old(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 11


def quantized(model: onnx.ModelProto) -> None:
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    model.graph.initializer.append(scale)
    pair = [
        helper.make_node("QuantizeLinear", ["image", "scale"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"], "dequantize"),
    ]
    model.graph.node[0].input[0] = "d"
    nodes = [*pair, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def half(model: onnx.ModelProto) -> None:
    weight = model.graph.initializer[0]
    weight.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name)
    )


def test_a_graph_says_what_it_takes_and_gives(saved: Callable[..., Path]) -> None:
    def stated(model: onnx.ModelProto) -> None:
        helper.set_model_props(model, {"labels": '["a"]'})

    found = given.look(saved(stated))
    assert (found.input, found.output, found.opset) == ("image", "logits", 20)
    assert (found.batch, found.shape, found.classes) == (None, (3, 8, 8), 4)
    assert (found.external, found.metadata) == ((), {"labels": '["a"]'})


def test_the_oldest_operator_set_is_the_executors() -> None:
    assert given.OLDEST_OPSET == MINIMUM_OPSET


def test_sides_that_are_left_open_are_none(saved: Callable[..., Path]) -> None:
    found = given.look(saved(with_shape(2, 3, "height", "width")))
    assert (found.batch, found.shape) == (2, (3, None, None))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_input, r"has 2 inputs \(image, mask\), and a classifier has one"),
        (add_output, r"has 2 outputs \(logits, x5\), and a classifier has one"),
        (of_pixels, r"input 'image' is uint8, and it has to be float32"),
        (with_shape(3, 8, 8), r"input 'image' \(3 x 8 x 8\) has no batch axis"),
        (with_shape("batch", 8), r"\(any x 8\) has 2 axes"),
        (with_shape("batch", 8, 8, 3), r"\(any x 8 x 8 x 3\) has its channels last"),
        (old, r"of opset 11, and 13 is the oldest that is read: export it again"),
        (quantized, r"quantized already \(node 'quantize', QuantizeLinear\)"),
        (half, r"not float32: its tensor 'stem.weight' is float16"),
    ],
)
def test_a_graph_with_which_no_run_can_begin_is_refused(
    saved: Callable[..., Path], change: Change, words: str
) -> None:
    path = saved(change)
    before = path.read_bytes()
    with pytest.raises(ModelError, match=words):
        given.look(path)
    assert path.read_bytes() == before


def test_an_initializer_that_is_listed_as_an_input_is_none(saved: Callable[..., Path]) -> None:
    """As graphs of IR version 3 had it."""

    def listed(model: onnx.ModelProto) -> None:
        model.graph.input.append(
            helper.make_tensor_value_info("stem.bias", TensorProto.FLOAT, [16])
        )

    path = saved(listed)
    assert [value.name for value in given.read(given.look(path)).graph.input] == ["image"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"no graph at all", "is no ONNX graph"), (b"", r"holds no graph \(empty or damaged\)")],
)
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        given.look(path)


def test_an_invalid_graph_is_refused_when_it_is_read(saved: Callable[..., Path]) -> None:
    def cut(model: onnx.ModelProto) -> None:
        model.graph.node[1].input[0] = "nothing"

    with pytest.raises(ModelError, match="is no valid graph: "):
        given.read(given.look(saved(cut)))


def test_weights_that_are_no_numbers_are_refused_by_name(saved: Callable[..., Path]) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        bias = model.graph.initializer[1]
        bias.CopyFrom(numpy_helper.from_array(np.array([np.nan] * 16, np.float32), bias.name))

    with pytest.raises(ModelError, match=r"the weight 'stem\.bias' holds 16 values that are not"):
        given.read(given.look(saved(spoil)))


@pytest.mark.parametrize("location", ["../weights.bin", "/tmp/weights.bin", "a/../../weights.bin"])
def test_weights_out_of_the_graphs_folder_are_refused(
    saved: Callable[..., Path], location: str
) -> None:
    path = saved()
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="have to lie in the graph's own folder"):
        given.look(path)
    with pytest.raises(ModelError, match="have to lie in the graph's own folder"):
        given.graph_hash(path)


def test_a_link_out_of_the_graphs_folder_is_refused(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    path = saved(external="weights.bin")
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "weights.bin").rename(tmp_path / "elsewhere" / "weights.bin")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "model.onnx").write_bytes(path.read_bytes())
    (inner / "weights.bin").symlink_to(moved)
    with pytest.raises(ModelError, match="is a link out of the graph's folder"):
        given.look(inner / "model.onnx")


def test_missing_weights_are_named(saved: Callable[..., Path], tmp_path: Path) -> None:
    path = saved(external="weights.bin")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"the file of its weights weights\.bin is missing"):
        given.look(path)


def test_weights_beside_a_graph_belong_to_it(saved: Callable[..., Path], tmp_path: Path) -> None:
    path = saved(external="weights.bin")
    found = given.look(path)
    assert found.external == ("weights.bin",)
    model = given.read(found)
    assert numpy_helper.to_array(model.graph.initializer[0]).shape == (16, 3, 3, 3)
    assert all(not tensor.external_data for tensor in model.graph.initializer)
    before = given.graph_hash(path)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    assert given.graph_hash(path) != before


def test_the_hash_is_that_of_the_content_wherever_it_lies(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    path = saved()
    before = given.graph_hash(path)
    (tmp_path / "elsewhere").mkdir()
    assert given.graph_hash(path.rename(tmp_path / "elsewhere" / "other.bin")) == before


def test_input_and_output_get_their_names_and_others_make_way(
    saved: Callable[..., Path], pictures: np.ndarray
) -> None:
    renames = {"image": "data", "logits": "image", "x3": "logits", "x4": "logits_0"}

    def change(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.name = renames[value.name]
        for node in model.graph.node:
            node.input[:] = [renames.get(name, name) for name in node.input]
            node.output[:] = [renames.get(name, name) for name in node.output]

    plain = saved()
    expected = run(onnx.load(plain), "image", pictures)
    model = given.read(given.look(saved(change)))
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == [
        "image",
        "logits",
    ]
    assert np.array_equal(run(model, "image", pictures), expected)


def run(model: onnx.ModelProto, name: str, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    logits: np.ndarray = session.run(None, {name: images})[0]
    return logits


def test_parameters_are_counted_without_shapes_and_limits(small_graph: SmallGraph) -> None:
    sizes = 16 * 27 + 16 + 16 * 9 + 16 * 16 + 4 * 16 + 4
    assert given.parameters(small_graph()) == sizes
