"""8-bit forms of a network that float16 breaks: what is raised is not quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.steps.facts.graphs import RepairFacts
from pipeline.targets.tensorrt import api
from pipeline.targets.tensorrt.build import EngineJob
from pipeline.targets.tensorrt.process import build_apart

Convert = Callable[..., tuple[onnx.ModelProto, dict[str, Any]]]
Make = Callable[..., ModelProto]

FORMS = ("int8-trt-repaired", "int8-trt-repaired-float32", "fp8-trt-repaired")


@pytest.fixture
def loud(make_model: Make) -> ModelProto:
    """Three convolutions; around the second, values are 2**24 times as large."""
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> np.ndarray:
        value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return np.asarray(value, np.float32)

    constants = {
        "w1": normal(16, 3, 3, 3),
        "w2": normal(16, 16, 1, 1),
        "w3": normal(16, 16, 3, 3),
        "wh": normal(16, 4),
        "up": np.float32(4096),
        "down": np.float32(1 / 4096),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["x1"], "/first/Conv"),
        helper.make_node("Mul", ["x1", "up"], ["x2"], "/loud/Mul"),
        helper.make_node("Mul", ["x2", "up"], ["x3"], "/loud/Mul2"),
        helper.make_node("Conv", ["x3", "w2"], ["x4"], "/loud/conv/Conv"),
        helper.make_node("Mul", ["x4", "down"], ["x5"], "/loud/Mul3"),
        helper.make_node("Mul", ["x5", "down"], ["x6"], "/loud/Mul4"),
        helper.make_node("Conv", ["x6", "w3"], ["x7"], "/last/Conv"),
        helper.make_node("GlobalAveragePool", ["x7"], ["x8"], "/head/Pool"),
        helper.make_node("Flatten", ["x8"], ["x9"], "/head/Flatten"),
        helper.make_node("MatMul", ["x9", "wh"], ["logits"], "/head/fc/MatMul"),
    ]
    return make_model(nodes, constants, ["batch", 3, 8, 8], ["batch", 4])


@pytest.mark.parametrize("form", FORMS)
def test_what_is_raised_is_not_quantized_and_the_rest_is(
    convert: Convert, loud: ModelProto, pictures: np.ndarray, form: str
) -> None:
    model, facts = convert(loud, form, max_top1_drop=1.0)
    repair = RepairFacts.from_dict(facts["repair"], "the facts")
    wide = "float32" if form.endswith("float32") else "bfloat16"
    assert {part.part: part.type for part in repair.raised} == {"loud": wide, "loud.conv": wide}
    nodes = {node.name: node for node in model.graph.node}
    quantized = [n for n, node in nodes.items() if any("dequantized" in i for i in node.input)]
    assert "/loud/conv/Conv" not in quantized
    assert "/last/Conv" in quantized
    assert facts["quantized_layers"] == len([n for n in quantized if "Conv" in n or "MatMul" in n])
    stored = {i.name: i.data_type for i in model.graph.initializer}
    assert "w2_int8" not in stored
    kinds = set(stored.values())
    assert (TensorProto.BFLOAT16 in kinds) == (wide == "bfloat16")
    assert np.isfinite(OnnxExecutor(model).run(pictures)).all()
    onnx.checker.check_model(model, full_check=True)


def test_without_the_repair_the_same_network_is_lost(
    convert: Convert, loud: ModelProto, pictures: np.ndarray
) -> None:
    model, _ = convert(loud, "float16")
    assert not np.isfinite(OnnxExecutor(model).run(pictures)).all()


@pytest.mark.skipif(api.installed(api.RTX) is None, reason="needs TensorRT-RTX")
@pytest.mark.parametrize("form", ["float16-repaired", "int8-trt-repaired"])
def test_tensorrt_takes_the_mixed_graph(
    convert: Convert, loud: ModelProto, tmp_path: Path, form: str
) -> None:
    convert(loud, form, max_top1_drop=1.0)
    job = EngineJob(tmp_path / "result.onnx", False, ("8.9",), (1, 2, 4), None, None)
    facts = build_apart(job, tmp_path, lambda line: None)
    types = facts["layers"]["by_precision"]
    assert types["BF16"] > 0
    assert types["HALF"] > 0
