"""What is missing, on a narrow screen too."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.commands import doctor
from pipeline.report import terminal
from pipeline.targets.base import Requirement
from pipeline.targets.registry import TARGETS

REMEDY = "install the driver of NVIDIA, version 580 or newer, and start the machine again"


def test_a_remedy_is_whole_on_a_narrow_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [Requirement("an NVIDIA GPU", None, "measure", REMEDY)]
    monkeypatch.setattr(TARGETS["ort"], "requirements", lambda: needs)
    wide: Callable[..., str] = terminal.render
    monkeypatch.setattr(doctor, "render", lambda *parts: wide(*parts, width=60))
    text = doctor.doctor("ort")
    assert max(map(len, text.splitlines())) <= 60
    assert f"an NVIDIA GPU: {REMEDY}" in " ".join(text.split())
