"""What tests of this target share."""

from __future__ import annotations

import pytest

from pipeline.core import machine


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run beside each other, and comparisons decide nothing on a busy machine."""
    monkeypatch.setattr(machine.Watch, "others", lambda self: 0.0)
