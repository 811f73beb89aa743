"""8-bit layers as on x86, against the sums written out and against ONNX Runtime itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from calibration.ranges import Range
from pipeline.core import machine
from pipeline.core.cpu_classes import class_of
from pipeline.emulate.onnx.saturating import SaturatingExecutor
from pipeline.graphs.qdq_ort import activations, candidates_of, insert_pairs

CPU = class_of(machine.instructions())
needs_x86 = pytest.mark.skipif(CPU is None, reason="the CPU is no x86 with AVX2")


def graph_of(
    nodes: list[Any], shape: tuple[int | str, ...], **weights: np.ndarray
) -> onnx.ModelProto:
    image = helper.make_tensor_value_info("image", 1, shape)
    logits = helper.make_tensor_value_info("y", 1, None)
    stored = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()]
    made = helper.make_graph(nodes, "g", [image], [logits], stored)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def two_layers(seed: int = 0, group: int = 1, side: int = 3) -> onnx.ModelProto:
    """A convolution, a sum and a second convolution, flat."""
    rng = np.random.default_rng(seed)
    pads, channels = [side // 2] * 4, 16
    return graph_of(
        [
            helper.make_node("Conv", ["image", "w1", "b1"], ["a"], "c1", pads=pads),
            helper.make_node("Conv", ["a", "w2", "b2"], ["b"], "c2", group=group),
            helper.make_node("Add", ["a", "b"], ["c"], "add"),
            helper.make_node("Flatten", ["c"], ["y"], "flat"),
        ],
        ("batch", 3, 5, 5),
        w1=rng.standard_normal((channels, 3, side, side)),
        b1=rng.standard_normal(channels),
        w2=rng.standard_normal((channels, channels // group, 1, 1)),
        b2=rng.standard_normal(channels),
    )


def quantized(source: onnx.ModelProto, low: float = -6.0, high: float = 6.0) -> onnx.ModelProto:
    ranges = dict.fromkeys(activations(source), Range(low, high))
    return insert_pairs(source, ranges, candidates_of(source))


def images(count: int = 4, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (4 * rng.standard_normal((count, 3, 5, 5))).astype(np.float32)


def by_onnxruntime(model: onnx.ModelProto, x: np.ndarray) -> Any:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"image": x})[0]


@needs_x86
@pytest.mark.parametrize("group", [1, 2, 16])
@pytest.mark.parametrize("side", [1, 3])
def test_it_computes_what_onnx_runtime_computes_here(group: int, side: int) -> None:
    model = quantized(two_layers(group=group, side=side))
    assert CPU is not None
    executor = SaturatingExecutor(model, vnni=CPU.vnni)
    assert np.array_equal(executor.run(images()), by_onnxruntime(model, images()))


def test_without_vnni_neighbours_saturate_and_are_counted() -> None:
    # One output, four inputs, stored as 127 each; inputs are 255 steps above the zero point.
    source = graph_of(
        [helper.make_node("Conv", ["image", "w"], ["a"], "conv"),
         helper.make_node("Conv", ["a", "v"], ["b"], "last"),
         helper.make_node("Flatten", ["b"], ["y"], "flat")],
        (1, 4, 1, 1),
        w=np.ones((1, 4, 1, 1)),
        v=np.ones((1, 1, 1, 1)),
    )  # fmt: skip
    ranges = {name: Range(0, 255) for name in activations(source)}
    ranges["a"] = Range(0, 1020)
    model = insert_pairs(source, ranges, candidates_of(source))
    x = np.full((1, 4, 1, 1), 255, np.float32)
    plain, narrow = SaturatingExecutor(model, vnni=True), SaturatingExecutor(model)
    assert plain.run(x)[0, 0] == pytest.approx(255, abs=1)
    # 2 * 32767 of 4 * 255 * 127, in steps of 4.
    narrow.run(x)
    seen = narrow.saturation()["a"]
    assert (seen.pairs, seen.saturated, seen.largest) == (2, 2, 2 * 255 * 127)
    assert seen.share == 1.0
    assert plain.saturation() == {}
    half = narrow.evaluate({"image": x})["y"][0, 0]
    assert half == pytest.approx(255, abs=1)  # the second layer's range ends there
    x = np.full((1, 4, 1, 1), 120, np.float32)
    fine = SaturatingExecutor(model)
    assert fine.run(x)[0, 0] == plain.run(x)[0, 0]
    assert fine.saturation()["a"].saturated == 0


def test_saturated_sums_are_those_written_out() -> None:
    rng = np.random.default_rng(3)
    weight = rng.integers(-127, 128, (5, 7))
    x = rng.integers(0, 256, (7, 11))
    expected = np.zeros((5, 11))
    for k in range(0, 7, 2):
        pair = weight[:, k : k + 2].astype(np.int64) @ x[k : k + 2]
        expected += np.clip(pair, -32768, 32767)
    import torch

    executor = SaturatingExecutor(quantized(two_layers()))
    found = executor._sums("t", torch.from_numpy(weight).float(), torch.from_numpy(x).float())
    assert np.array_equal(found.numpy(), expected)
    exact = weight @ x
    assert (expected != exact).any()
    seen = executor.saturation()["t"]
    assert seen.error == pytest.approx(
        np.linalg.norm(expected - exact) / np.linalg.norm(exact), rel=1e-12
    )
    # The same images again change no share and no error.
    executor._sums("t", torch.from_numpy(weight).float(), torch.from_numpy(x).float())
    again = executor.saturation()["t"]
    assert (again.pairs, again.saturated) == (2 * seen.pairs, 2 * seen.saturated)
    assert again.error == pytest.approx(seen.error, rel=1e-12)


def test_safe_weights_give_the_same_with_and_without_vnni() -> None:
    source = two_layers()
    ranges = dict.fromkeys(activations(source), Range(-6.0, 6.0))
    outputs = [name for node in source.graph.node for name in node.output]
    unsafe = quantized(source)
    safe = insert_pairs(source, ranges, candidates_of(source), outputs)
    x = images(32)
    for model, same in ((unsafe, False), (safe, True)):
        with_vnni = SaturatingExecutor(model, vnni=True).run(x)
        without = SaturatingExecutor(model).run(x)
        assert np.array_equal(with_vnni, without) is same


@needs_x86
def test_products_and_sigmoids_are_those_of_onnx_runtime() -> None:
    from pipeline.graphs.gelu_int8 import GeluFit, gelus_of, replace_gelus

    rng = np.random.default_rng(0)
    source = graph_of(
        [
            helper.make_node("Conv", ["image", "w1"], ["a"], "c1"),
            helper.make_node("Gelu", ["a"], ["g"], "gelu"),
            helper.make_node("Conv", ["g", "w2"], ["b"], "c2"),
            helper.make_node("Add", ["a", "b"], ["c"], "add"),
            helper.make_node("Flatten", ["c"], ["y"], "flat"),
        ],
        ("batch", 3, 5, 5),
        w1=rng.standard_normal((16, 3, 1, 1)),
        w2=rng.standard_normal((16, 16, 1, 1)),
    )
    # Read twice, the GELU's input is no candidate for a range of its own, but can be replaced.
    model = quantized(source)
    fits = dict.fromkeys(gelus_of(model), GeluFit(1.7, 1.01, 1, 0.0, 0.0))
    assert list(fits) == ["g"]
    model = replace_gelus(model, fits)
    assert CPU is not None
    found = SaturatingExecutor(model, vnni=CPU.vnni).run(images(8))
    assert np.array_equal(found, by_onnxruntime(model, images(8)))
