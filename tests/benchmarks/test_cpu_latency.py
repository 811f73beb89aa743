"""What the CPU benchmark counts and writes; its timings need a quiet machine."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any

import click
import cpu_latency
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from cpu_latency import (
    BASELINE,
    Contender,
    build_by_tanh,
    contenders,
    convert_all,
    differs,
    main,
    markdown,
    measure,
    running,
    serve,
    show,
    work,
)
from onnx import TensorProto, helper, numpy_helper

from pipeline.core import cpu_classes, machine
from pipeline.core.errors import BuildError, UnavailableError


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
    lines = markdown({"here": here, "busy": 0, "rows": rows}).splitlines()
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
    def enter(cls: Any, purpose: cpu_classes.Purpose) -> None:
        raise UnavailableError(f"as {cls.name} not measured: no {purpose} of avx_vnni")

    monkeypatch.setattr(cpu_latency, "enter", enter)
    result = CliRunner().invoke(main, ["--as-cpu", "avx2-vnni"])
    assert result.exit_code == 4
    assert "as avx2-vnni not measured: no times of avx_vnni" in result.output


def test_a_table_says_whether_its_times_are_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "instructions", lambda: ("avx2", "fma"))
    monkeypatch.setattr(cpu_classes, "_entered", [])
    assert cpu_latency.kernels() == "AVX2"
    for emulated, words in ((["avx_vnni"], " (estimated: avx_vnni is imitated)"), ([], "")):
        cls = cpu_classes.named("avx2-vnni" if emulated else "avx2")
        cpu_classes.restrict(cls, emulated, cpu_classes.Purpose.TIMES)
        assert cpu_latency.kernels() == cls.title + words


def test_without_a_baseline_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def running(*arguments: Any) -> Iterator[Any]:
        yield {"ours fp32": None}, {"published path": "no memory"}, {}

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


SAMPLES = np.array([[1.0, -2.0, 0.5]], np.float32)


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (SAMPLES + 1e-5, ""),
        (SAMPLES + 1e-3, "differ from those of the published path by 5.0e-04 of the largest"),
        (SAMPLES * np.nan, "by nan of the largest, more than 1e-04"),
        (SAMPLES[0], r"its logits are (3,), those of the published path (1, 3)"),
    ],
)
def test_other_logits_are_told(logits: Any, words: str) -> None:
    told = differs(logits.astype(np.float32), SAMPLES)
    assert words in told
    assert bool(told) == bool(words)


class End:
    """One end of a pipe between threads; closing the other's in a thread closes nothing."""

    def __init__(self, inbox: Queue[Any], outbox: Queue[Any]) -> None:
        self.recv, self.send = inbox.get, outbox.put

    def close(self) -> None:
        pass


class Threads:
    """Stands for multiprocessing: what would be a process is a thread."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []

    def Pipe(self) -> tuple[End, End]:  # noqa: N802
        there: Queue[Any] = Queue()
        back: Queue[Any] = Queue()
        return End(back, there), End(there, back)

    def Process(self, target: Any, args: tuple[Any, ...], daemon: bool) -> Any:  # noqa: N802
        name = args[1].name

        def run() -> None:
            self.started.append(name)
            target(*args)
            self.ended.append(name)

        thread: Any = threading.Thread(target=run, daemon=daemon)
        thread.kill = lambda: None
        return thread


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    made = Threads()
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: made)
    monkeypatch.setattr(cpu_latency, "silence", lambda: None)
    monkeypatch.setattr(cpu_latency, "quiet", nullcontext)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def opener(source: str, count: int) -> Callable[[Any], Any]:
        return lambda images: images.mean((2, 3)) * float(source)

    monkeypatch.setitem(cpu_latency.OPENERS, "times", opener)
    return made


def test_what_answers_otherwise_is_not_timed(threads: Threads) -> None:
    found = [
        Contender(BASELINE, "times", "1", {}),
        Contender("right", "times", "1.00001", {}),
        Contender("wrong", "times", "1.1", {}),
        Contender("int8", "times", "1.1", {}, same=False),
        Contender("absent", "times", "1", {}, missing="it is not installed"),
        Contender("broken", "times", "no number", {}),
    ]
    with running(found, 1, 2) as (pipes, why, off):
        assert list(pipes) == [BASELINE, "right", "int8"]
    assert why.keys() == {"wrong", "absent", "broken"}
    assert off[BASELINE] == 0
    assert off["int8"] == pytest.approx(0.1, rel=1e-3)
    assert why["wrong"].startswith("its logits differ from those of the published path by 1.0e-01")
    assert why["absent"] == "it is not installed"
    assert why["broken"].startswith("ValueError: could not convert string to float")
    assert "absent" not in threads.started
    assert sorted(threads.ended) == sorted(threads.started)


def test_contended_turns_follow_quiet_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = 0
    spells: list[tuple[int, float]] = []

    @contextmanager
    def contended(count: int) -> Iterator[None]:
        nonlocal beside
        beside = count
        yield
        beside = 0

    def take_turns(pipes: Any, seconds: float) -> dict[str, list[float]]:
        spells.append((beside, seconds))
        times = {BASELINE: 10.0, "ours": 5.0} if not beside else {BASELINE: 12.0, "ours": 15.0}
        return {name: [time] * 4 for name, time in times.items()}

    @contextmanager
    def started(*arguments: Any) -> Iterator[Any]:
        yield {BASELINE: None, "ours": None}, {"absent": "not installed"}, {"ours": 2e-7}

    monkeypatch.setattr(cpu_latency, "contended", contended)
    monkeypatch.setattr(cpu_latency, "take_turns", take_turns)
    monkeypatch.setattr(cpu_latency, "running", started)
    found = [Contender(name, "", "", {}) for name in (BASELINE, "ours", "absent")]
    rows = measure("care_s0", found, 1, 1, 8.0, busy=3)
    assert spells == [(0, 2.0), (3, 2.0), (0, 2.0), (3, 2.0)]
    assert rows[1]["latency"]["p50"] == 15
    assert rows[1]["latency"]["samples"] == 8
    assert rows[1]["quiet"]["p50"] == 5
    assert rows[1]["ratio"] == 1.25
    assert rows[1]["difference"] == 2e-7
    assert (rows[1]["busy"], rows[1]["times_quiet"]) == (3, 3.0)
    assert rows[2]["not_measured"] == "not installed"
    spells.clear()
    assert "times_quiet" not in measure("care_s0", found, 1, 1, 8.0)[1]
    assert spells == [(0, 8.0)]


def test_a_contended_table_says_beside_what(capsys: pytest.CaptureFixture[str]) -> None:
    timed = {
        "latency": {"p50": 5.0, "min": 4.0},
        "ratio": 0.7,
        "interval": [0.69, 0.71],
        "limit_ms": 3.5,
        "busy": 1,
        "times_quiet": 1.456,
    }
    rows = [row("absent", "care_s0", not_measured="why", limit_ms=3.5)]
    rows.append(row("ours fp32", "care_s0", **timed))
    here = {"cpu": "Test CPU", "date": "2026-01-02", "load": 0.0, "kernels": ""}
    lines = markdown({"here": here, "busy": 1, "rows": rows}).splitlines()
    assert "; contended: half of the turns beside 1 busy process; versions: " in lines[0]
    assert lines[2] == "**Batch 1, 2 threads beside 1 busy process.**"
    assert lines[-5:] == [
        "| ms (ratio to the published path, 95 % interval; times its own when quiet) | care_s0 |",
        "|---|---|",
        "| absent | not measured: why |",
        "| ours fp32 | 5.00 (0.700, 0.690 to 0.710; 1.46) |",
        "| attainable limit, float32, quiet | 3.50 |",
    ]
    show(rows, 3.5)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "care_s0, batch 1, 2 threads beside 1 busy process"
    assert printed[2].endswith("times quiet")
    assert printed[4].endswith(" 1.46")


def test_gelu_by_tanh_is_built_by_the_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def build(network: Any, precision: str, graph: Path, folder: Path, **options: Any) -> Path:
        asked.update(options, precision=precision)
        if network.name == "mlla_t":
            raise BuildError("mlla_t has no GELU to compute by tanh: set gelu: exact")
        return folder / "made"

    monkeypatch.setattr(cpu_latency, "build_artifact", build)
    made = build_by_tanh("care_s0", tmp_path / "exact.onnx", tmp_path)
    assert asked == {"gelu": "tanh", "precision": "fp32"}
    assert (made.source, made.same, made.missing) == (str(tmp_path / "made"), False, "")
    none = build_by_tanh("mlla_t", tmp_path / "exact.onnx", tmp_path)
    assert none.missing == "mlla_t has no GELU to compute by tanh: set gelu: exact"


def test_all_that_compute_in_float32_have_to_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_latency, "why_not", lambda modules, install: f"no {modules[0]}")
    paths = {name: Path(name) for name in ("published", "exact", "fp32", "int8", "quantized")}
    tanh = Contender("tanh", "ours", "", {}, same=False)
    others = [Contender("MNN fp32", "mnn", "", {})]
    found = contenders("care_s0", paths, paths, tanh, others, torch=True)
    assert found[0].name == BASELINE
    assert [contender.name for contender in found if not contender.same] == [
        "ours int8",
        "tanh",
        "OpenVINO bf16, exact form",
        "OpenVINO int8, our Q/DQ graph",
    ]
    absent = [contender for contender in found if contender.missing]
    assert {contender.kind for contender in absent} == {"openvino"}
    assert {contender.missing for contender in absent} == {"no openvino"}
    assert "MNN fp32" in [contender.name for contender in found]


def test_other_engines_play_no_other_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = {"ncnn": "", "executorch": "no torch", "mnn": ""}
    monkeypatch.setattr(cpu_latency, "convert", lambda name, *arguments: told[name])
    made = convert_all("care_s0", tmp_path / "x.onnx", 8, tmp_path)
    assert [contender.missing for contender in made] == ["", "no torch", ""]
    assert [Path(contender.source).name for contender in made] == [
        "ncnn-8",
        "executorch-8",
        "mnn-8",
    ]
    monkeypatch.setattr(cpu_classes, "restriction", lambda: cpu_classes.named("avx2"))
    # A CPU that is of the class itself is no other.
    monkeypatch.setattr(machine, "instructions", lambda: ("avx2", "fma"))
    again = convert_all("care_s0", tmp_path / "x.onnx", 8, tmp_path)
    assert [contender.missing for contender in again] == ["", "no torch", ""]
    monkeypatch.setattr(machine, "instructions", lambda: ("avx2", "fma", "avx512f"))
    monkeypatch.setattr(cpu_latency, "reaches_every_library", lambda: True)
    faulting = convert_all("care_s0", tmp_path / "x.onnx", 8, tmp_path)
    assert [contender.missing for contender in faulting] == ["", "no torch", ""]
    monkeypatch.setattr(cpu_latency, "reaches_every_library", lambda: False)
    monkeypatch.setattr(cpu_latency, "convert", lambda *arguments: pytest.fail("not converted"))
    for contender in convert_all("care_s0", tmp_path / "x.onnx", 8, tmp_path):
        assert contender.missing == "it sees this CPU, not one of the class avx2"


@pytest.mark.parametrize(
    ("options", "busy", "name"),
    [
        ((), 0, "cpu latency"),
        (("--contended",), 5, "cpu latency contended"),
        (("--contended", "--as-cpu", "avx2"), 5, "cpu latency contended as avx2"),
    ],
)
def test_each_way_to_measure_has_its_own_table(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: tuple[str, ...],
    busy: int,
    name: str,
) -> None:
    asked: list[int] = []

    def measured(*arguments: Any) -> list[dict[str, Any]]:
        asked.append(arguments[-1])
        return [row("ours", "care_s0", not_measured="a test")]

    paths = {"exact": tmp_path, "published": tmp_path}
    results: dict[str, Any] = {
        "play": None,
        "export_graphs": paths,
        "build_ours": {},
        "build_by_tanh": None,
        "convert_all": [],
        "contenders": [],
        "peak": 1.0,
        "work": (1.0, 1.0),
        "rivals": 5,
    }
    for function, result in results.items():
        monkeypatch.setattr(cpu_latency, function, lambda *a, result=result, **k: result)
    monkeypatch.setattr(cpu_latency, "measure", measured)
    docs = tmp_path / "docs.md"
    chosen = ("--model", "care_s0", "--batch", "1", "--threads", "1", "--docs", str(docs))
    told = CliRunner().invoke(main, [*chosen, *options])
    assert told.exit_code == 0, told.output
    assert asked == [busy]
    assert f"<!-- {name} -->" in docs.read_text()
