"""Networks of timm, none of which this project was made for, go through a whole run."""

from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.report.model import Run

SETTINGS: dict[str, Any] = {
    "name": "trial",
    "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
    "preprocess": {"size": 64, "crop": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3},
    "targets": {
        "trt": {"precisions": ["fp16"], "compute_capabilities": ["8.9"]},
        "ort": {"precisions": ["fp32"]},
        "coreml": {"precisions": ["fp32"]},
    },
    "validation": {"images": 20},
    "bench": {"samples": 3, "warmup": 1, "max_seconds": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        "test_efficientnet",
        pytest.param("mobilenetv4_conv_small", marks=pytest.mark.soak),
        pytest.param("resnet18", marks=pytest.mark.soak),
    ],
)
def test_a_network_of_timm_builds_for_every_target(network: str, tmp_path: Path) -> None:
    model = {"name": f"timm/{network}", "checkpoint": "random"}
    pipeline.run({**SETTINGS, "model": model, "output": tmp_path})
    agreement = {}
    for artifact in Run.read(tmp_path / "trial/results.json").artifacts:
        assert artifact.accuracy.agreement is not None
        agreement[artifact.target] = artifact.accuracy.agreement.value or 0
    assert agreement["ort"] == 1
    assert agreement["coreml"] >= 0.95
    assert agreement["trt"] >= 0.8
