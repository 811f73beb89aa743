"""Processes for steps that start at once."""

from __future__ import annotations

import multiprocessing

import pytest

from tests import forked


@pytest.fixture
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps' processes are forked, where a run starts each with an interpreter of its own.

    What they do is the same. `test_side_by_side.py` starts them as a run does.
    """
    context = forked.context()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
