"""A session that answers, and the memory that it works in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.core import huge_pages
from pipeline.core.huge_pages import HugePages, Moved
from pipeline.core.runner import DeviceState
from pipeline.targets.ort import tune
from pipeline.targets.ort.runner import OrtRunner
from pipeline.targets.ort.session import Settings
from pipeline.targets.ort.tune import Candidate, Trial, choose

SIDE = 1024


def save(path: Path) -> Path:
    """A network whose values take 4 MB an image: the sum of a row of itself."""
    graph = helper.make_graph(
        [
            helper.make_node("Exp", ["image"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("ReduceMean", ["b"], ["logits"], axes=[2], keepdims=0),
        ],
        "large",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", SIDE])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


IMAGE = np.zeros((1, SIDE, SIDE), np.float32)


def test_what_a_session_works_in_is_moved_once_and_answers_stay(tmp_path: Path) -> None:
    model = save(tmp_path / "model.onnx")
    with OrtRunner(model, Settings(), 1) as runner:
        first = runner(IMAGE)
        assert runner.device_state() is None
        second, third = runner(IMAGE), runner(IMAGE)
        state = runner.device_state()
    assert (first == 1).all()
    assert (second == first).all()
    assert (third == first).all()
    assert state is not None
    assert state.throttled == ()
    assert set(state.more) <= {"huge_pages_bytes", "no_huge_pages"}
    if huge_pages.why_not():
        assert state == DeviceState(more={"no_huge_pages": huge_pages.why_not()})


@pytest.mark.parametrize(("work", "calls_before"), [("relocate", 1), ("note", 0)])
def test_what_is_done_for_huge_pages_is_no_part_of_a_call_that_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str, calls_before: int
) -> None:
    clock = [0.0]

    def takes_long(pages: HugePages) -> None:
        clock[0] += 100

    monkeypatch.setattr(HugePages, work, takes_long)
    monkeypatch.setattr("pipeline.targets.ort.runner.time.perf_counter", lambda: clock[0])
    with OrtRunner(save(tmp_path / "model.onnx"), Settings(), 1) as runner:
        for _ in range(calls_before):
            runner(IMAGE)
        assert runner.timed(IMAGE).phases == {"engine": 0.0}
    assert clock == [100.0]


def test_it_stays_where_it_is_if_that_is_asked_for(tmp_path: Path) -> None:
    model = save(tmp_path / "model.onnx")
    with OrtRunner(model, Settings(huge_pages=False), 1) as runner:
        runner(IMAGE)
        runner(IMAGE)
        assert runner.device_state() is None


@pytest.mark.parametrize(
    ("moved", "told"),
    [
        (Moved(2 << 20), {"huge_pages_bytes": 2 << 20}),
        (Moved(0, "only Linux has them"), {"no_huge_pages": "only Linux has them"}),
    ],
)
def test_it_says_what_was_moved_or_why_nothing_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: Moved, told: dict[str, object]
) -> None:
    def move(pages: HugePages) -> None:
        pages.moved, pages._due = moved, False

    monkeypatch.setattr(HugePages, "relocate", move)
    with OrtRunner(save(tmp_path / "model.onnx"), Settings(), 1) as runner:
        runner(IMAGE)
        runner(IMAGE)
        assert runner.device_state() == DeviceState(more=told)


@pytest.mark.parametrize("asked", [True, False])
def test_ways_are_compared_in_the_pages_that_they_are_used_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    events: list[str] = []
    monkeypatch.setattr(HugePages, "note", lambda pages: events.append("note"))
    monkeypatch.setattr(HugePages, "relocate", lambda pages: events.append("move"))

    def times(
        sessions: dict[str, object], images: object, seconds: float
    ) -> dict[str, list[float]]:
        events.append("timed")
        return {name: [1.0] * 9 for name in sessions}

    monkeypatch.setattr(tune, "interleave", times)
    save(tmp_path / "model.onnx")
    way = Candidate("model.onnx", Settings(huge_pages=asked))
    choose(Trial(tmp_path, {"a": way, "b": way}, 1, IMAGE, 1.0))
    assert events == (["note", "move"] if asked else []) + ["timed"]
