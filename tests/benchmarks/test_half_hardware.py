"""What a GPU's half precision is held against; the GPU itself is not needed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import half_hardware
import numpy as np
import pytest
import torch
from half_hardware import Row, error, measure, noise, show, verdict
from torch import nn


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["half_hardware.py"])
    assert half_hardware.main() == 0
    assert capsys.readouterr().out == "not measured: no GPU\n"


def test_fewer_images_are_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_hardware, "SHAPE", (3, 4, 4))
    np.testing.assert_array_equal(noise(2), noise(5)[:2])


def test_an_error_is_relative_and_needs_finite_logits() -> None:
    expected = np.array([[3.0, 4.0]])
    assert error(expected + np.array([0, 0.5]), expected) == pytest.approx(0.1)
    assert math.isnan(error(np.array([[np.inf, 0]]), expected))


def test_one_form_is_measured_in_both_ways() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
    images = np.random.default_rng(0).standard_normal((3, 3, 4, 4), np.float32)
    setting = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    row = measure("net", "inference", module, images, "cpu", 1)
    assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction is setting
    assert module[1].weight.dtype == torch.float32
    for value in (row.allowed, row.not_allowed, *(row.first or ())):
        assert 0 < value < 1e-2
    too_large = measure("net", "inference", module, 1e6 * images, "cpu", 0)
    assert math.isnan(too_large.allowed)
    assert too_large.first is None


@pytest.mark.parametrize(
    ("first", "where"),
    [
        ((2e-3, 3e-3), "within"),
        ((1e-4, 1e-4), "below"),
        ((2e-3, 9e-3), "above"),
        ((math.nan, 2e-3), "not comparable"),
        (None, "not emulated"),
    ],
)
def test_where_the_gpu_lies(first: tuple[float, float] | None, where: str) -> None:
    row = Row("net", "inference", 1e-3, 1e-3, first)
    assert verdict(row, {"float32": 1e-3, "half": 4e-3}) == where
    assert verdict(row, None) == "not emulated"


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row("net", "published", math.nan, math.nan, None),
        Row("net", "inference", 2e-3, 1.5e-3, (2e-3, 1.5e-3)),
    ]
    plain = show(rows, {"images": 8, "errors": {"net": {"float32": 1e-3, "half": 4e-3}}})
    published, inference = capsys.readouterr().out.splitlines()[2:]
    assert published == "| net | published | not finite | not finite |  | not emulated |"
    assert inference == "| net | inference | 2.00e-03 | 1.50e-03 | 1.00e-03, 4.00e-03 | within |"
    assert [entry["where"] for entry in plain] == ["not emulated", "within"]
    # JSON knows no NaN.
    kept = json.loads(json.dumps(plain, allow_nan=False))
    assert [entry["allowed"] for entry in kept] == [None, 2e-3]
    assert [entry["first"] for entry in kept] == [None, [2e-3, 1.5e-3]]


def test_figures_of_the_executor_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_hardware, "EMULATED", tmp_path / "figures.json")
    assert half_hardware._stored() == {"images": 0, "errors": {}}
    figures = {"images": 3, "errors": {"care_s0": {"float32": 1e-3, "half": None}}}
    monkeypatch.setattr(half_hardware, "emulate", lambda names, count: {**figures, "images": count})
    monkeypatch.setattr("sys.argv", ["half_hardware.py", "--emulate", "3"])
    assert half_hardware.main() == 0
    assert half_hardware._stored() == figures
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
