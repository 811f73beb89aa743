"""onnxsim may crash, hang or be wrong: the graph then stays as it was, and the report says so."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.config import ExportConfig
from pipeline.stages import simplify
from pipeline.stages.simplify import SimplifyStep


def write_graph(path: Path, factor: float = 2.0) -> Path:
    """A graph that multiplies its input, (batch, 1, 2, 2), and gives it flat."""
    shape: list[str | int | None] = ["batch", 1, 2, 2]
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Mul", ["image", "factor"], ["scaled"]),
                helper.make_node("Flatten", ["scaled"], ["logits"]),
            ],
            "g",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
            [numpy_helper.from_array(np.array(factor, np.float32), "factor")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, path)
    return path


def simplified(tmp_path: Path) -> str:
    """Why the graph was not simplified; "" if it was."""
    settings = ExportConfig(simplify_timeout_s=60)
    context: Any = SimpleNamespace(
        config=SimpleNamespace(export=settings),
        log=lambda line: None,
        progress=lambda *arguments: None,
    )
    step = object.__new__(SimplifyStep)
    step.context = context
    return step._simplify(write_graph(tmp_path / "in.onnx"), tmp_path / "out.onnx", (1, 2, 2))


def test_a_graph_is_simplified(tmp_path: Path) -> None:
    assert simplified(tmp_path) == ""
    assert (tmp_path / "out.onnx").is_file()


def test_a_crash_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = [sys.executable, "-c", "import os, sys; print('boom', file=sys.stderr); os._exit(7)"]
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: real(crash, **kwargs))
    assert simplified(tmp_path) == "onnxsim failed with code 7: boom"


def test_a_hang_is_ended(tmp_path: Path) -> None:
    source = write_graph(tmp_path / "in.onnx")
    assert simplify.simplify_apart(source, tmp_path / "out.onnx", 0.01) == (
        "onnxsim took more than 0.01 s"
    )


def test_a_wrong_result_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = write_graph(tmp_path / "wrong.onnx", factor=2.1)

    def mistaken(source: Path, result: Path, timeout_s: float) -> str:
        shutil.copyfile(wrong, result)
        return ""

    monkeypatch.setattr(simplify, "simplify_apart", mistaken)
    assert simplified(tmp_path).startswith("onnxsim changed the logits by 5.0e-02")
