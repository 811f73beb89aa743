"""Networks of timm go through: converted, judged by Apple's runtime and emulated alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from pipeline.core import figures
from pipeline.core.network import Images
from pipeline.targets.coreai.target import CoreAITarget

from .conftest import LABELS, images, job, made, needs_coreai, network


def created(name: str) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = timm.create_model(name, num_classes=len(LABELS)).eval()
    return module


def expected(module: nn.Module, pictures: Images) -> Images:
    with torch.inference_mode():
        logits: Images = module(torch.from_numpy(pictures)).numpy()
    return logits


@needs_coreai
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_small_100",
        pytest.param("mobilenetv4_conv_small", marks=pytest.mark.soak),
    ],
)
def test_mobile_networks(name: str, tmp_path: Path) -> None:
    size, pictures = 64, images(4, size=64)
    artifact = made(
        tmp_path / "built", job(module=lambda: created(name), of=network(size=size, name=name))
    )
    checks = {row["check"]: row["level"] for row in artifact.facts["fitness"]}
    assert checks["products"] == "fine"
    runner = CoreAITarget().emulate(artifact, None)
    assert runner is not None
    with runner:
        logits = runner(pictures)
        numerics = runner.numerics()
    assert numerics is not None
    assert numerics.more["images"] == 3
    assert figures.compare(logits, expected(created(name), pictures)).relative_error < 0.02
