"""Progress where there is no screen to draw a bar on."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.commands.console import EVERY_S, JsonConsole, QuietConsole, RichConsole

STEP: Any = SimpleNamespace(stage="build", name="ort/int8")


class Clock:
    """A time that tests move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_long_step_in_a_pipe_says_every_so_often_how_far_it_is() -> None:
    screen, clock = io.StringIO(), Clock()
    with RichConsole(screen, clock) as console:
        console.planned([STEP, STEP])
        console.started(STEP, "not built yet")
        console.progress(1, 300, "decoding images")
        assert screen.getvalue() == ""
        for _ in range(3):
            clock.now += EVERY_S
            console.progress(200, 300, "decoding images")
            console.progress(201, 300, "decoding images")
    lines = [line for line in screen.getvalue().splitlines() if line.strip()]
    # 200 of 300 after a minute from the first, then a hundred more in twice the time.
    assert lines == [
        "1/2 ort/int8 · decoding images 200/300, about 30 s left",
        "1/2 ort/int8 · decoding images 200/300, about 1 min left",
        "1/2 ort/int8 · decoding images 200/300, about 2 min left",
    ]


def test_a_step_begins_its_own_time() -> None:
    screen, clock = io.StringIO(), Clock()
    with RichConsole(screen, clock) as console:
        clock.now += 2 * EVERY_S
        console.started(STEP, "not built yet")
    assert screen.getvalue().strip() == ""


def test_json_tells_progress_and_ends_with_a_summary() -> None:
    screen, clock = io.StringIO(), Clock()
    console = JsonConsole(screen, clock)
    with console:
        console.started(STEP, "not built yet")
        console.progress(1, 2, "building")
        clock.now += EVERY_S
        console.progress(2, None, "building")
        console.summary(exit_code=0, use={"ort": "int8"})
    events = [json.loads(line) for line in screen.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["started", "progress", "summary"]
    assert events[1] == {
        "event": "progress",
        "name": "ort/int8",
        "done": 2,
        "total": None,
        "what": "building",
        "left_s": None,
    }
    assert events[2] == {"event": "summary", "exit_code": 0, "use": {"ort": "int8"}}


def test_what_a_run_takes_is_told_before_it_begins() -> None:
    line = "3 steps to run: about 1 min, as long as [last] time"
    screen = io.StringIO()
    with RichConsole(screen, Clock()) as console:
        console.costs(lambda: [line])
    assert line in screen.getvalue()
    screen = io.StringIO()
    JsonConsole(screen, Clock()).costs(lambda: [line])
    assert json.loads(screen.getvalue()) == {"event": "costs", "lines": [line]}
    screen = io.StringIO()
    QuietConsole(screen).costs(lambda: pytest.fail("nobody wants to know"))
    assert screen.getvalue() == ""


def test_the_time_left_is_that_of_what_is_done_now() -> None:
    screen, clock = io.StringIO(), Clock()
    console = JsonConsole(screen, clock)
    console.started(STEP, "not built yet")
    console.progress(100, 1000, "goes on where a killed one was")
    clock.now += EVERY_S
    console.progress(200, 1000, "goes on where a killed one was")
    clock.now += EVERY_S
    console.progress(0, 4, "another thing")
    clock.now += EVERY_S
    console.progress(1, 4, "another thing")
    left = [json.loads(line).get("left_s") for line in screen.getvalue().splitlines()[1:]]
    assert left == [8 * EVERY_S, None, 3 * EVERY_S]


def test_lines_of_the_log_are_shown_where_they_are_asked_for() -> None:
    for kind, expected in (
        (RichConsole, "a [line]"),
        (QuietConsole, "a [line]"),
        (JsonConsole, '{"event": "log", "text": "a [line]"}'),
    ):
        screen = io.StringIO()
        with kind(screen) as console:
            console.logged("a [line]")
        assert screen.getvalue().strip() == expected
