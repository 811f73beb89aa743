"""The graph takes any batch where it can, whatever batch the models are built for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.config import ExportConfig
from pipeline.core.errors import BuildError
from pipeline.core.network import Network
from pipeline.stages.export import ExportStep

Export = Callable[[nn.Module, Any], onnx.ModelProto]


class Pooled(nn.Module):
    """Pools, and flattens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class Stubborn(nn.Module):
    """Takes three images, and no other number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(3, 3, 16).mean(2)


class Alone(nn.Module):
    """Answers otherwise where there is a single image, which the exporter does not notice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.shape[0] == 1 else x.amax((2, 3))


class Hopeless(nn.Module):
    """Cannot be traced at all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if float(x.sum()) > 0 else x.amax((2, 3))


class Biased(nn.Module):
    """An attention whose bias is a parameter, as in BEiT."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Linear(3, 48)
        self.bias = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.parts(x.flatten(2).mT).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[None])
        return seen.transpose(1, 2).flatten(2).mean(1)


@pytest.fixture
def export(tmp_path: Path) -> Callable[[nn.Module, Any], onnx.ModelProto]:
    """Exports a module, given `export.batch`."""

    def run(module: nn.Module, batch: Any) -> onnx.ModelProto:
        settings = ExportConfig(batch=batch)
        context: Any = SimpleNamespace(
            config=SimpleNamespace(export=settings, model=SimpleNamespace(title="net")),
            log=lambda line: None,
            progress=lambda *arguments: None,
        )
        step = object.__new__(ExportStep)
        step.context = context
        network = Network("net", ("a", "b", "c"), (3, 4, 4), {"size": 4})
        path = tmp_path / "model.onnx"
        model, difference = step._export(module.eval(), network, path)
        assert difference < 1e-5
        assert onnx.load(path) == model
        return model

    return run


def batch_of(model: onnx.ModelProto) -> int:
    """The batch that a graph demands; 0 if it takes any."""
    return int(model.graph.input[0].type.tensor_type.shape.dim[0].dim_value)


@pytest.mark.parametrize("batch", ["dynamic", 1, 3])
def test_the_graph_takes_any_batch(export: Export, batch: Any) -> None:
    model = export(Pooled(), batch)
    assert batch_of(model) == 0
    labels = next(prop.value for prop in model.metadata_props if prop.key == "labels")
    assert json.loads(labels) == ["a", "b", "c"]


@pytest.mark.parametrize(("module", "batch"), [(Stubborn(), 3), (Alone(), 1)])
def test_a_module_that_gives_a_graph_for_one_batch_alone(
    export: Export, module: nn.Module, batch: int
) -> None:
    assert batch_of(export(module, batch)) == batch


@pytest.mark.parametrize(
    ("module", "batch"), [(Stubborn(), "dynamic"), (Stubborn(), 2), (Hopeless(), 3)]
)
def test_a_module_that_gives_no_graph(export: Export, module: nn.Module, batch: Any) -> None:
    with pytest.raises(BuildError, match="net does not export to ONNX: "):
        export(module, batch)


def test_an_attention_whose_bias_is_a_parameter(export: Export) -> None:
    module = Biased()
    assert batch_of(export(module, "dynamic")) == 0
    assert all(parameter.requires_grad for parameter in module.parameters())


class Folded(nn.Module):
    """Adds up patches that overlap, as VOLO does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = functional.unfold(x, 3, padding=1, stride=2)
        return functional.fold(patches, x.shape[-2:], 3, padding=1, stride=2).mean((2, 3))


def test_patches_that_overlap_are_added_up_without_an_operator_of_their_own(
    export: Export,
) -> None:
    """TensorRT has no Col2Im."""
    model = export(Folded(), "dynamic")
    assert batch_of(model) == 0
    assert "Col2Im" not in {node.op_type for node in model.graph.node}
