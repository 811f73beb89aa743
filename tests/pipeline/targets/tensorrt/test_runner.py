"""The GPU runner on a CUDA and a library that do what their documentation says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import (
    ArtifactError,
    BuildError,
    InputError,
    PipelineError,
    UnavailableError,
)
from pipeline.targets.tensorrt import nvml
from pipeline.targets.tensorrt.api import Library
from pipeline.targets.tensorrt.device import Gpu
from pipeline.targets.tensorrt.runner import GpuRunner

ADA = Gpu("GeForce RTX 4090", "8.9", 24 << 30, (13, 0))
CLASSES, IMAGE = 4, (3, 2, 2)


@pytest.fixture(params=["tensorrt_rtx", "tensorrt"])
def library(
    request: pytest.FixtureRequest,
    cuda: Any,
    fake_library: Callable[..., Library],
    monkeypatch: pytest.MonkeyPatch,
) -> Library:
    monkeypatch.setattr("pipeline.targets.tensorrt.builder._LOGGERS", {})
    return fake_library(cuda, request.param, IMAGE, CLASSES)


@pytest.fixture
def start(library: Library, tmp_path: Path) -> Callable[[], GpuRunner]:
    def make() -> GpuRunner:
        path = tmp_path / "model.engine"
        return GpuRunner(library, b"engine", path, ADA, cache=tmp_path / "cache")

    return make


def images(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, *IMAGE)).astype(np.float32)


def expected(given: np.ndarray) -> np.ndarray:
    sums = given.reshape(len(given), -1).sum(1)
    return np.stack([sums * (k + 1) for k in range(CLASSES)], 1)


def test_logits_of_any_batch_in_the_profile(start: Callable[[], GpuRunner], cuda: Any) -> None:
    with start() as runner:
        for batch in (1, 4, 2, 4):
            given = images(batch, batch)
            np.testing.assert_allclose(runner(given), expected(given), rtol=1e-5)
        assert sorted(runner.first_calls) == [1, 2, 4]
        assert runner.memory == 4 * 4 * (12 + CLASSES)
        assert runner.bus_id == "0000:41:1f.0"
        assert runner.load_ms > 0
    assert cuda.is_free()


def test_an_engine_for_a_fixed_batch_may_take_more(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    with GpuRunner(library, b"engine", path, ADA, cache=tmp_path / "cache", largest=1) as runner:
        assert (runner.smallest, runner.largest) == (1, 1)
        np.testing.assert_allclose(runner(images(1)), expected(images(1)), rtol=1e-5)
        with pytest.raises(InputError, match="batches of 1 to 1, not 2"):
            runner(images(2))


def test_results_are_the_callers_own(start: Callable[[], GpuRunner]) -> None:
    with start() as runner:
        first = runner(images(2, 1))
        kept = first.copy()
        runner(images(2, 2))
        np.testing.assert_array_equal(first, kept)


def test_order_in_the_stream(start: Callable[[], GpuRunner], cuda: Any) -> None:
    with start() as runner:
        runner(images(2))
        cuda.calls.clear()
        runner(images(2))
        assert [call for call in cuda.calls if call != "replay"] == [
            "record",
            "copy to gpu",
            "record",
            "record",
            "copy to pinned",
            "record",
            "synchronize",
        ]


def test_calls_in_a_queue_wait_for_nobody(start: Callable[[], GpuRunner], cuda: Any) -> None:
    with start() as runner:
        runner(images(2))
        cuda.calls.clear()
        rows = runner.throughput(40)
        assert [row.batch for row in rows] == [1, 2, 4]
        waits = [i for i, call in enumerate(cuda.calls) if call == "synchronize"]
        records = [cuda.calls[a:b].count("record") for a, b in pairwise([*waits, -1])]
        assert max(records) == 2 * 32, "32 calls are in the queue before anybody waits"


def test_one_graph_for_a_batch_size(
    start: Callable[[], GpuRunner], library: Library, cuda: Any
) -> None:
    with start() as runner:
        for batch in (2, 2, 4, 2):
            given = images(batch, batch)
            np.testing.assert_allclose(runner(given), expected(given), rtol=1e-5)
    captures = cuda.calls.count("capture_begin thread_local")
    launches = cuda.calls.count("replay")
    if library.rtx:  # which captures by itself
        assert (captures, launches) == (0, 0)
        assert library.module.config.cuda_graph_strategy == "whole"
        assert library.module.enqueued == [2, 2, 2, 4, 4, 2]  # the first of a size twice
    else:
        assert (captures, launches) == (2, 4)
        assert library.module.enqueued == [2, 2, 4, 4]  # once to warm up, once to capture


def test_timing(start: Callable[[], GpuRunner]) -> None:
    with start() as runner:
        given = images(2)
        timed = runner.timed(given)
        np.testing.assert_allclose(timed.logits, expected(given), rtol=1e-5)
        times = timed.phases
        assert times["engine"] == pytest.approx(0.25)  # the fake clock moves at each event
        assert times["copies"] == pytest.approx(0.75)
        assert times["call"] > 0
        loop = runner.engine_times(4, 70)
        assert loop == pytest.approx([0.25] * 70)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (images(5), "batches of 1 to 4, not 5; set the target's option batches"),
        (images(0), "not 0"),
        (images(2).astype(np.float64), "not float64 of 3 x 2 x 2"),
        (images(2).transpose(0, 2, 3, 1), "takes float32 images of 3 x 2 x 2, not float32 of 2 x"),
    ],
)
def test_images_that_do_not_fit(
    start: Callable[[], GpuRunner], given: np.ndarray, words: str
) -> None:
    with start() as runner, pytest.raises(InputError, match=words):
        runner(given)


def test_layouts_in_memory_do_not_matter(start: Callable[[], GpuRunner]) -> None:
    given = np.ascontiguousarray(images(2).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    with start() as runner:
        np.testing.assert_allclose(runner(given), expected(given), rtol=1e-5)


@pytest.mark.parametrize("call", ["empty gpu", "empty pinned"])
@pytest.mark.parametrize("which", [0, 1])
def test_too_little_memory_frees_what_was_there(
    start: Callable[[], GpuRunner], cuda: Any, out_of_memory: Exception, call: str, which: int
) -> None:
    cuda.fail[call] = (which, out_of_memory)
    with pytest.raises(UnavailableError, match="too little free memory; close what else runs") as e:
        start()
    assert cuda.is_free()  # while the error, with its traceback, is still held
    assert str(e.value).startswith("/")
    assert "model.engine: CUDA error: out of memory: " in str(e.value)


@pytest.mark.parametrize("call", ["init", "set_device 0", "Stream"])
def test_a_gpu_that_does_not_start(
    start: Callable[[], GpuRunner],
    cuda: Any,
    cuda_error: Callable[[int, str], Exception],
    call: str,
) -> None:
    cuda.fail[call] = (0, cuda_error(46, "CUDA-capable device(s) is/are busy or unavailable"))
    with pytest.raises(UnavailableError, match="is held exclusively by another process"):
        start()
    assert cuda.is_free()


def test_failures_at_work_free_everything(
    start: Callable[[], GpuRunner], library: Library, cuda: Any
) -> None:
    with start() as runner:
        runner(images(1))
        library.module.failing = True
        with pytest.raises(BuildError, match="the GPU fell off the bus"):
            runner(images(2))
        assert cuda.capturing is None
    assert cuda.is_free()


@pytest.mark.parametrize("library", ["tensorrt"], indirect=True)
def test_a_capture_that_is_refused(
    library: Library,
    start: Callable[[], GpuRunner],
    cuda: Any,
    cuda_error: Callable[[int, str], Exception],
) -> None:
    with start() as runner:
        library.module.failing_in_capture = True
        cuda.fail["capture_end"] = (0, cuda_error(901, "operation failed due to a previous error"))
        for _ in range(2):
            with pytest.raises(BuildError, match="the GPU fell off the bus") as held:
                runner(images(2))
        library.module.failing_in_capture = False
        np.testing.assert_allclose(runner(images(2)), expected(images(2)), rtol=1e-5)
    cuda.failing = None  # its traceback holds the graph
    assert cuda.is_free(), held


def test_a_gpu_that_is_lost_at_work(
    start: Callable[[], GpuRunner], cuda: Any, cuda_error: Callable[[int, str], Exception]
) -> None:
    with start() as runner:
        runner(images(2))
        cuda.lost = cuda_error(700, "an illegal memory access was encountered")
        with pytest.raises(PipelineError) as error:
            runner(images(2))
    assert str(error.value).endswith(
        "model.engine: CUDA error: an illegal memory access was encountered (code 700); "
        "nvidia-smi tells whether the GPU is well"
    )
    assert not isinstance(error.value, UnavailableError)
    assert cuda.memory() == []


def test_what_is_in_the_queue_ends_before_the_engine_goes(
    start: Callable[[], GpuRunner], cuda: Any
) -> None:
    with start():
        cuda.calls.clear()
    assert cuda.calls == ["synchronize", "engine freed", "empty host", "empty_cache"]


@pytest.mark.parametrize(
    ("problems", "error", "words"),
    [
        (0, ArtifactError, "it is not to my taste; build it again for this GPU"),
        (32, ArtifactError, "does not accept"),
        (4, UnavailableError, "install a newer NVIDIA driver"),
        (16, UnavailableError, "free memory on the GPU"),
    ],
)
def test_refused_engines(
    start: Callable[[], GpuRunner],
    library: Library,
    cuda: Any,
    problems: int,
    error: type[PipelineError],
    words: str,
) -> None:
    library.module.accepts, library.module.problems = False, problems
    with pytest.raises(error, match=words):
        start()
    assert cuda.is_free()


class SensorError(Exception):
    """Base of NVML's errors."""


def fake_nvml(
    reasons: int, power: bool = True, works: bool = True, known: str = "0000:01:00.0"
) -> Any:
    """Stands for `pynvml`; it knows one GPU."""

    def fail(*_: Any) -> Any:
        raise SensorError("Uninitialized")

    def find(bus: str) -> str:
        if bus != known:
            raise SensorError("Not Found")
        return bus

    opened: list[str] = []
    return SimpleNamespace(
        opened=opened,
        NVMLError=SensorError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlClocksThrottleReasonGpuIdle=1,
        nvmlClocksThrottleReasonSwPowerCap=4,
        nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlClocksThrottleReasonAll=13,
        nvmlInit=(lambda: opened.append("open")) if works else fail,
        nvmlShutdown=lambda: opened.append("shut"),
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetHandleByPciBusId=find,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1000 * kind,
        nvmlDeviceGetTemperature=lambda handle, kind: 61,
        nvmlDeviceGetPowerUsage=(lambda handle: 250_000) if power else fail,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: reasons,
        nvmlSystemGetDriverVersion=lambda: b"580.1",
    )


def test_sensors() -> None:
    module = fake_nvml(reasons=1 | 4 | 8)
    state = nvml.read("0000:01:00.0", module)
    assert state == nvml.GpuState(1000, 2000, 61, 250.0, ("SwPowerCap", "HwSlowdown"), "580.1")
    assert isinstance(state, nvml.GpuState)
    assert state.to_dict()["throttled"] == ("SwPowerCap", "HwSlowdown")
    assert module.opened == ["open", "shut"]
    silent = nvml.read(None, fake_nvml(reasons=0, power=False))
    assert isinstance(silent, nvml.GpuState)
    assert silent.power is None
    assert silent.throttled == ()


def test_no_sensors() -> None:
    assert nvml.read(None, fake_nvml(0, works=False)) == "NVML does not start (Uninitialized)"


def test_a_gpu_that_the_sensors_do_not_know_ends_no_measurement(
    start: Callable[[], GpuRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fake_nvml(reasons=0, known="elsewhere")
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with start() as runner:
        runner(images(1))
        told = runner.device_state()
    why = f"NVML does not read the GPU at {runner.bus_id} (Not Found)"
    assert told.more["sensors"] == f"not read: {why}"
    assert module.opened == ["open", "shut"] * 2
