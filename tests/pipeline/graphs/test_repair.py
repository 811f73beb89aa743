"""Networks that float16 breaks, each by one fault that is known, and what is raised for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from calibration.budget import Budget
from calibration.kept import Kept
from calibration.sample import CalibrationSet
from pipeline.core.errors import GateFailedError, InputError
from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.emulate.ranges import first_failure
from pipeline.graphs import float16
from pipeline.graphs.repair import MARGIN, Repaired, Request, repair, verify

Make = Callable[..., ModelProto]
FAULTS = ("a", "b", "c")
CLASSES = 4


def images_of(count: int = 8, scale: float = 1.0) -> CalibrationSet:
    noise = np.random.default_rng(3).standard_normal((count, 3, 8, 8)).astype(np.float32)
    return CalibrationSet(noise * np.float32(scale), np.full(count, -1, np.int64), ())


def chain(make_model: Make, faults: Mapping[str, Sequence[Any]]) -> ModelProto:
    """Three blocks of a convolution, a fault of its own in some, and a head.

    Args:
        make_model: Makes models.
        faults: By block, (operator, constant) of nodes that follow its convolution; without a
            constant the operator takes one input.
    """
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {}
    nodes: list[NodeProto] = []
    tensor = "image"
    for block in FAULTS:
        constants[f"w{block}"] = (rng.standard_normal((3, 3, 1, 1)) / 2).astype(np.float32)
        nodes.append(
            helper.make_node("Conv", [tensor, f"w{block}"], [f"{block}0"], f"/{block}/conv/Conv")
        )
        tensor = f"{block}0"
        for i, (operator, constant) in enumerate(faults.get(block, ())):
            inputs = [tensor]
            if constant is not None:
                constants[f"{block}k{i}"] = np.asarray(constant, np.float32)
                inputs.append(f"{block}k{i}")
            tensor = f"{block}{i + 1}"
            nodes.append(helper.make_node(operator, inputs, [tensor], f"/{block}/{operator}{i}"))
        nodes.append(helper.make_node("Relu", [tensor], [f"{block}r"], f"/{block}/act/Relu"))
        tensor = f"{block}r"
    constants["wh"] = rng.standard_normal((3, CLASSES)).astype(np.float32)
    nodes += [
        helper.make_node("GlobalAveragePool", [tensor], ["pooled"], "/head/pool/Pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "/head/Flatten"),
        helper.make_node("MatMul", ["flat", "wh"], ["logits"], "/head/fc/MatMul"),
    ]
    return make_model(nodes, constants, ["batch", 3, 8, 8], ["batch", CLASSES])


OVERFLOW = (("Mul", 4096.0), ("Mul", 4096.0), ("Mul", 1 / 4096), ("Mul", 1 / 4096))
"""Nothing but what comes of the second product lies beyond float16."""


def mended(model: ModelProto, **options: Any) -> Repaired:
    budget = Budget(**options.pop("budget", {}))
    return repair(model, options.pop("images", images_of()), Request(budget=budget, **options))


def types_of(found: Repaired) -> dict[str, str]:
    return {part.part: part.type for part in found.raised}


def test_a_sound_network_is_that_of_the_plain_form_byte_for_byte(make_model: Make) -> None:
    model = chain(make_model, {})
    found = mended(model)
    plain, facts = float16.to_half(model, float16.FLOAT16)
    assert found.model.SerializeToString(deterministic=True) == plain.SerializeToString(
        deterministic=True
    )
    assert (found.raised, found.share, found.beyond) == ((), 0.0, "")
    assert found.facts == facts
    assert found.after.headroom > 1000


@pytest.mark.parametrize("block", FAULTS)
def test_the_block_that_overflows_is_raised_and_no_other(make_model: Make, block: str) -> None:
    found = mended(chain(make_model, {block: OVERFLOW}))
    assert found.before is not None
    assert found.before.weakest is not None
    assert found.before.weakest.tensor == f"{block}2"
    assert found.before.headroom < 1
    assert found.broke == found.before.words
    assert types_of(found) == {block: "bfloat16"}
    assert f"{block}2 holds" in found.raised[0].why
    assert found.share == 0.0
    assert f"leaves the range of float16: {found.before.weakest.largest:.2g} at {block}: Mul" in (
        found.beyond
    )
    assert found.after.outcome.logit_error < 5e-3 / MARGIN
    assert found.after.headroom > 4 * MARGIN
    onnx.checker.check_model(found.model, full_check=True)
    executor = OnnxExecutor(found.model, record=True)
    assert np.isfinite(executor.run(images_of(4).images)).all()
    assert first_failure(executor.overflow_report()) is None


def test_without_bfloat16_it_is_float32(make_model: Make) -> None:
    found = mended(chain(make_model, {"b": OVERFLOW}), raise_to=(None,))
    assert types_of(found) == {"b": "float32"}
    kinds = {e.data_type for e in found.model.graph.initializer}
    assert TensorProto.BFLOAT16 not in kinds
    assert max(o.version for o in found.model.opset_import) == 20


def test_where_bfloat16_is_too_coarse_it_is_float32(make_model: Make) -> None:
    # What bfloat16 rounds away of the sum is all that the block gives on.
    faults = {"b": (("Mul", 3e5), ("Add", 3e7), ("Sub", 3e7), ("Mul", 1 / 3e5))}
    found = mended(chain(make_model, faults))
    assert types_of(found) == {"b": "float32"}


def test_whoever_reads_a_large_tensor_is_raised_too(make_model: Make) -> None:
    found = mended(chain(make_model, {"a": (("Mul", 3e5),), "b": (("Mul", 1 / 3e5),)}))
    # The activation writes it, the next convolution reads it, and writes what is as large.
    assert types_of(found) == dict.fromkeys(("a", "a.act", "b.conv", "b"), "bfloat16")
    assert found.share == pytest.approx(9 * 64 / (3 * 9 * 64 + 12))


def test_headroom_that_is_too_small_is_raised_before_anything_overflows(make_model: Make) -> None:
    model = chain(make_model, {"a": (("Mul", 8e3), ("Mul", 1 / 8e3))})
    before = mended(model, budget={"headroom": 1.0})
    assert before.raised == ()
    assert 1.25 < before.after.headroom < 4
    found = mended(model)
    assert types_of(found) == {"a": "bfloat16"}
    assert found.before is not None
    assert found.before.headroom == pytest.approx(before.after.headroom)
    assert math.isfinite(found.before.outcome.logit_error)


def test_a_constant_beyond_the_type_raises_who_reads_it(make_model: Make) -> None:
    found = mended(chain(make_model, {"c": (("Min", 1e6),)}))
    assert types_of(found) == {"c": "bfloat16"}
    assert "its constant ck0 holds 1e+06" in found.raised[0].why
    assert found.before is None
    assert found.broke == "a constant lies beyond float16"


def test_a_mask_of_infinities_is_no_overflow(make_model: Make) -> None:
    mask = np.zeros((1, 1, 1, 8), np.float32)
    mask[..., 5:] = -np.inf
    found = mended(chain(make_model, {"b": (("Add", mask), ("Softmax", None))}))
    assert found.raised == ()


def test_a_divisor_that_is_rounded_to_zero_raises_what_made_it(make_model: Make) -> None:
    # In float32 nothing is large: 1e-9 becomes zero in float16, and its inverse infinite.
    small = (("Abs", None), ("Mul", 1e-9), ("Add", 1e-9), ("Reciprocal", None), ("Mul", 1e-9))
    faults = {"b": small}
    found = mended(chain(make_model, faults), budget={"max_error": 2e-2})
    assert "b" in types_of(found)
    assert np.isfinite(OnnxExecutor(found.model).run(images_of().images)).all()


def test_what_errs_without_overflowing_is_raised_by_its_harm(make_model: Make) -> None:
    # float16 keeps a twentieth of a unit at 1000, and float32 all of it.
    faults = {"b": (("Add", 1000.0), ("Sub", 1000.0))}
    found = mended(chain(make_model, faults), budget={"max_error": 5e-3})
    assert found.before is not None
    assert math.isfinite(found.before.outcome.logit_error)
    assert found.before.outcome.logit_error > 5e-3
    assert types_of(found)["b"] == "float32"
    assert found.share == 0.0  # the block's convolution was lowered again
    assert found.after.outcome.logit_error < 5e-3
    assert "errs the most" in found.raised[0].why


def test_nothing_within_the_budget_says_how_near_it_came(make_model: Make) -> None:
    # Every layer works on large values: to raise them is to raise the network.
    model = chain(make_model, {"a": (("Mul", 1e6),)})
    with pytest.raises(GateFailedError) as caught:
        mended(model)
    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert message.startswith("the network itself leaves the range of float16: ")
    assert "no choice of parts holds the budget (headroom 4, error 0.05" in message
    assert re.search(r"with \d+ of \d+ parts raised, [6-9]\d.\d% of the products, error", message)
    assert "build bf16 or fp32, or allow more" in message
    allowed = mended(model, budget={"max_share": 1.0})
    assert allowed.share > 0.5


def test_an_error_that_nothing_mends_within_the_share_is_told(make_model: Make) -> None:
    told = r"raised, (\d+\.\d)% of the products, error [\d.e-]+, same class on 100.0% of the images"
    with pytest.raises(GateFailedError, match=told) as caught:
        mended(chain(make_model, {}), budget={"max_error": 1e-7})
    found = re.search(told, str(caught.value))
    assert found is not None
    assert 0 < float(found[1]) < 50


def test_bfloat16_as_the_base_raises_to_float32(make_model: Make) -> None:
    faults = {"b": (("Add", 100.0), ("Sub", 100.0))}
    found = mended(chain(make_model, faults), base=float16.BFLOAT16, budget={"max_error": 5e-2})
    assert set(types_of(found).values()) == {"float32"}
    assert "b" in types_of(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("quantized", r"is quantized already \(node 'q', QuantizeLinear\): repair the float32"),
        ("half", "not float32: its tensor 'wa_float16' is in 16 bits"),
        ("nan", "the weight 'wb' holds 2 values that are not a number"),
        ("infinite", r"gives no finite answer in float32, first at b.conv"),
    ],
)
def test_what_cannot_be_repaired_is_refused(make_model: Make, change: str, message: str) -> None:
    model = chain(make_model, {})
    if change == "quantized":
        model.graph.node[0].op_type, model.graph.node[0].name = "QuantizeLinear", "q"
    elif change == "half":
        model, _ = float16.to_half(model, float16.FLOAT16)
    else:
        weight = np.ones((3, 3, 1, 1), np.float32)
        weight[:2, 0] = np.nan if change == "nan" else np.inf
        place = [tensor.name for tensor in model.graph.initializer].index("wb")
        model.graph.initializer[place].CopyFrom(numpy_helper.from_array(weight, "wb"))
    with pytest.raises(InputError, match=message):
        mended(model)


def test_no_images_are_refused(make_model: Make) -> None:
    empty = CalibrationSet(np.zeros((0, 3, 8, 8), np.float32), np.zeros(0, np.int64), ())
    with pytest.raises(InputError, match="there are no images"):
        mended(chain(make_model, {}), images=empty)


def test_other_images_judge_by_the_budget_itself(make_model: Make) -> None:
    model = chain(make_model, {"b": (("Mul", 2e3), ("Mul", 1 / 2e3))})
    found = mended(model)
    assert found.raised == ()
    usual = verify(model, found.model, images_of(6), Budget())
    assert (usual.holds, usual.images) == (True, 6)
    # Larger images leave less room, and at last none.
    tight = verify(model, found.model, images_of(6, 6.0), Budget())
    assert not tight.holds
    assert 1 < tight.judged.headroom < 4
    assert "headroom" in tight.judged.words
    lost = verify(model, found.model, images_of(6, 100.0), Budget())
    assert not lost.holds
    assert lost.judged.headroom < 1


def test_a_search_that_was_killed_goes_on(make_model: Make, tmp_path: Path) -> None:
    model = chain(make_model, {"b": (("Add", 1000.0), ("Sub", 1000.0))})
    request = Request(budget=Budget(max_error=5e-3))
    kept = Kept(tmp_path / "evaluations.jsonl")
    lines: list[str] = []
    first = repair(model, images_of(), request, kept=kept, log=lines.append)
    again: list[str] = []
    kept = Kept(tmp_path / "evaluations.jsonl")
    second = repair(model, images_of(), request, kept=kept, log=again.append)
    assert second.model == first.model
    assert len(again) < len(lines)
    other = chain(make_model, {"b": (("Add", 900.0), ("Sub", 900.0))})
    fresh: list[str] = []
    repair(other, images_of(), request, kept=kept, log=fresh.append)
    assert len(fresh) == len(lines)


def test_labels_count_where_they_are_known(make_model: Make) -> None:
    model = chain(make_model, {})
    images = images_of()
    answers = OnnxExecutor(model).run(images.images).argmax(1)
    wrong = (answers + 1) % CLASSES
    found = repair(model, CalibrationSet(images.images, wrong, ()), Request())
    assert found.after.outcome.top1 == 0.0
    assert found.after.outcome.agreement == 1.0


def test_of_what_is_raised_only_what_needs_it_is_in_float32(make_model: Make) -> None:
    # A convolution of large values may be in bfloat16; small differences of large sums may not.
    faults = {"a": (("Mul", 3e5),), "b": (("Add", 3e7), ("Sub", 3e7), ("Mul", 1 / 3e5))}
    types = types_of(mended(chain(make_model, faults)))
    assert types["b"] == "float32"
    assert types["b.conv"] == "bfloat16"


def test_answers_that_change_are_mended_whatever_the_error(make_model: Make) -> None:
    # Logits that differ in the last digits: float16 makes them equal, and the first class wins.
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"], "/pool/Pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "/pool/Flatten"),
        helper.make_node("MatMul", ["flat", "w"], ["small"], "/fc/MatMul"),
        helper.make_node("Add", ["small", "large"], ["logits"], "/sum/Add"),
    ]
    rng = np.random.default_rng(1)
    constants = {
        "w": (0.1 * rng.standard_normal((3, CLASSES))).astype(np.float32),
        "large": np.float32(1000),
    }
    model = make_model(nodes, constants, ["batch", 3, 8, 8], ["batch", CLASSES])
    found = mended(model)
    assert found.before is not None
    assert found.before.outcome.logit_error < 1e-3
    assert found.before.outcome.agreement < 0.6
    assert "sum" in types_of(found)
    assert found.after.outcome.agreement > 0.8


def test_whoever_rounded_the_divisor_away_is_raised_with_the_division(make_model: Make) -> None:
    # In float32 all is in range: 1e-9 is zero in float16, however it is multiplied afterwards.
    nodes = [
        helper.make_node("Abs", ["image"], ["a"], "/abs/Abs"),
        helper.make_node("Add", ["a", "one"], ["b"], "/abs/Add"),
        helper.make_node("Mul", ["b", "tiny"], ["c"], "/small/Mul"),
        helper.make_node("Mul", ["c", "large"], ["d"], "/grow/Mul"),
        helper.make_node("Mul", ["d", "large"], ["e"], "/grow/Mul2"),
        helper.make_node("Reciprocal", ["e"], ["f"], "/divide/Reciprocal"),
        helper.make_node("GlobalAveragePool", ["f"], ["g"], "/head/Pool"),
        helper.make_node("Flatten", ["g"], ["logits"], "/head/Flatten"),
    ]
    constants = {"one": np.float32(1), "tiny": np.float32(1e-9), "large": np.float32(2**14)}
    model = make_model(nodes, constants, ["batch", 3, 8, 8], ["batch", 3])
    found = mended(model)
    assert found.beyond == ""
    assert set(types_of(found)) == {"small", "grow"}  # the division was lowered again
    assert found.after.outcome.logit_error < 5e-3
    assert "it rounds away what f is made from" in {part.why for part in found.raised}


def test_rounding_that_no_wide_type_mends_is_no_reason_for_float32(make_model: Make) -> None:
    # The sums of b err by more than is aimed at, and are within the budget; c overflows.
    faults = {"b": (("Add", 10.0), ("Sub", 10.0)), "c": OVERFLOW}
    found = mended(chain(make_model, faults), budget={"max_top1_drop": 1.0})
    assert 5e-3 < found.after.outcome.logit_error < 0.05
    assert types_of(found) == {"c": "bfloat16"}


def test_a_little_more_error_is_a_reason_for_float32(make_model: Make) -> None:
    faults = {"b": (("Mul", 3e5), ("Add", 1e5), ("Sub", 1e5), ("Mul", 1 / 3e5))}
    model = chain(make_model, faults)
    only = mended(model, raise_to=(float16.BFLOAT16,))
    assert 5e-3 < only.after.outcome.logit_error < 0.05
    assert types_of(only) == {"b": "bfloat16"}
    assert types_of(mended(model)) == {"b": "float32"}


def test_views_of_large_tensors_are_seen_at_once(make_model: Make) -> None:
    nodes = [
        helper.make_node("Mul", ["image", "up"], ["a"], "/loud/Mul"),
        helper.make_node("Transpose", ["a"], ["b"], "/view/Transpose", perm=[0, 1, 3, 2]),
        helper.make_node("Mul", ["b", "down"], ["c"], "/quiet/Mul"),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], "/head/Pool"),
        helper.make_node("Flatten", ["d"], ["logits"], "/head/Flatten"),
    ]
    constants = {"up": np.float32(2**15), "down": np.float32(2**-13)}
    model = make_model(nodes, constants, ["batch", 3, 8, 8], ["batch", 3])
    found = mended(model, raise_to=(None,))
    assert set(types_of(found)) == {"loud", "view", "quiet"}
    assert found.evaluations == 2  # as it is, and with these
