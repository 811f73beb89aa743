"""A calibration in shards: however it was cut, and whoever looked, the tables are the same."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest

from calibration import observe as observing
from calibration.parts import COUNTS
from pipeline import config
from pipeline.core.errors import ArtifactError
from pipeline.stages.names import GRAPH
from pipeline.stages.observing import ObservationShard, Observed, size_of
from pipeline.stages.ranges import RANGES
from pipeline.stages.shards import forget, place_of_shards
from pipeline.steps.artifact import Artifact
from pipeline.targets.ort.quantize import Int8Ort
from pipeline.targets.tensorrt.quantize import Fp8Trt, Int8Trt
from tests.pipeline.stages.observing_toys import run_shard, step_of, write

ONE, TWO, THREE = 48, 32, 16
"""Images of a shard, with which there are so many of them."""


class Killed(BaseException):
    """What a signal raises."""


@pytest.fixture
def folder(tmp_path: Path, small_graph: Callable[..., onnx.ModelProto]) -> Path:
    write(tmp_path, small_graph())
    return tmp_path


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """Which images were looked at; the list may name one at which a signal comes."""
    looked: list[tuple[int, int | None]] = []
    real = observing.observe

    def observe(*args: Any, **more: Any) -> Any:
        looked.append(more.get("between", (0, None)))
        if looked[:1] == [(-1, len(looked) - 1)]:
            raise Killed
        return real(*args, **more)

    monkeypatch.setattr(observing, "observe", observe)
    return looked


def table(folder: Path, shard: int) -> bytes:
    """The table that a calibration in such shards gives."""
    made = step_of(folder, shard).run()
    assert not (folder / ".evaluations").exists()
    return made.path(RANGES).read_bytes()


@pytest.mark.parametrize("shard", [TWO, THREE])
def test_tables_do_not_depend_on_shards(
    folder: Path, shard: int, looks: list[tuple[int, int | None]]
) -> None:
    whole = table(folder, ONE)
    assert looks == [(0, None)]
    assert table(folder, shard) == whole
    cut = {TWO: [(0, 32), (32, None)], THREE: [(0, 16), (16, 32), (32, None)]}
    assert looks[1:] == cut[shard]


@pytest.mark.parametrize(("shard", "count"), [(TWO, 2), (THREE, 3)])
def test_tables_do_not_depend_on_processes(
    folder: Path, shard: int, count: int, looks: list[tuple[int, int | None]]
) -> None:
    whole = table(folder, ONE)
    looks.clear()
    numbers = list(reversed(range(count)))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = list(pool.map(run_shard, [str(folder)] * count, [shard] * count, numbers))
    step = step_of(folder, shard)
    assert made == [step.shards()[number].artifact().digest for number in numbers]
    assert table(folder, shard) == whole
    assert looks == [], "nothing is looked at again"


def test_a_calibration_that_was_killed_goes_on(
    folder: Path, looks: list[tuple[int, int | None]]
) -> None:
    whole = table(folder, ONE)
    looks[:] = [(-1, 2)]
    with pytest.raises(Killed):
        step_of(folder, THREE).run()
    looks.clear()
    assert table(folder, THREE) == whole
    assert looks == [(16, 32), (32, None)]


def test_a_damaged_shard_is_looked_at_again(
    folder: Path, looks: list[tuple[int, int | None]]
) -> None:
    whole = table(folder, ONE)
    step = step_of(folder, TWO)
    for shard in step.shards():
        shard.run()
    np.save(step.shards()[1].folder / COUNTS, np.zeros(3, np.int64))
    looks.clear()
    assert table(folder, TWO) == whole
    assert looks == [(32, None)]


def test_what_was_seen_of_another_graph_counts_for_nothing(
    folder: Path, small_graph: Callable[..., onnx.ModelProto], looks: list[Any]
) -> None:
    """A form may prepare its graph in another way than when the shards looked."""
    step = step_of(folder, TWO)
    for shard in step.shards():
        shard.run()
    path = folder / "onnx" / GRAPH
    tensors = list(observing.GraphTensors(path).names[:2])
    images = step.shards()[0]._images()
    looks.clear()
    found = step.look(path, images, tensors)
    assert list(found) == tensors
    assert looks == [(0, 32), (32, None)]


def test_only_the_first_graph_has_shards(folder: Path, looks: list[Any]) -> None:
    step = step_of(folder, TWO)
    path = folder / "onnx" / GRAPH
    images = step.shards()[0]._images()
    first = step.look(path, images)
    looks.clear()
    second = step.look(path, images)
    assert looks == [(0, None)]
    assert {n: s.histogram.counts.tobytes() for n, s in first.items()} == {
        n: s.histogram.counts.tobytes() for n, s in second.items()
    }


def test_what_cannot_be_kept_is_no_reason_to_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = table(folder, ONE)

    def full(*args: Any, **more: Any) -> Artifact:
        more["build"](folder)
        raise ArtifactError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(ObservationShard, "make", lambda self, build: full(build=build))
        assert table(folder, TWO) == whole


def test_an_audit_looks_at_all_anew(folder: Path, looks: list[Any]) -> None:
    step = step_of(folder, TWO)
    made = step.run()
    looks.clear()
    assert step.again(folder / "again").digest == made.digest
    assert looks == [(0, None)]
    assert len(step.shards()) == 2


def test_of_few_large_batches_some_shards_are_empty(
    folder: Path, small_graph: Callable[..., onnx.ModelProto]
) -> None:
    """A graph with a fixed batch takes no other."""
    graph = small_graph()
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 40
    path = folder / "onnx" / GRAPH
    images = step_of(folder, THREE).shards()[0]._images()
    onnx.save(graph, path)
    parts = [observing.observe(path, images, between=b) for b in [(0, 16), (16, 32), (32, None)]]
    for number, part in enumerate(parts):
        assert all((seen.histogram.count > 0) == (number == 0) for seen in part.values())
    merged, alone = observing.merge(parts), observing.observe(path, images)
    assert {n: s.histogram.counts.tobytes() for n, s in merged.items()} == {
        n: s.histogram.counts.tobytes() for n, s in alone.items()
    }


def test_shards_are_whole_batches() -> None:
    def size(shard: int) -> int:
        calibration = SimpleNamespace(shard=shard)
        return size_of(cast(Any, SimpleNamespace(calibration=calibration)))

    assert [size(shard) for shard in (1, 16, 17, 256)] == [16, 16, 32, 256]


def test_forgotten_shards_leave_nothing(folder: Path) -> None:
    step = step_of(folder, TWO)
    for shard in step.shards():
        shard.run()
    forget(folder / place_of_shards(step))
    assert not (folder / ".evaluations").exists()


@pytest.mark.parametrize("form", [Int8Trt(), Fp8Trt(), Int8Ort()])
def test_forms_say_what_they_look_at_first(
    form: Any, folder: Path, small_graph: Callable[..., onnx.ModelProto]
) -> None:
    assert form.observes
    path = folder / "onnx" / GRAPH
    first = Observed(*form.observed(path))
    assert first.tensors
    assert Observed(*form.observed(path)).digest == first.digest
    assert Observed(path).digest != first.digest


def test_a_shards_size_is_in_no_key(tmp_path: Path) -> None:
    from pipeline.scheduler.plan import make_context, plan

    def inputs(shard: int) -> dict[str, Any]:
        values = {
            "name": "mine",
            "output": str(tmp_path),
            "model": {"name": "care_tiny", "checkpoint": "embedded"},
            "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
            "calibration": {"shard": shard},
            "targets": {"trt": {"precisions": ["int8"]}},
        }
        context = make_context(config.from_mapping(values).config, print, lambda *told: None)
        steps = {step.name: step for step in plan(context)}
        return cast(Any, steps["precision/int8-trt"])._options()  # type: ignore[no-any-return]

    assert inputs(64) == inputs(512)
    assert "method" in inputs(64)
