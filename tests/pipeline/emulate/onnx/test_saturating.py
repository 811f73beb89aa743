"""8-bit layers as on x86, against the sums written out and against ONNX Runtime itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from calibration.ranges import Range
from pipeline.core import machine
from pipeline.core.cpu_classes import class_of
from pipeline.emulate.onnx.saturating import SaturatingExecutor, _pairs
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


@needs_x86
@pytest.mark.slow
def test_the_embedded_network_is_computed_bit_for_bit(embedded_results: Path) -> None:
    """Weights in full 8 bits, GELU too: without VNNI most layers saturate."""
    from calibration.ranges import method_named
    from care.data import open_dataset
    from pipeline.core.preprocess import Pictures, Preprocess
    from pipeline.graphs.gelu_int8 import fit_gelus, replace_gelus
    from pipeline.steps.artifact import Artifact
    from pipeline.targets.ort.quantize import observed_ranges, prepare_graph

    results = embedded_results
    preprocess = Preprocess.from_dict(Artifact.read(results / "export").network().preprocess)
    dataset = open_dataset("fashion-mnist", "validation")
    pixels = np.stack([preprocess.pixels(dataset.image(index)) for index in range(96)])
    x = Pictures(pixels, preprocess).images
    source = prepare_graph(results / "onnx" / "model.onnx")
    table, histograms = observed_ranges(source, x[:32], method_named("min-max"))
    plain = insert_pairs(source, table.ranges, candidates_of(source))
    model = replace_gelus(plain, fit_gelus(plain, histograms))
    assert CPU is not None
    executor = SaturatingExecutor(model, vnni=CPU.vnni)
    assert np.array_equal(executor.run_all(x), by_onnxruntime(model, x))
    without = executor if not CPU.vnni else SaturatingExecutor(model)
    without.run_all(x[:8])
    seen = without.saturation().values()
    assert sum(each.saturated > 0 for each in seen) > len(seen) // 2


@needs_x86
@pytest.mark.parametrize("kind", ["Add", "Mul"])
def test_sums_and_products_of_all_stored_values_are_those_of_onnx_runtime(kind: str) -> None:
    """Sums lie on the edge of a step now and then: each rounding of the kernel counts."""
    left, right = (each.ravel() for each in np.indices((256, 256), np.uint8))
    rng = np.random.default_rng(2)
    for _ in range(24):
        scales = (rng.uniform(0.005, 0.05, 3)).astype(np.float32)
        zeros = rng.integers(60, 190, 3, np.uint8)
        constants = [
            numpy_helper.from_array(np.array(value), f"{name}_{what}")
            for name, scale, zero in zip("lro", scales, zeros, strict=True)
            for what, value in (("scale", scale), ("zero", zero))
        ]
        nodes = [
            helper.make_node("DequantizeLinear", ["l", "l_scale", "l_zero"], ["l_wide"], "l"),
            helper.make_node("DequantizeLinear", ["r", "r_scale", "r_zero"], ["r_wide"], "r"),
            helper.make_node(kind, ["l_wide", "r_wide"], ["wide"], "both"),
            helper.make_node("QuantizeLinear", ["wide", "o_scale", "o_zero"], ["o"], "o"),
        ]
        ports = [helper.make_tensor_value_info(name, TensorProto.UINT8, ["n"]) for name in "lro"]
        graph = helper.make_graph(nodes, "pairs", ports[:2], ports[2:], constants)
        opset = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        expected = session.run(None, {"l": left, "r": right})[0]
        ((_, pair),) = _pairs(model)
        wide = [
            (torch.from_numpy(values.astype(np.float32)) - float(zero)) * float(scale)
            for values, scale, zero in zip((left, right), scales, zeros, strict=False)
        ]
        steps = torch.round(pair.run(*wide) / float(scales[2])) + int(zeros[2])
        assert np.array_equal(steps.numpy(), expected)


@needs_x86
def test_a_convolution_that_stays_in_float32_is_that_of_onnx_runtime() -> None:
    # Of constant weights it takes the blocked layout, whose kernels sum otherwise.
    rng = np.random.default_rng(6)
    source = graph_of(
        [
            helper.make_node("Conv", ["image", "w", "b"], ["a"], "c", strides=[4, 4]),
            helper.make_node("Flatten", ["a"], ["y"], "flat"),
        ],
        ("batch", 3, 16, 16),
        w=rng.standard_normal((32, 3, 4, 4)),
        b=rng.standard_normal(32),
    )
    x = rng.standard_normal((32, 3, 16, 16)).astype(np.float32)
    assert np.array_equal(SaturatingExecutor(source).run(x), by_onnxruntime(source, x))


@needs_x86
def test_a_product_with_a_turned_factor_is_that_of_onnx_runtime() -> None:
    # Its kernels sum otherwise where they turn the factor themselves.
    source = graph_of(
        [
            helper.make_node("ReduceSum", ["image", "axes"], ["sums"], "sum"),
            helper.make_node("Transpose", ["sums"], ["turned"], "turn", perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["turned", "image"], ["product"], "product"),
            helper.make_node("Flatten", ["product"], ["y"], "flat"),
        ],
        ("batch", 2, 16, 5),
    )
    source.graph.initializer.append(numpy_helper.from_array(np.array([3], np.int64), "axes"))
    x = np.random.default_rng(5).standard_normal((64, 2, 16, 5)).astype(np.float32)
    assert np.array_equal(SaturatingExecutor(source).run(x), by_onnxruntime(source, x))


@needs_x86
def test_a_product_of_moved_8_bit_tensors_is_one_of_integers() -> None:
    source = graph_of(
        [
            helper.make_node("Conv", ["image", "w1"], ["a"], "c1"),
            helper.make_node("Conv", ["image", "w2"], ["b"], "c2"),
            helper.make_node("Reshape", ["a", "rows"], ["r"], "rows"),
            helper.make_node("Reshape", ["b", "rows"], ["s"], "more"),
            helper.make_node("Transpose", ["s"], ["t"], "turn", perm=[0, 2, 1]),
            helper.make_node("MatMul", ["r", "t"], ["p"], "product"),
            helper.make_node("Flatten", ["p"], ["y"], "flat"),
        ],
        ("batch", 3, 5, 5),
        w1=np.random.default_rng(7).standard_normal((4, 3, 1, 1)),
        w2=np.random.default_rng(8).standard_normal((4, 3, 1, 1)),
    )
    source.graph.initializer.append(numpy_helper.from_array(np.array([0, 4, 25]), "rows"))
    model = quantized(source)
    assert CPU is not None
    executor = SaturatingExecutor(model, vnni=CPU.vnni)
    assert "p" in executor._factors
    assert np.array_equal(executor.run(images(32)), by_onnxruntime(model, images(32)))
