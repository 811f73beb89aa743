"""A network of one product, and its build: what tests of tuning need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.core.network import Network
from pipeline.targets.base import BuildJob
from pipeline.targets.ort.options import OrtOptions
from pipeline.targets.ort.target import OrtTarget


def save(path: Path, factor: float) -> None:
    """A network of one product."""
    weight = numpy_helper.from_array(np.full((2, 2), factor, np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "one",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 1, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)


def build(folder: Path, threads: int = 1, **options: Any) -> dict[str, Any]:
    """Build `a.onnx` with tuning, and keep what is finished; what the target says of it."""
    (folder / "built").mkdir(exist_ok=True)
    job = BuildJob(
        network=Network("small", ("cat", "dog"), (1, 1, 2), {"size": 2}),
        precision="fp32",
        options=OrtOptions(tune=True, tune_seconds=0.01, threads=threads, **options),
        graph=folder / "a.onnx",
        module=lambda: pytest.fail("this target builds from the graph"),
        calibration=lambda n: pytest.fail("float32 needs no calibration"),
        batch=None,
        log=lambda line: None,
        evaluations=folder / "kept" / "build.jsonl",
    )
    return OrtTarget().build(job, folder / "built")
