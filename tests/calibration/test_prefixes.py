"""Graphs that begin alike: the beginning is computed once, and nothing comes out otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.judge import by_strict_executor
from calibration.prefixes import MOST_BYTES, SharedBeginnings, places
from pipeline.emulate.onnx.executor import OnnxExecutor

BLOCKS = ("stem", "stages.0.blocks.0", "stages.0.blocks.1", "head")
CHANNELS = 4


def images(seed: int = 0, count: int = 40, side: int = 128) -> np.ndarray:
    """Several batches of the executor's, the last one smaller."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, CHANNELS, side, side)).astype(np.float32)


def graph(
    changed: str = "",
    *,
    weight: float = 1.0,
    slope: float = 0.1,
    kind: int = TensorProto.FLOAT16,
    batch: int | str = "batch",
) -> onnx.ModelProto:
    """Four blocks, each a convolution with a residual; one of them differs by weight or slope."""
    rng = np.random.default_rng(1)
    nodes = [helper.make_node("Cast", ["image"], ["x0"], name="/stem/Cast", to=kind)]
    weights = []
    for number, block in enumerate(BLOCKS):
        mine = weight if block == changed else 1.0
        alpha = slope if block == changed else 0.1
        values = 0.2 * mine * rng.standard_normal((CHANNELS, CHANNELS, 3, 3))
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        weights.append(numpy_helper.from_array(values.astype(dtype), f"{block}.weight"))
        x, y, z, after = f"x{number}", f"y{number}", f"z{number}", f"x{number + 1}"
        nodes += [
            helper.make_node("Conv", [x, f"{block}.weight"], [y], f"/{block}/Conv", pads=[1] * 4),
            helper.make_node("LeakyRelu", [y], [z], f"/{block}/Act", alpha=alpha),
            helper.make_node("Add", [x, z], [after], f"/{block}/Add"),
        ]
    nodes += [
        helper.make_node("GlobalAveragePool", [f"x{len(BLOCKS)}"], ["mean"], "/head/Pool"),
        helper.make_node("Flatten", ["mean"], ["flat"], "/head/Flatten"),
        helper.make_node("Cast", ["flat"], ["logits"], "/head/Cast", to=TensorProto.FLOAT),
    ]
    shape = [batch, CHANNELS, 128, 128]
    made = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CHANNELS])],
        weights,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])


STEPS = len(OnnxExecutor(graph()).steps())
BATCHES = 3


def same(found: np.ndarray, model: onnx.ModelProto, given: np.ndarray) -> bool:
    """Whether logits are to the bit those without anything shared."""
    return found.tobytes() == by_strict_executor(model, given).tobytes()


def test_a_later_block_goes_on_where_graphs_begin_to_differ() -> None:
    shared, given = SharedBeginnings(), images()
    first = graph()
    assert same(shared(first, given), first, given)
    assert shared.steps_run == STEPS * BATCHES
    for number, block in enumerate(BLOCKS):
        before, other = shared.steps_run, graph(block, weight=1.5)
        assert same(shared(other, given), other, given)
        # The image is cast before the first block; each has three operations.
        skipped = 1 + 3 * number if number else 0
        assert shared.steps_run - before == (STEPS - skipped) * BATCHES


def test_another_attribute_is_another_beginning() -> None:
    shared, given = SharedBeginnings(), images()
    shared(graph(), given)
    for block in BLOCKS:
        other = graph(block, slope=0.9)
        assert same(shared(other, given), other, given)


def test_another_type_is_another_beginning() -> None:
    shared, given = SharedBeginnings(), images(count=8)
    for kind in (TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16):
        other = graph(kind=kind)
        assert same(shared(other, given), other, given)
    again = graph("head", weight=2.0, kind=TensorProto.BFLOAT16)
    assert same(shared(again, given), again, given)


def test_values_of_other_images_are_not_taken() -> None:
    shared = SharedBeginnings()
    for seed in (0, 1):
        given, model = images(seed, count=8), graph()
        assert same(shared(model, given), model, given)


def test_a_fixed_batch_is_filled_up_as_ever() -> None:
    shared, given = SharedBeginnings(), images(count=10)
    for model in (graph(batch=4), graph("head", weight=3.0, batch=4)):
        assert same(shared(model, given), model, given)
    assert shared.steps_run < 2 * 3 * STEPS


@pytest.mark.parametrize(("places_kept", "skipped"), [(0, 0), (1, 4), (2, 7), (3, 10)])
def test_what_there_is_no_room_for_is_computed_again(places_kept: int, skipped: int) -> None:
    given = images()
    shared = SharedBeginnings(places_kept * given.nbytes // 2)  # half precision
    last = graph("head", weight=1.5)
    shared(graph(), given)
    before = shared.steps_run
    assert same(shared(last, given), last, given)
    assert shared.steps_run - before == (STEPS - skipped) * BATCHES


def steps_of(shared: SharedBeginnings, weight: float, given: np.ndarray, block: str) -> int:
    """Steps that a graph takes which differs in the stem, and in one more block."""
    before, model = shared.steps_run, graph("stem", weight=weight)
    if block:
        model.graph.initializer[BLOCKS.index(block)].CopyFrom(
            graph(block, weight=9.0).graph.initializer[BLOCKS.index(block)]
        )
    assert same(shared(model, given), model, given)
    return shared.steps_run - before


def test_what_was_not_used_for_the_longest_time_goes_first() -> None:
    given = images(count=8)
    room = SharedBeginnings(3 * given.nbytes // 2)  # the three places of one graph
    assert [steps_of(room, weight, given, "") for weight in (1.5, 1.5)] == [STEPS, STEPS - 10]
    assert [steps_of(room, weight, given, "") for weight in (2.5, 1.5)] == [STEPS, STEPS]
    room = SharedBeginnings(6 * given.nbytes // 2)
    for weight in (1.5, 2.5):
        steps_of(room, weight, given, "")
    assert steps_of(room, 1.5, given, "head") == STEPS - 10  # its last place is used now
    assert steps_of(room, 3.5, given, "") == STEPS  # the first three places go
    assert steps_of(room, 1.5, given, "") == STEPS - 10
    assert MOST_BYTES == 2**28


def described(nodes: Sequence[onnx.NodeProto], weights: Mapping[str, np.ndarray]) -> list[str]:
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "toy",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3])],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(values, name) for name, values in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
    )
    return [f"{p.tensor}{' |' if p.ends_block else ''}" for p in places(OnnxExecutor(model))]


def test_everything_has_to_pass_through_a_place() -> None:
    nodes = [
        helper.make_node("Relu", ["image"], ["a"], "/one/Relu"),
        helper.make_node("Neg", ["a"], ["b"], "/two/Neg"),
        helper.make_node("Add", ["a", "b"], ["c"], "/two/Add"),
        helper.make_node("Mul", ["c", "w"], ["d"], "/three/Mul"),
        helper.make_node("Relu", ["d"], ["out"], "/three/Relu"),
    ]
    # While b is computed a is still needed; the last result is the answer itself.
    assert described(nodes, {"w": np.ones(3, np.float32)}) == ["a |", "c |", "d"]


def test_conversions_belong_to_who_reads_them() -> None:
    pair = ("scale", "zero")
    nodes = [
        helper.make_node("Relu", ["image"], ["a"], "/one/Relu"),
        helper.make_node("QuantizeLinear", ["a", *pair], ["q"], "/one/Q"),
        helper.make_node("DequantizeLinear", ["q", *pair], ["b"], "/one/DQ"),
        helper.make_node("Neg", ["b"], ["c"], "/two/Neg"),
        helper.make_node("Relu", ["c"], ["out"], "/three/Relu"),
    ]
    weights: dict[str, np.ndarray] = {
        "scale": np.array(0.1, np.float32),
        "zero": np.array(0, np.int8),
    }
    assert described(nodes, weights) == ["a |", "q", "b", "c |"]
