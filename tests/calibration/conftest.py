"""Small datasets and graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper

Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass
class FakeDataset:
    """Images of 3 x 4 x 4, each filled with a number of its own, or with those in `contents`."""

    labels: Sequence[int]
    classes: Sequence[str] = ("a", "b", "c")
    offset: int = 0
    contents: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> npt.NDArray[np.float32]:
        content = self.offset + index if self.contents is None else self.contents[index]
        return np.full((3, 4, 4), content, dtype=np.float32)

    def label(self, index: int) -> int:
        return self.labels[index]

    def hash(self, index: int) -> str:
        return hashlib.sha256(self.image(index).tobytes()).hexdigest()


@pytest.fixture
def make_dataset() -> type[FakeDataset]:
    return FakeDataset


def build(
    nodes: Sequence[NodeProto],
    constants: Arrays,
    input_shape: Sequence[int | str],
    output_shape: Sequence[int | str] = ("batch", 3, 8, 8),
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, list(input_shape))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, list(output_shape))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    checker.check_model(model)
    return model


@pytest.fixture
def make_model() -> Callable[..., ModelProto]:
    return build


@pytest.fixture
def small_model() -> ModelProto:
    """Depthwise and pointwise convolution, Gelu, pooling, LayerNormalization, two linear layers."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    spread = np.array([8, 1, 0.1], dtype=np.float32)
    constants = {
        "dw": normal(3, 1, 3, 3) * spread[:, None, None, None],
        "dwb": normal(3) * spread,
        "pw": normal(6, 3, 1, 1),
        "g": np.abs(normal(6)) * np.array([10, 1, 1, 1, 1, 0.1], dtype=np.float32),
        "gb": normal(6),
        "m": normal(6, 5),
        "mb": normal(5),
        "w": normal(4, 5),
        "wb": normal(4),
    }
    nodes = [
        helper.make_node(
            "Conv", ["image", "dw", "dwb"], ["c1"], "conv1", group=3, pads=[1, 1, 1, 1]
        ),
        helper.make_node("Conv", ["c1", "pw"], ["c2"], "conv2"),
        helper.make_node("Gelu", ["c2"], ["act"], "gelu"),
        helper.make_node("GlobalAveragePool", ["act"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flatten"),
        helper.make_node("LayerNormalization", ["flat", "g", "gb"], ["norm"], "norm"),
        helper.make_node("MatMul", ["norm", "m"], ["mm"], "matmul"),
        helper.make_node("Add", ["mm", "mb"], ["hidden"], "add"),
        helper.make_node("Relu", ["hidden"], ["relu"], "relu"),
        helper.make_node("Gemm", ["relu", "w", "wb"], ["logits"], "gemm", transB=1),
    ]
    return build(nodes, constants, ["batch", 3, 8, 8], ["batch", 4])


@pytest.fixture
def images() -> npt.NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal((10, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def run_model() -> Callable[[ModelProto, npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    def run(model: ModelProto, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        import onnxruntime

        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        result: npt.NDArray[np.float32] = session.run(None, {"image": batch})[0]
        return result

    return run
