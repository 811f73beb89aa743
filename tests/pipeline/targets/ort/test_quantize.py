"""int8 for ONNX Runtime: what is inserted, and what is decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from calibration import judge
from calibration.pairs import safe_weights
from calibration.ranges import Range
from pipeline.core.errors import ConfigError
from pipeline.core.figures import Ratio
from pipeline.graphs.qdq_ort import (
    Candidate,
    Kind,
    StoredWeights,
    activations,
    candidates_of,
    insert_pairs,
)
from pipeline.targets.ort import certificate, quantize, tune
from pipeline.targets.ort.tune import Choice

FORM = "int8-ort"

Convert = Callable[..., tuple[onnx.ModelProto, dict[str, Any]]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "MEASURE_SECONDS", 0.02)
    # So short a measurement must decide nothing.
    monkeypatch.setattr(quantize, "MARGIN", 1.0)


def ranges_of(model: onnx.ModelProto) -> dict[str, Range]:
    return dict.fromkeys(activations(model), Range(-4.0, 4.0))


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def run(model: onnx.ModelProto, images: np.ndarray[Any, Any]) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"image": images})[0]


def test_kinds_and_blocks_of_nodes(small_graph: Callable[..., onnx.ModelProto]) -> None:
    found = [(c.kind, c.block) for c in candidates_of(small_graph())]
    assert found == [
        (Kind.CONVOLUTION, "stem"),
        (Kind.DEPTHWISE, "stages.0.blocks.0"),
        (Kind.CONVOLUTION, "stages.0.blocks.1"),
        (Kind.LINEAR, "head"),
    ]


def test_activations_are_unsigned_and_weights_signed(
    small_graph: Callable[..., onnx.ModelProto],
) -> None:
    source = small_graph()
    model = insert_pairs(source, ranges_of(source), candidates_of(source))
    onnx.checker.check_model(model, full_check=True)
    stored = initializers(model)
    assert stored["image_zero_point"].dtype == np.uint8
    assert stored["stem.weight_of_x0_stored"].dtype == np.int8
    assert stored["stem.weight_of_x0_scale"].shape == (16,)
    assert abs(stored["stem.weight_of_x0_stored"]).max() == 127
    assert "stem.weight" not in stored


def test_biases_have_the_scale_of_the_product(small_graph: Callable[..., onnx.ModelProto]) -> None:
    source = small_graph()
    stored = initializers(insert_pairs(source, ranges_of(source), candidates_of(source)))
    scale = stored["image_scale"] * stored["stem.weight_of_x0_scale"]
    np.testing.assert_allclose(stored["stem.bias_of_x0_scale"], scale, rtol=1e-6)
    assert stored["stem.bias_of_x0_stored"].dtype == np.int32
    found = stored["stem.bias_of_x0_stored"] * scale
    np.testing.assert_allclose(found, initializers(source)["stem.bias"], atol=scale.max())


def test_the_runtime_takes_its_8_bit_kernels(
    small_graph: Callable[..., onnx.ModelProto], tmp_path: Any, pictures: np.ndarray[Any, Any]
) -> None:
    source = small_graph()
    model = insert_pairs(source, ranges_of(source), candidates_of(source))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    counted = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert (counted["QLinearConv"], counted["QGemm"]) == (3, 1)
    assert counted["Conv"] == counted["Gemm"] == 0
    assert run(model, pictures).shape == (32, 4)


def test_names_of_layers_outputs_stay(small_graph: Callable[..., onnx.ModelProto]) -> None:
    source = small_graph()
    model = insert_pairs(source, ranges_of(source), candidates_of(source))
    made = {name for node in model.graph.node for name in node.output}
    assert {"x0", "x2", "x4", "logits"} <= made


def test_nothing_chosen_changes_nothing(small_graph: Callable[..., onnx.ModelProto]) -> None:
    source = small_graph()
    assert insert_pairs(source, {}, []).graph.node == source.graph.node


def test_graphs_of_one_network_store_a_weight_once(
    small_graph: Callable[..., onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_graph()
    candidates, ranges = candidates_of(source), ranges_of(source)
    outputs = {name for node in source.graph.node for name in node.output}
    alone = insert_pairs(source, ranges, candidates, outputs)
    exact = insert_pairs(source, ranges, candidates)

    calls: list[tuple[int, ...]] = []

    def counted(weight: Any, found: Any) -> Any:
        calls.append(weight.shape)
        return safe_weights(weight, found)

    monkeypatch.setattr("pipeline.graphs.qdq_ort.safe_weights", counted)
    weights = StoredWeights()
    first = insert_pairs(source, ranges, candidates, outputs, weights)
    often = len(calls)
    again = insert_pairs(source, ranges, candidates, outputs, weights)
    assert 0 < often == len(calls)
    assert first == again == alone
    assert insert_pairs(source, ranges, candidates, weights=weights) == exact != alone
    other = small_graph()
    weight = next(t for t in other.graph.initializer if t.name == "stem.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))
    assert insert_pairs(other, ranges, candidates, outputs, weights) == insert_pairs(
        other, ranges, candidates, outputs
    )


def test_parts_of_a_split_have_the_scale_of_the_whole() -> None:
    parts = helper.make_node("Split", ["image"], ["a", "b"], axis=1, num_outputs=2)
    join = helper.make_node("Concat", ["b", "a"], ["logits"], axis=1)
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4])
        for name in ("image", "logits")
    ]
    graph = helper.make_graph([parts, join], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ranges = {"image": Range(-1, 3), "a": Range(0, 1), "b": Range(-1, 0)}
    chosen = [Candidate(index, Kind.JOINT, "network") for index in (0, 1)]
    stored = initializers(insert_pairs(model, ranges, chosen))
    assert stored["a_scale"] == stored["b_scale"] == stored["image_scale"]


def test_what_a_concat_alone_reads_has_its_scale() -> None:
    """Also where one is joined into another; not what others read, nor a part of a Split."""
    names = ("a", "b", "c", "d", "inner", "outer")
    nodes = [
        helper.make_node("Split", ["image"], ["a", "rest"], axis=1, num_outputs=2),
        *(helper.make_node("Exp", ["rest"], [name]) for name in "bcd"),
        helper.make_node("Concat", ["a", "b", "c"], ["inner"], axis=1),
        helper.make_node("Concat", ["inner", "d"], ["outer"], axis=1),
        helper.make_node("Concat", ["c", "outer"], ["logits"], axis=1),
    ]
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, size])
        for name, size in (("image", 4), ("logits", 10), ("d", 2))
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:2])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ranges = {name: Range(0, 1 + i) for i, name in enumerate((*names, "image", "rest"))}
    chosen = [Candidate(index, Kind.JOINT, "network") for index in (0, 4, 5, 6)]
    stored = initializers(insert_pairs(model, ranges, chosen))
    outer = stored["outer_scale"]
    assert stored["inner_scale"] == stored["b_scale"] == stored["d_scale"] == outer
    assert stored["c_scale"] != outer, "two read it"
    assert stored["a_scale"] == stored["image_scale"] != outer
    model.graph.output.append(values[2])
    assert initializers(insert_pairs(model, ranges, chosen))["d_scale"] != outer


def test_the_result_is_close_and_says_what_was_decided(
    convert: Convert,
    small_graph: Callable[..., onnx.ModelProto],
    pictures: np.ndarray[Any, Any],
) -> None:
    model, facts = convert(small_graph(), FORM, method="min-max", max_top1_drop=1.0)
    expected = run(small_graph(), pictures)
    difference = np.linalg.norm(run(model, pictures) - expected)
    assert difference < 0.05 * np.linalg.norm(expected)
    assert facts["method"] == "min-max"
    assert facts["sensitivity"]["holds"] is True
    assert facts["quantized_blocks"] == 4
    assert facts["kinds"]
    assert set(facts["variants"]) >= {"plain", "chosen kinds", "biases corrected"}
    low, high = facts["ratio_to_float32"]["interval"]
    assert facts["worth_it"] is (high < 1)
    assert facts["why_not"] == ""
    assert bool(facts["why_slow"]) is not facts["worth_it"]
    assert low <= facts["ratio_to_float32"]["value"] <= high


@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_with_a_fixed_batch_is_quantized(
    convert: Convert,
    small_graph: Callable[..., onnx.ModelProto],
    pictures: np.ndarray[Any, Any],
    batch: int,
) -> None:
    fixed = small_graph()
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    model, facts = convert(fixed, FORM, method="min-max", max_top1_drop=1.0, batch=batch)
    assert facts["sensitivity"]["holds"] is True
    assert run(model, pictures[:batch]).shape == (batch, 4)


def test_a_faster_graph_is_worth_it(
    convert: Convert, small_graph: Callable[..., onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    for ratio, worth in ((Ratio(0.7, (0.65, 0.75)), True), (Ratio(0.99, (0.9, 1.1)), False)):
        timed = Choice("float32", {}, {"int8": ratio}, 9, "int8")
        monkeypatch.setattr(quantize._Work, "compare_latency", lambda self, model, t=timed: t)
        _, facts = convert(small_graph(), FORM, max_top1_drop=1.0)
        assert facts["worth_it"] is worth
    assert facts["why_not"] == ""
    assert facts["why_slow"] == "it takes 0.99 (95 %: 0.90 to 1.10) of the time of float32"


def test_a_busy_machine_says_nothing_against_8_bits(
    convert: Convert, small_graph: Callable[..., onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    ratio, doubt = Ratio(1.3, (1.2, 1.4)), "other processes kept 1.5 of 2 CPUs busy"
    timed = Choice("float32", {}, {"int8": ratio}, 9, "float32", doubt)
    monkeypatch.setattr(quantize._Work, "compare_latency", lambda self, model: timed)
    _, facts = convert(small_graph(), FORM, max_top1_drop=1.0)
    assert (facts["worth_it"], facts["why_not"], facts["why_slow"]) == (True, "", "")
    assert facts["warnings"][-1] == f"not compared with float32: {doubt}"


def test_blocks_that_lose_too_much_stay_in_float32(
    convert: Convert, small_graph: Callable[..., onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibration.sensitivity import Outcome

    def judged(self: Any, model: onnx.ModelProto) -> Outcome:
        spoiled = any("blocks.1" in n and n.endswith("_stored") for n in initializers(model))
        return Outcome(0.0 if spoiled else self.baseline.top1, 1.0, 0.5 if spoiled else 0.1)

    monkeypatch.setattr(judge.Judge, "__call__", judged)
    model, facts = convert(small_graph(), FORM, max_top1_drop=0.0)
    assert facts["sensitivity"]["excluded"] == ["stages.0.blocks.1"]
    assert facts["quantized_blocks"] == 3
    assert "stages.0.blocks.1.conv.weight" in initializers(model)


@pytest.mark.parametrize(
    ("faster_without", "doubt", "left"),
    [
        ((), "", []),
        (("stages.0",), "", ["stages.0.blocks.0", "stages.0.blocks.1"]),
        (("stages.0",), "other processes kept 1.5 of 2 CPUs busy", []),
        (("stem", "stages.0", "head"), "", []),
    ],
)
def test_parts_that_are_slower_in_8_bits_stay_in_float32(
    convert: Convert,
    small_graph: Callable[..., onnx.ModelProto],
    monkeypatch: pytest.MonkeyPatch,
    faster_without: tuple[str, ...],
    doubt: str,
    left: list[str],
) -> None:
    def measured(self: Any, graphs: dict[str, Any]) -> Choice:
        fast = {f"all but {part}" for part in faster_without}
        value = {name: 0.8 if name in fast else 1.0 for name in graphs}
        ratios = {name: Ratio(v, (v - 0.01, v + 0.01)) for name, v in value.items()}
        fastest = min(value, key=lambda name: value[name])
        return Choice(next(iter(graphs)), value, ratios, 9, fastest, doubt)

    monkeypatch.setattr(quantize, "MARGIN", 0.05)
    monkeypatch.setattr(quantize._Work, "_measure", measured)
    model, facts = convert(small_graph(), FORM, max_top1_drop=1.0)
    assert facts["left_for_latency"] == left
    assert facts["quantized_blocks"] == 4 - len(left)
    assert ("stages.0.blocks.1.conv.weight" in initializers(model)) is bool(left)
    ranked = {alone["group"] for alone in facts["sensitivity"]["ranking"]}
    assert ranked == {"stem", "stages.0.blocks.0", "stages.0.blocks.1", "head"} - set(left)


@pytest.mark.parametrize(
    ("again", "doubt", "left"),
    [(0.9, "", True), (0.945, "", False), (1.2, "", False), (0.9, "others were busy", False)],
)
def test_slow_parts_must_be_so_together_in_sessions_of_their_own(
    convert: Convert,
    small_graph: Callable[..., onnx.ModelProto],
    monkeypatch: pytest.MonkeyPatch,
    again: float,
    doubt: str,
    left: bool,
) -> None:
    together = "all but stem, head"

    def measured(self: Any, graphs: dict[str, Any]) -> Choice:
        alone = {"all but stem": 0.8, "all but head": 0.8, together: again}
        ratios = {}
        for name in graphs:
            value = alone.get(name, 1.0)
            ratios[name] = Ratio(value, (value - 0.01, value + 0.01))
        medians = dict.fromkeys(graphs, 1.0)
        first = next(iter(graphs))
        return Choice(first, medians, ratios, 9, first, doubt if together in graphs else "")

    monkeypatch.setattr(quantize, "MARGIN", 0.05)
    monkeypatch.setattr(quantize._Work, "_measure", measured)
    _, facts = convert(small_graph(), FORM, max_top1_drop=1.0)
    assert facts["left_for_latency"] == (["head", "stem"] if left else [])
    assert set(facts["parts_measured"]["together"]["candidates"]) == {"all", together}


def test_parts_are_timed_with_gelus_as_they_will_be(
    convert: Convert, small_graph: Callable[..., onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_graph()
    next(node for node in source.graph.node if node.op_type == "Elu").op_type = "Gelu"
    seen: dict[str, set[str]] = {}

    def measured(self: Any, graphs: dict[str, Any]) -> Choice:
        for name, graph in graphs.items():
            if graph is not None:
                seen[name] = {node.op_type for node in graph.graph.node}
        same = dict.fromkeys(graphs, Ratio(1.0, (0.99, 1.01)))
        first = next(iter(graphs))
        return Choice(first, dict.fromkeys(graphs, 1.0), same, 9, first)

    monkeypatch.setattr(quantize._Work, "_measure", measured)
    convert(source, FORM, max_top1_drop=1.0, gelu="sigmoid")
    assert "Sigmoid" in seen["all but stem"]
    assert "Gelu" not in seen["all but head"]


def test_what_was_timed_before_a_kill_is_not_timed_again(
    convert: Convert,
    small_graph: Callable[..., onnx.ModelProto],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    kept = tmp_path / "kept.jsonl"
    timed = []
    interleave = tune.interleave

    def count(*arguments: Any) -> dict[str, list[float]]:
        timed.append(arguments)
        return interleave(*arguments)

    monkeypatch.setattr(tune, "interleave", count)
    _, facts = convert(small_graph(), FORM, evaluations=kept, max_top1_drop=1.0)
    assert len(timed) >= 3  # kinds, parts, and against float32
    assert convert(small_graph(), FORM, evaluations=kept, max_top1_drop=1.0)[1] == facts
    assert len(timed) == sum('"medians"' in line for line in kept.read_text().splitlines())


def test_the_report_gets_ranges_with_histograms(
    convert: Convert, small_graph: Callable[..., onnx.ModelProto]
) -> None:
    _, facts = convert(small_graph(), FORM, max_top1_drop=1.0)
    assert [row["tensor"] for row in facts["ranges"]] == activations(small_graph())
    assert all(sum(row["histogram"]) > 0 for row in facts["ranges"])


def test_an_unknown_method(convert: Convert, small_graph: Callable[..., onnx.ModelProto]) -> None:
    with pytest.raises(ConfigError, match="unknown calibration method 'guess'"):
        convert(small_graph(), FORM, method="guess")


def test_the_answers_are_the_same_on_every_cpu_unless_vnni_is_asked_for(
    convert: Convert, small_graph: Callable[..., onnx.ModelProto]
) -> None:
    model, facts = convert(small_graph(), FORM, max_top1_drop=1.0, cpus="any")
    assert certificate.unsafe_layers(model) == []
    assert facts["certificate"]["unsafe"] == []
    assert "avx2" in facts["certificate"]["certified_for"]
    model, facts = convert(small_graph(), FORM, max_top1_drop=1.0, cpus="vnni")
    unsafe = [layer.layer for layer in certificate.unsafe_layers(model)]
    assert unsafe
    assert [layer["layer"] for layer in facts["certificate"]["unsafe"]] == unsafe
    assert facts["certificate"]["certified_for"] == ["avx512-vnni", "avx2-vnni"]
    assert facts["certificate"]["state"] == "emulated: x86 without VNNI"
    assert 0 <= facts["certificate"]["agreement"] <= 1


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_images_that_give_constant_activations_are_quantized(
    convert: Convert,
    small_graph: Callable[..., onnx.ModelProto],
    pictures: np.ndarray[Any, Any],
    value: float,
) -> None:
    pictures[:] = value
    model, facts = convert(small_graph(), FORM, max_top1_drop=1.0)
    images = np.random.default_rng(3).standard_normal((4, 3, 8, 8)).astype(np.float32)
    assert np.isfinite(run(model, images)).all()
    same = np.full((4, 3, 8, 8), value, np.float32)
    expected = run(small_graph(), same)
    np.testing.assert_allclose(run(model, same), expected, atol=0.05 * abs(expected).max())
    assert facts["certificate"]["unsafe"] == []
    assert facts["ranges"][0]["constant"]


@pytest.mark.parametrize(
    ("errs", "lost", "told"),
    [(1.0, 0.0, "sigmoid: 1"), (2.0, 0.0, "exact"), (1.0, 0.5, "exact")],
    ids=["as well", "logits err more", "top-1 is lost"],
)
def test_gelus_stay_exact_where_8_bits_cost_anything(
    convert: Convert,
    small_graph: Callable[..., onnx.ModelProto],
    monkeypatch: pytest.MonkeyPatch,
    errs: float,
    lost: float,
    told: str,
) -> None:
    source = small_graph()
    next(node for node in source.graph.node if node.op_type == "Elu").op_type = "Gelu"
    known: list[float] = []

    def error(self: Any, name: str, variant: Any, kinds: Any = None) -> float:
        in_8_bits = name.endswith("GELUs in 8 bits")
        self.log_of_variants[name] = {"top1": 1.0 - lost * in_8_bits}
        known.append(0.1 * (errs if in_8_bits else 1.0))
        return known[-1]

    monkeypatch.setattr(quantize._Work, "_error", error)
    _, facts = convert(source, FORM, max_top1_drop=1.0)
    assert facts["gelu"] == told


def test_gelu_is_named(convert: Convert, small_graph: Callable[..., onnx.ModelProto]) -> None:
    source = small_graph()
    elu = next(node for node in source.graph.node if node.op_type == "Elu")
    elu.op_type = "Gelu"
    found = {}
    for asked in ("exact", "sigmoid"):
        model, facts = convert(source, FORM, max_top1_drop=1.0, gelu=asked)
        kinds = [node.op_type for node in model.graph.node]
        found[asked] = facts["gelu"], len(facts["gelus"]), "Sigmoid" in kinds, "Gelu" in kinds
    assert found == {"exact": ("exact", 0, False, True), "sigmoid": ("sigmoid: 1", 1, True, False)}


@pytest.mark.parametrize("uneven", [True, False])
def test_channels_are_equalized_where_the_logits_err_less(
    convert: Convert, small_graph: Callable[..., onnx.ModelProto], uneven: bool
) -> None:
    source = small_graph()
    for node in source.graph.node:
        if node.op_type in ("Clip", "Elu"):
            node.op_type = "Relu"
            del node.input[1:]
    if uneven:
        factors = np.random.default_rng(0).choice([1.0, 0.03, 0.011], 16).astype(np.float32)
        scale(source, "stages.0.blocks.0.conv.weight", factors.reshape(16, 1, 1, 1))
        scale(source, "stages.0.blocks.1.conv.weight", 1 / factors.reshape(1, 16, 1, 1))
    _, facts = convert(source, FORM, max_top1_drop=1.0)
    errors = {name: facts["variants"][name]["logit_error"] for name in ("plain", "equalized")}
    assert facts["equalized"] is (errors["equalized"] < errors["plain"])
    if uneven:
        assert facts["equalized"]
        assert errors["equalized"] < 0.5 * errors["plain"]
        # The graph that is made has the ranges and weights that were judged.
        assert facts["sensitivity"]["outcome"]["logit_error"] < 0.5 * errors["plain"]


def scale(model: onnx.ModelProto, name: str, factors: np.ndarray[Any, Any]) -> None:
    """Multiply a weight by something."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factors, name))


def tokens(*, of_class: float | None = None) -> onnx.ModelProto:
    """A transformer's block as exporters write it: MatMul and Add, and shapes that are joined.

    Args:
        of_class: How large the class token is, which then decides alone; else all tokens do.
    """
    rng = np.random.default_rng(4)

    def weight(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-2]))

    constants: dict[str, np.ndarray[Any, Any]] = {
        "patch.weight": weight(16, 3, 4, 4),
        "token": weight(1, 1, 16) * np.float32(of_class or 1),
        "first": np.array(0, np.int64),
        "one": np.array([1], np.int64),
        "width": np.array([16], np.int64),
        "flat": np.array([0, 16, -1], np.int64),
        "norm.weight": np.linspace(0.1, 9, 16, dtype=np.float32),
        "norm.bias": np.zeros(16, np.float32),
        "val_1": weight(16, 32),
        "blocks.0.fc1.bias": rng.standard_normal(32).astype(np.float32),
        "val_2": weight(32, 16),
        "blocks.0.fc2.bias": rng.standard_normal(16).astype(np.float32),
        "val_3": weight(16, 16) * np.float32(0.01),
        "blocks.0.fc3.bias": np.zeros(16, np.float32),
        "rows": np.array([1], np.int64),
        "head.weight": weight(4, 16),
        "head.bias": np.zeros(4, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "patch.weight"], ["patches"], strides=[4, 4]),
        helper.make_node("Reshape", ["patches", "flat"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["images"], perm=[0, 2, 1]),
        helper.make_node("Shape", ["image"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "one", "width"], ["shape"], axis=0),
        helper.make_node("Expand", ["token", "shape"], ["tokens"]),
        helper.make_node("Concat", ["tokens", "images"], ["x"], axis=1),
        helper.make_node("LayerNormalization", ["x", "norm.weight", "norm.bias"], ["normed"]),
        helper.make_node("MatMul", ["normed", "val_1"], ["p1"]),
        helper.make_node("Add", ["p1", "blocks.0.fc1.bias"], ["h"]),
        helper.make_node("Gelu", ["h"], ["a"]),
        helper.make_node("MatMul", ["a", "val_2"], ["p2"]),
        helper.make_node("Add", ["p2", "blocks.0.fc2.bias"], ["f"]),
        helper.make_node("Add", ["x", "f"], ["first sum"]),
        # A layer that reads what was joined: without it sums and joins would be islands.
        helper.make_node("MatMul", ["x", "val_3"], ["p3"]),
        helper.make_node("Add", ["p3", "blocks.0.fc3.bias"], ["g"]),
        helper.make_node("Add", ["first sum", "g"], ["sum"]),
        helper.make_node("ReduceMean", ["sum", "rows"], ["seen"], keepdims=0)
        if of_class is None
        else helper.make_node("Gather", ["sum", "first"], ["seen"], axis=1),
        helper.make_node("Gemm", ["seen", "head.weight", "head.bias"], ["logits"], transB=1),
    ]
    image, logits = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", *dims])
        for name, dims in (("image", [3, 8, 8]), ("logits", [4]))
    )
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tokens", [image], [logits], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(("of_class", "alone"), [(None, False), (1e-3, True)])
def test_sums_and_joins_stay_in_float_where_the_class_token_is_lost_in_them(
    convert: Convert, pictures: np.ndarray[Any, Any], of_class: float | None, alone: bool
) -> None:
    source = tokens(of_class=of_class)
    model, facts = convert(source, FORM, max_top1_drop=1.0)
    assert (set(facts["kinds"]) & {Kind.ADDITION, Kind.JOINT} == set()) is alone
    errors = {name: each["logit_error"] for name, each in facts["variants"].items()}
    assert (errors["all"] > quantize.MOST_OF_SUMS * errors["layers"]) is alone
    expected = run(source, pictures)
    assert np.linalg.norm(run(model, pictures) - expected) < 0.05 * np.linalg.norm(expected)


def test_shapes_that_are_joined_are_no_candidates(tmp_path: Path) -> None:
    onnx.save(tokens(), tmp_path / "tokens.onnx")
    model = quantize.prepare_graph(tmp_path / "tokens.onnx")
    nodes = [(model.graph.node[c.index].op_type, c.kind) for c in candidates_of(model)]
    assert nodes == [
        ("Conv", Kind.CONVOLUTION),
        ("Concat", Kind.JOINT),
        *[("Gemm", Kind.LINEAR)] * 2,
        ("Add", Kind.ADDITION),
        ("Gemm", Kind.LINEAR),
        ("Add", Kind.ADDITION),
        ("Gemm", Kind.LINEAR),
    ]
    assert "batch" not in activations(model)


def test_sums_and_joins_among_float_nodes_are_no_candidates() -> None:
    """As exported, where linear layers of tokens are products in float."""
    model = tokens()
    found = {model.graph.node[c.index].output[0]: c.kind for c in candidates_of(model)}
    assert found == {"patches": Kind.CONVOLUTION, "logits": Kind.LINEAR}


def test_linear_layers_of_tokens_run_in_8_bits(
    convert: Convert, pictures: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    model, facts = convert(tokens(), FORM, max_top1_drop=1.0)
    expected = run(tokens(), pictures)
    difference = np.linalg.norm(run(model, pictures) - expected)
    assert difference < 0.05 * np.linalg.norm(expected)
    assert facts["quantized_blocks"] == 4
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    layers = [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul", "Conv")]
    assert [node.op_type for node in layers] == ["Conv", *["Gemm"] * 4]
    for node in layers:
        assert {makers[name] for name in node.input} == {"DequantizeLinear"}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    kernels = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kernels.count("QGemm") == 4
    assert "Gemm" not in kernels
