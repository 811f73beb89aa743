"""A graph as a torch module: the same numbers, exportable, or a refusal that names the node."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline.core.errors import ArtifactError, UnsupportedOperatorError
from pipeline.emulate.onnx.module import GraphModule, Product

MakeModel = Callable[..., onnx.ModelProto]

SHAPE = (3, 8, 8)
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
SQUARE = RNG.standard_normal((8, 8)).astype(np.float32)
IMAGES = RNG.standard_normal((3, *SHAPE)).astype(np.float32)

FLAT = "y = Flatten(t)"

GRAPHS: dict[str, tuple[str, Mapping[str, np.ndarray]]] = {
    "a convolution and pooling": (
        f"c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) t = MaxPool<kernel_shape=[2,2], "
        f"strides=[2,2]>(r) {FLAT}",
        {"w": WEIGHT},
    ),
    "shapes that are computed": (
        "s = Shape(x) n = Gather(s, zero) u = Unsqueeze(n, axis) f = Concat<axis=0>(u, rest) "
        "y = Reshape(x, f)",
        {
            "zero": np.array(0),
            "axis": np.array([0]),
            "rest": np.array([-1]),
        },
    ),
    "attention": (
        "p = MatMul(x, q) k = Transpose<perm=[0,1,3,2]>(x) a = MatMul(p, k) d = Div(a, two) "
        f"m = Softmax(d) t = MatMul(m, x) {FLAT}",
        {"q": SQUARE, "two": np.array(2, np.float32)},
    ),
    "a norm and GELU": (
        f"n = LayerNormalization(x, g, b) t = Gelu(n) {FLAT}",
        {"g": SQUARE[0], "b": SQUARE[1]},
    ),
    "a split and a slice": (
        "a, b = Split<axis=1>(x, parts) c = Slice(b, low, high, ax) "
        f"t = Concat<axis=1>(a, c) {FLAT}",
        {
            "parts": np.array([1, 2]),
            "low": np.array([1]),
            "high": np.array([9]),
            "ax": np.array([1]),
        },
    ),
    "bilinear resizing": (
        f'r = Resize<mode="linear">(x, , scales) t = Relu(r) {FLAT}',
        {"scales": np.array([1, 1, 1.5, 1.5], np.float32)},
    ),
    "nearest resizing": (
        'r = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", '
        f'nearest_mode="floor">(x, , scales) t = Relu(r) {FLAT}',
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "cubic resizing with antialias": (
        'r = Resize<mode="cubic", antialias=1, cubic_coeff_a=-0.5>(x, , scales) '
        f"t = Relu(r) {FLAT}",
        {"scales": np.array([1, 1, 0.5, 0.5], np.float32)},
    ),
}


def by_runtime(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    logits: np.ndarray = session.run(None, {"x": images})[0]
    return logits


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_module_and_what_torch_exports_of_it_compute_what_onnxruntime_does(
    make_model: MakeModel, kind: str
) -> None:
    body, constants = GRAPHS[kind]
    model = make_model(body, ("N", *SHAPE), constants)
    module = GraphModule(model, SHAPE)
    expected = by_runtime(model, IMAGES)
    with torch.no_grad():
        found = module(torch.from_numpy(IMAGES)).numpy()
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
    program = torch.export.export(module, (torch.zeros(1, *SHAPE),)).run_decompositions({})
    exported = program.module()(torch.from_numpy(IMAGES[:1])).numpy()
    assert np.abs(exported - expected[:1]).max() <= 2e-6 * np.abs(expected).max()


def test_weights_are_parameters_and_a_convolution_comes_first(make_model: MakeModel) -> None:
    """Core ML's target folds the normalization into it, and stores the weights."""
    body, constants = GRAPHS["a convolution and pooling"]
    module = GraphModule(make_model(body, ("N", *SHAPE), constants), SHAPE)
    program = torch.export.export(module, (torch.zeros(1, *SHAPE),)).run_decompositions({})
    (image,) = (n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs)
    assert [str(user.target) for user in image.users] == ["aten.conv2d.default"]
    (weight,) = program.graph_signature.inputs_to_parameters.values()
    assert torch.equal(program.state_dict[weight], torch.from_numpy(WEIGHT))


def test_products_by_weights_are_layers_called_as_their_nodes(
    small_graph: Callable[..., onnx.ModelProto],
) -> None:
    model = small_graph()
    model.graph.node[4].name = "a/b.c"
    model.graph.node[7].name = "forward"  # what a module has already
    module = GraphModule(model, (3, 8, 8))
    layers = {name: part for name, part in module.named_modules() if isinstance(part, Product)}
    assert list(layers) == ["stem", "depthwise", "a_b_c", "product_3"]
    seen: list[tuple[int, ...]] = []
    for part in layers.values():
        part.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    module(torch.zeros(2, 3, 8, 8))
    one = [(1, 3, 8, 8), (1, 16, 6, 6), (1, 16, 6, 6), (1, 16)]
    assert seen == one * 2, "one image after the other"


def test_a_copy_has_weights_of_its_own(make_model: MakeModel) -> None:
    body, constants = GRAPHS["a norm and GELU"]
    module = GraphModule(make_model(body, ("N", *SHAPE), constants), SHAPE)
    copied = copy.deepcopy(module)
    for weight in module.parameters():
        weight.zero_()
    images = torch.from_numpy(IMAGES)
    assert not module(images).any()
    assert copied(images).any()


def test_values_that_decide_are_refused_with_the_node(make_model: MakeModel) -> None:
    model = make_model("t = NonZero(x) y = Cast<to=1>(t)", (1, *SHAPE))
    with pytest.raises(UnsupportedOperatorError, match="NonZero"):
        GraphModule(model, SHAPE)


def test_a_size_that_values_decide_is_refused_with_the_node(make_model: MakeModel) -> None:
    body = "m = ReduceMax<keepdims=0>(x) n = Cast<to=7>(m) u = Unsqueeze(n, axis) y = Tile(v, u)"
    constants = {"axis": np.array([0]), "v": np.ones(2, np.float32)}
    model = make_model(body, (1, *SHAPE), constants)
    with pytest.raises(UnsupportedOperatorError, match=r"\(Tile\): what it does depends on"):
        GraphModule(model, SHAPE)


def test_another_size_of_images_is_refused_with_the_node(make_model: MakeModel) -> None:
    model = make_model("m = MatMul(x, w) y = Flatten(m)", ("N", *SHAPE), {"w": SQUARE})
    with pytest.raises(ArtifactError, match=r"\(MatMul\) cannot run on inputs of shape"):
        GraphModule(model, (3, 7, 7))


@pytest.mark.parametrize(
    ("kind", "operator"),
    [
        ("bilinear resizing", "aten.upsample_bilinear2d.vec"),
        ("nearest resizing", "aten.upsample_nearest2d.vec"),
        ("a norm and GELU", "aten.gelu.default"),
        ("a convolution and pooling", "aten.relu.default"),
    ],
)
def test_operators_are_exported_as_converters_know_them(
    make_model: MakeModel, kind: str, operator: str
) -> None:
    body, constants = GRAPHS[kind]
    module = GraphModule(make_model(body, ("N", *SHAPE), constants), SHAPE)
    program = torch.export.export(module, (torch.zeros(1, *SHAPE),)).run_decompositions({})
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert operator in called
    assert not any("float64" in str(node.meta.get("val")) for node in program.graph.nodes)
