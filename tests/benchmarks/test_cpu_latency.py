"""What the CPU benchmark counts and writes; its timings need a quiet machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import cpu_latency
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from cpu_latency import Contender, main, markdown, serve, work
from onnx import TensorProto, helper, numpy_helper

from pipeline.core import machine
from pipeline.core.errors import UnavailableError


def test_work_counts_multiplications_and_additions(tmp_path: Path) -> None:
    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(np.ones(shape, np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "dense"], ["a"], strides=[2, 2]),
        helper.make_node("Conv", ["a", "depthwise"], ["b"], group=8, pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "linear"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 5])],
        [weight("dense", 8, 3, 2, 2), weight("depthwise", 8, 1, 3, 3), weight("linear", 8, 5)],
    )
    path = tmp_path / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    dense, depthwise = work(path)
    assert dense == pytest.approx(2e-9 * (8 * 3 * 4 * 16 + 8 * 5))
    assert depthwise == pytest.approx(2e-9 * 8 * 9 * 16)


def row(contender: str, model: str, **other: Any) -> dict[str, Any]:
    return {"contender": contender, "model": model, "batch": 1, "threads": 2, **other}


def test_networks_stand_side_by_side() -> None:
    timed = {
        "latency": {"p50": 5.0},
        "ratio": 0.7,
        "interval": [0.69, 0.71],
        "limit_ms": 3.5,
    }
    rows = [
        row("ours fp32", "care_s0", **timed),
        row("ours fp32", "care_s1", not_measured="no memory", limit_ms=4.5),
        row("OpenVINO fp32", "care_s1", **{**timed, "limit_ms": 4.5}),
    ]
    here = {"cpu": "Test CPU", "date": "2026-01-02", "load": 0.0, "kernels": "AVX2"}
    lines = markdown({"here": here, "rows": rows}).splitlines()
    assert lines[0].startswith(
        "cpu Test CPU, date 2026-01-02, load 0.0, kernels of AVX2; versions: "
    )
    assert lines[-5:] == [
        "| ms (ratio to the published path, 95 % interval) | care_s0 | care_s1 |",
        "|---|---|---|",
        "| ours fp32 | 5.00 (0.700, 0.690 to 0.710) | not measured: no memory |",
        "| OpenVINO fp32 | - | 5.00 (0.700, 0.690 to 0.710) |",
        "| attainable limit, float32 | 3.50 | 4.50 |",
    ]


class Pipe:
    """What a process tells its parent, which asks for no call."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def send(self, what: Any) -> None:
        self.told.append(what)

    def recv(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("avx2", "avx512f"), "this CPU has no amx_bf16 and no avx512_bf16"),
        (("avx512_bf16",), "compiled for bf16"),
        (("amx_bf16",), "compiled for bf16"),
    ],
)
def test_bfloat16_is_asked_for_only_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], words: str
) -> None:
    def compile_model(self: Any, source: str, device: str, settings: dict[str, Any]) -> Any:
        raise UnavailableError(f"compiled for {settings['INFERENCE_PRECISION_HINT']}")

    openvino = ModuleType("openvino")
    openvino.Core = type("Core", (), {"compile_model": compile_model})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    monkeypatch.setattr(machine, "instructions", lambda: flags)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pipe: Any = Pipe()
    serve(pipe, Contender("OpenVINO", "openvino", "x.onnx", {"precision": "bf16"}), 1, 1, None)
    assert pipe.told == [words]


def test_a_class_that_this_cpu_cannot_play_is_exit_code_4(monkeypatch: pytest.MonkeyPatch) -> None:
    def enter(cls: Any) -> None:
        raise UnavailableError(f"as {cls.name} not measured: this CPU has no avx_vnni")

    monkeypatch.setattr(cpu_latency, "enter", enter)
    result = CliRunner().invoke(main, ["--as-cpu", "avx2-vnni"])
    assert result.exit_code == 4
    assert "as avx2-vnni not measured: this CPU has no avx_vnni" in result.output


def test_without_a_baseline_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def running(*arguments: Any) -> Iterator[Any]:
        yield {"ours fp32": None}, {"published path": "no memory"}

    monkeypatch.setattr(cpu_latency, "running", running)
    with pytest.raises(click.ClickException, match="the published path does not run: no memory"):
        cpu_latency.measure("care_s0", [], 1, 1, 0.1)


@pytest.mark.parametrize("more", [[], ["--quick"]])
def test_more_threads_than_granted_are_refused(
    monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.setattr(machine, "load", lambda: pytest.fail("refused before anything is measured"))
    result = CliRunner().invoke(main, ["--threads", "4096", *more])
    assert result.exit_code == 2
    assert "this process may use" in result.output
