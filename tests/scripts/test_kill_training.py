from __future__ import annotations

import json
from pathlib import Path

import click.testing
import kill_training
import pytest
import torch

from care.history import write_sealed


@pytest.mark.soak
def test_a_killed_training_ends_like_one_that_was_not() -> None:
    """A small version of what the script does at length, with both kinds of signals."""
    for more in ([], ["--signals"]):
        arguments = ["--kills", "2", *more]
        result = click.testing.CliRunner().invoke(kill_training.main, arguments)
        assert result.exit_code == 0, (result.output, result.exception)
        found = json.loads(result.output.splitlines()[-1])
        assert (found["kills"], found["left_over"], found["identical"]) == (2, [], True)


def test_a_difference_is_told(tmp_path: Path) -> None:
    for name, value in (("whole", 1.0), ("parts", 2.0)):
        (tmp_path / name).mkdir()
        state = {
            "model": {"weight": torch.tensor(value)},
            "model_ema": {},
            "optimizer": {"state": {}},
        }
        write_sealed(tmp_path / name / "last.pt", state)
    with pytest.raises(SystemExit, match="these differ from an undisturbed training: weight"):
        kill_training.compare(tmp_path / "whole", tmp_path / "parts")
