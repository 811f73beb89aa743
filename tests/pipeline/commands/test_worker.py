"""The command line of a worker."""

from __future__ import annotations

import shlex
import sys

import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.targets.base import Requirement
from pipeline.targets.registry import TARGETS


def stated(monkeypatch: pytest.MonkeyPatch, *there: str, bench: bool = True) -> tuple[str, str]:
    """What the printed command states, on a machine with some targets' hardware; and remarks."""
    for name, runtime in TARGETS.items():
        found = "it" if name in there else None
        needs = [Requirement("a device", found, "run", ""), Requirement("lib", None, "measure", "")]
        monkeypatch.setattr(type(runtime), "requirements", lambda self, needs=needs: needs)
    more = [] if bench else ["--no-bench"]
    result = CliRunner().invoke(main, ["worker", "tls://box:8786", *more])
    assert result.exit_code == 0, result.output
    words = result.stdout.split()
    assert words == shlex.split(result.stdout), "a shell takes $(…) apart without looking at quotes"
    assert words[:4] == ["dask", "worker", "tls://box:8786", "--nthreads"]
    return words[words.index("--resources") + 1], result.stderr


def test_a_worker_states_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert stated(monkeypatch, "trt")[0] == "cpu=1,rtx=1,bench=1"
    assert stated(monkeypatch)[0] == "cpu=1,bench=1"
    assert "no rtx=1: a device is missing" in stated(monkeypatch)[1]
    assert stated(monkeypatch, bench=False)[0] == "cpu=1"


def test_a_mac_judges_and_builds_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert stated(monkeypatch, "coreml")[0] == "mac=1,bench=1"


def test_what_is_no_address_is_refused() -> None:
    result = CliRunner().invoke(main, ["worker", "box:8786"])
    assert result.exit_code == 2
    assert "write tls://HOST:PORT" in result.output
