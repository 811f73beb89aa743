"""What Core ML and Core AI share."""

from __future__ import annotations

import platform
import subprocess

import pytest

from pipeline.targets import apple


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("CPU_Speed_Limit \t= 100\n", "nominal"),
        ("CPU_Speed_Limit = 60", "serious"),
        ("Note: No thermal warning level has been recorded", "nominal"),
        ("?", "unknown"),
    ],
)
def test_thermal_state(monkeypatch: pytest.MonkeyPatch, text: str, state: str) -> None:
    monkeypatch.setattr(apple, "_output", lambda *command: text)
    assert apple.thermal_state() == state


def test_what_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*command: str) -> str:
        raise subprocess.TimeoutExpired(command, 10)

    monkeypatch.setattr(apple, "_output", fails)
    assert apple.thermal_state() == "unknown"
    assert apple.mac_model() == platform.machine()
