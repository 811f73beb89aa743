from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from care import profile as profile_
from care.factory import create_model
from care.profile import profile

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("care_s0", 7_340_000, 0.718),
        ("care_s1", 9_602_424, 1.029),
        ("care_s2", 19_481_288, 1.923),
        ("mlla_t", 24_392_200, 4.131),
    ],
)
def test_published_networks_cost_what_they_should(name: str, parameters: int, gmacs: float) -> None:
    found = profile(create_model(name), name)
    assert found.total.parameters == parameters
    assert round(found.total.macs / 1e9, 3) == gmacs
    published = profile_.PUBLISHED[name]
    assert found.total.parameters == pytest.approx(published.parameters * 1e6, rel=0.03)
    assert found.total.macs == pytest.approx(published.gmacs * 1e9, rel=0.04)


def test_stages_add_up_to_the_network() -> None:
    model = create_model("care_tiny")
    found = profile(model, "care_tiny")
    assert sum(stage.macs for stage in found.stages) == found.total.macs
    assert found.total.parameters == sum(p.numel() for p in model.parameters())
    assert [stage.name for stage in found.stages[:2]] == ["stem", "stages.0"]
    assert all(not module._forward_hooks for module in model.modules())


class Small(nn.Module):
    """A network whose cost can be counted by hand."""

    default_cfg = {  # noqa: RUF012
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.norm(self.stem(x)))
        tokens = x.flatten(2)
        attended = (tokens @ tokens.transpose(1, 2)) @ tokens
        return self.head(attended.mean(-1))  # type: ignore[no-any-return]


def test_macs_are_those_of_a_hand_count() -> None:
    found = {stage.name: stage for stage in profile(Small(), "small").stages}
    assert found["stem"].macs == 8 * 8 * 8 * 48
    assert found["stem"].activations == 8 * 8 * 8
    assert found["blocks.0"].macs == 8 * 8 * 8 * 9
    assert found["norm"].macs == 0
    assert found["head"].macs == 80
    assert found["rest"].macs == 2 * 8 * 64 * 8  # both matrix products, outside every stage
    assert found["rest"].activations == 8 * 8 + 8 * 64
    assert profile(Small(), "small", 64).total.macs > profile(Small(), "small").total.macs


def test_the_table_and_the_json_agree() -> None:
    result = CliRunner().invoke(profile_.main, ["care_tiny", "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout.splitlines()[-1])
    assert f"{found[0]['total']['parameters']:,}" in result.stdout
    assert found[0]["input_size"] == [3, 64, 64]


def test_other_networks_and_sizes_can_be_profiled() -> None:
    result = CliRunner().invoke(profile_.main, ["test_vit", "--num-classes", "7"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "test_vit" in result.stdout


def test_mistakes_are_one_line() -> None:
    for arguments, words in (
        (["care_so"], "did you mean care_s"),
        (["care_tiny", "--image-size", "48"], "multiples of 32"),
        (["care_tiny", "--image-size", "big"], "big"),
    ):
        result = CliRunner().invoke(profile_.main, arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert words in result.stderr


def test_the_program_runs() -> None:
    result = CliRunner().invoke(profile_.main, ["care_s0"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "7,340,000" in result.stdout
    assert "0.718" in result.stdout
    assert "78.4 %" in result.stdout
