"""Each small module is refused by coremltools, and by the words that it says."""

from __future__ import annotations

import ast
from pathlib import Path

import coremltools_refusals as refusals
import pytest
import torch


@pytest.mark.parametrize("refusal", refusals.REFUSALS, ids=lambda refusal: refusal.kind)
def test_coremltools_refuses_it(refusal: refusals.Refusal) -> None:
    assert refusal.says in refusals.message(refusal.function)


def test_what_is_converted_has_no_message() -> None:
    assert refusals.message(torch.relu) == ""


def test_it_needs_torch_and_coremltools_alone() -> None:
    tree = ast.parse(Path(refusals.__file__).read_text())
    names = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not {name.partition(".")[0] for name in names} & {"pipeline", "care", "calibration"}
    assert "coremltools" in names
