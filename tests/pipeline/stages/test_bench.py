from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config import BenchConfig
from pipeline.core import machine
from pipeline.core.errors import InputError
from pipeline.core.figures import Throughput
from pipeline.core.network import Batch, Images, Logits, Pixels
from pipeline.core.preprocess import Pictures, Preprocess
from pipeline.core.runner import DeviceState, Runner
from pipeline.stages import bench
from pipeline.steps.facts.bench import Measured

HALF = Preprocess(4, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
ONE = Pictures(np.zeros((1, 4, 4, 3), np.uint8), HALF)


class Echo(Runner):
    """Answers at once, and keeps the batch sizes that it was given."""

    device = "echo"

    def __init__(self, seen: list[int], smallest: int = 1, largest: int | None = None) -> None:
        self.seen, self.smallest, self.largest = seen, smallest, largest

    def __call__(self, images: Images) -> Logits:
        self.seen.append(len(images))
        return np.zeros((len(images), 2), np.float32)

    def throughput(self, calls: int) -> list[Throughput]:
        return [Throughput(4, 1.0, None, 4000.0)]

    def device_state(self) -> DeviceState:
        return DeviceState(("heat",))


class TakesPixels(Echo):
    """Takes what it must not be normalized for, and keeps every batch."""

    takes = "pixels"

    def __init__(self, batches: list[Pixels]) -> None:
        super().__init__([])
        self.batches = batches

    def __call__(self, images: Batch) -> Logits:
        self.batches.append(images)
        return super().__call__(images)


class Dataset:
    def __len__(self) -> int:
        return 2


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Any:
    import torch

    source = SimpleNamespace(
        module=torch.nn.Flatten(),
        validation=Dataset(),
        pictures=lambda dataset, indices: ONE.repeated(len(list(indices))),
    )
    monkeypatch.setattr(machine, "load", lambda: 0.5)
    return SimpleNamespace(source=source, progress=lambda *arguments: None, config=None)


def measure(context: Any, runner: Runner, **settings: Any) -> Measured:
    config = BenchConfig(samples=3, warmup=1, max_seconds=60, threads=1, **settings)
    context.config = SimpleNamespace(bench=config)
    return bench.measure(context, {"fp32": lambda: runner}, "Echo", ONE)


@pytest.mark.parametrize(("batches", "smallest"), [((8,), 8), ((4, 2), 2), ((1, 8), 1)])
def test_the_end_to_end_latency_says_of_which_batch_it_is(
    context: Any, batches: tuple[int, ...], smallest: int
) -> None:
    seen: list[int] = []
    measured = measure(context, Echo(seen), batches=batches)
    assert measured.end_to_end.batch == smallest == seen[-1]
    assert set(measured.end_to_end.latency) == {"fp32", "pytorch"}
    assert tuple(measured.batches) == batches
    assert measured.first_batch == batches[0]


def test_a_runner_that_takes_pixels_is_measured_with_pixels(context: Any) -> None:
    batches: list[Pixels] = []
    measured = measure(context, TakesPixels(batches), batches=(2, 1))
    assert {batch.dtype.name for batch in batches} == {"uint8"}
    assert {batch.shape for batch in batches} == {(2, 4, 4, 3), (1, 4, 4, 3)}
    assert set(measured.end_to_end.latency) == {"fp32", "pytorch"}


def test_what_is_measured_beside_latency(context: Any) -> None:
    measured = measure(context, Echo([]), batches=(1,))
    assert measured.throughput == {"fp32": (Throughput(4, 1.0, None, 4000.0),)}
    assert measured.device_state == {"fp32": DeviceState(("heat",))}
    assert measured.devices["fp32"] == "echo"
    assert measured.load_before == 0.5
    assert set(measured.cold_start_ms) == {"fp32"}
    latency = measured.batches[1]
    assert latency.baseline == "fp32"
    assert len(latency.samples_ms["pytorch"]) == 3


@pytest.mark.parametrize("runner", [partial(Echo, smallest=2), partial(Echo, largest=2)])
def test_a_batch_that_a_runner_does_not_take_is_refused(context: Any, runner: Any) -> None:
    with pytest.raises(InputError, match=r"Echo fp32 takes batches of .*: change bench\.batches"):
        measure(context, runner([]), batches=(4, 1))
