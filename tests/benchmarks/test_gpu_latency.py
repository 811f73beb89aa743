from __future__ import annotations

import gpu_latency
import pytest
from gpu_latency import Way, interleaved

from pipeline.targets.tensorrt.device import NO_DRIVER


def test_ways_take_turns_until_each_has_run_long_enough() -> None:
    order: list[str] = []

    def way(name: str, milliseconds: float) -> Way:
        def time(calls: int) -> list[float]:
            order.append(name)
            return [milliseconds] * calls

        return Way(name, time)

    times = interleaved([way("slow", 50.0), way("fast", 25.0)], seconds=1.0)
    assert order == ["slow", "fast"] * 5  # to warm up, then until the fast one has had a second
    assert {name: sum(samples) for name, samples in times.items()} == {"slow": 2000, "fast": 1000}


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_latency, "find_gpu", lambda: NO_DRIVER)
    monkeypatch.setattr("sys.argv", ["gpu_latency.py"])
    assert gpu_latency.main() == 4
    assert capsys.readouterr().err == f"error: {NO_DRIVER}\n"
