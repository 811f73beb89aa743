from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser

MakeModel = Callable[..., onnx.ModelProto]


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Builds a model from the text of its nodes: `x` is the input, `y` the output."""

    def make(
        body: str,
        shape: tuple[int | str, ...],
        constants: Mapping[str, np.ndarray | onnx.TensorProto] | None = None,
        *,
        x: str = "float",
        y: str = "float",
        opset: int = 20,
        functions: str = "",
    ) -> onnx.ModelProto:
        sizes = ",".join(str(n) for n in shape)
        imports = f'"" : {opset}' + (', "local" : 1' if functions else "")
        model = parser.parse_model(
            f"<ir_version: 10, opset_import: [{imports}]>"
            f"g ({x}[{sizes}] x) => ({y}[] y) {{ {body} }} {functions}"
        )
        model.graph.output[0].type.tensor_type.ClearField("shape")
        for name, value in (constants or {}).items():
            if isinstance(value, np.ndarray):
                value = numpy_helper.from_array(value, name)
            value.name = name
            model.graph.initializer.append(value)
        return model

    return make
