"""onnxsim may crash, hang or be wrong: the graph then stays as it was, and the report says so."""

from __future__ import annotations

import shutil
import signal
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
from pipeline.core.network import Network
from pipeline.stages import onnxsim_process, simplify
from pipeline.stages.simplify import Refusal, SimplifyStep
from pipeline.steps import artifact, keys
from pipeline.steps.step import Context

ROOT = Path(__file__).parents[3]


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
    refusal = step._simplify(write_graph(tmp_path / "in.onnx"), tmp_path / "out.onnx", (1, 2, 2))
    return refusal.why if refusal else ""


def test_a_graph_is_simplified(tmp_path: Path) -> None:
    assert simplified(tmp_path) == ""
    assert (tmp_path / "out.onnx").is_file()


def test_what_simplifying_does_not_need_is_not_loaded(tmp_path: Path) -> None:
    source, result = write_graph(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    command = [sys.executable, "-X", "importtime", "-m", onnxsim_process.__name__]
    done = subprocess.run(
        [*command, str(source), str(result)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "onnxsim" in loaded
    # What is kept out is named, too, as what was looked for: its parts are not.
    assert not [name for name in loaded if name.startswith(("torch.", "sympy."))]
    assert result.is_file()


def test_a_crash_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = [sys.executable, "-c", "import os, sys; print('boom', file=sys.stderr); os._exit(7)"]
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: real(crash, **kwargs))
    assert simplified(tmp_path) == "onnxsim failed with code 7: boom"


def test_a_hang_is_ended(tmp_path: Path) -> None:
    source = write_graph(tmp_path / "in.onnx")
    refusal = simplify.simplify_apart(source, tmp_path / "out.onnx", 0.01)
    assert refusal == Refusal("onnxsim took more than 0.01 s", fault=True)


def test_a_wrong_result_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = write_graph(tmp_path / "wrong.onnx", factor=2.1)

    def mistaken(source: Path, result: Path, timeout_s: float) -> None:
        shutil.copyfile(wrong, result)

    monkeypatch.setattr(simplify, "simplify_apart", mistaken)
    assert simplified(tmp_path).startswith("onnxsim changed the logits by 5.0e-02")


def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimplifyStep:
    """The step after an export of a small graph."""
    folder = tmp_path / "run"
    facts = {"network": Network("n", ("a",), (1, 2, 2), {}).to_dict()}

    def write(place: Path) -> dict[str, Any]:
        write_graph(place / "model.onnx")
        return facts

    artifact.make(
        folder / "export",
        kind="export",
        name="export",
        key="k",
        made_from={},
        tools={},
        build=write,
    )
    settings: Any = SimpleNamespace(export=ExportConfig(simplify_timeout_s=60), folder=folder)
    context: Any = Context(
        config=settings,
        log=lambda line: None,
        progress=lambda *arguments: None,
        code=keys.project(),
    )
    export: Any = SimpleNamespace(
        name="export",
        folder=folder / "export",
        artifact=lambda: artifact.Artifact.read(folder / "export"),
    )
    return SimplifyStep(context, export)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_crash_is_said_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    step = exported(tmp_path, monkeypatch)
    crash = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(number)})"]
    real = subprocess.run
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda command, **kwargs: real(crash, **kwargs))
        made = step.run()
    assert made.facts["simplified"] is False
    assert step.notes == [
        f"onnxsim failed with code {-number}: no message; the graph goes on as it was exported"
    ]
    assert step.stale() == "onnxsim failed the last time"
    again = exported(tmp_path, monkeypatch)
    assert again.run().facts["simplified"] is True
    assert again.stale() is None


def test_files_of_the_working_directory_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    assert simplified(tmp_path) == ""
