"""Whole networks, exported, against torch and in half precision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

import care.networks  # noqa: F401  (registers the models)
from care import checkpoint
from care.factory import create_model
from care.fuse import fuse
from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.emulate.ranges import first_failure, tightest

pytestmark = [
    # torch.onnx reads deprecated attributes of its own and of copyreg.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SIZE = 64
IMAGES = np.random.default_rng(0).standard_normal((3, 3, SIZE, SIZE)).astype(np.float32)


def network(name: str) -> nn.Module:
    """A network with reproducible random weights and statistics that matter."""
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if name.startswith(("vit", "mlla", "test_vit")):
        options["img_size"] = SIZE
    if name == "care_tiny":
        options["depths"] = (1, 1, 1, 1)  # a block a stage: of both kinds, half as many
    model: nn.Module = timm.create_model(name, num_classes=10, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.1, 0.5)
    return model


def exported(model: nn.Module, opset: int = 20) -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.onnx.export(
        model,
        (torch.from_numpy(IMAGES[:2]),),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with every float32 tensor made float16."""
    narrow = onnx.ModelProto()
    narrow.CopyFrom(model)
    for tensor in narrow.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for node in narrow.graph.node:
        for attribute in node.attribute:
            if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                array = numpy_helper.to_array(attribute.t).astype(np.float16)
                attribute.t.CopyFrom(numpy_helper.from_array(array))
    for port in (*narrow.graph.input, *narrow.graph.output):
        port.type.tensor_type.elem_type = TensorProto.FLOAT16
    return narrow


def difference(result: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(result - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    "name",
    [
        "care_tiny",
        "test_efficientnet",
        "test_vit",
        pytest.param("mobilenetv4_conv_small", marks=pytest.mark.soak),
        pytest.param("vit_tiny_patch16_224", marks=pytest.mark.soak),
        pytest.param("care_s0", marks=pytest.mark.soak),
        pytest.param("mlla_t", marks=pytest.mark.soak),
        pytest.param("resnet18", marks=pytest.mark.soak),
        pytest.param("fastvit_t8", marks=pytest.mark.soak),
    ],
)
def test_exported_networks_agree_with_torch(name: str) -> None:
    model = network(name)
    with torch.inference_mode():
        expected = model(torch.from_numpy(IMAGES)).numpy()
    proto = exported(model)
    assert difference(OnnxExecutor(proto).run(IMAGES), expected) < 1e-4
    executor = OnnxExecutor(in_half(proto), record=True)
    assert difference(executor.run(IMAGES), expected) < 2e-2
    assert first_failure(executor.overflow_report()) is None


def test_attention_of_opset_23() -> None:
    model = network("test_vit")
    with torch.inference_mode():
        expected = model(torch.from_numpy(IMAGES)).numpy()
    proto = exported(model, opset=23)
    assert sum(node.op_type == "Attention" for node in proto.graph.node) == 6
    assert difference(OnnxExecutor(proto).run(IMAGES), expected) < 1e-4
    assert difference(OnnxExecutor(in_half(proto)).run(IMAGES), expected) < 2e-2


@pytest.mark.soak
def test_fused_networks_agree_with_torch_and_every_block_is_named() -> None:
    model = network("care_s0")
    with torch.inference_mode():
        expected = model(torch.from_numpy(IMAGES)).numpy()
    require_agreement(exported(fuse(model)), expected, model)


def test_the_graph_of_a_run_agrees_with_torch_and_every_block_is_named(
    embedded_results: Path,
) -> None:
    """What a run exports is the inference form."""
    model = create_model("care_tiny")
    weights = checkpoint.embedded("care_tiny")
    assert weights is not None
    checkpoint.load(weights, model)
    with torch.inference_mode():
        expected = model.eval()(torch.from_numpy(IMAGES)).numpy()
    require_agreement(onnx.load(embedded_results / "export" / "model.onnx"), expected, model)


def require_agreement(proto: onnx.ModelProto, expected: np.ndarray, model: nn.Module) -> None:
    assert difference(OnnxExecutor(proto).run(IMAGES), expected) < 1e-4
    executor = OnnxExecutor(in_half(proto), record=True)
    assert difference(executor.run(IMAGES), expected) < 2e-2
    worst = tightest(executor.overflow_report())
    names = [name for name, _ in model.named_modules()]
    blocks = [name for name in names if re.fullmatch(r"stages.\d.blocks.\d", name)]
    assert blocks
    assert set(blocks) < set(worst)
    assert min(entry.headroom for entry in worst.values()) > 4
