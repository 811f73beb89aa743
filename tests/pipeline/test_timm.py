"""Networks of timm go through the whole pipeline as ours do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.report.model import Run

ROOT = Path(__file__).parents[2]

CONFIG = """\
name: trial
model: {{name: timm/{network}, checkpoint: random}}
data: {{validation: fashion-mnist, calibration: fashion-mnist}}
preprocess: {{size: 64, crop: 1.0, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
targets:
  trt: {{precisions: [fp16], compute_capabilities: ["8.9"]}}
  ort: {{precisions: [fp32]}}
  coreml: {{precisions: [fp32]}}
validation: {{images: 20}}
bench: {{samples: 3, warmup: 1, max_seconds: 2}}
output: {output}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "network", ["mobilenetv4_conv_small", pytest.param("resnet18", marks=pytest.mark.soak)]
)
def test_a_network_of_timm_builds_for_every_target(network: str, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(CONFIG.format(network=network, output=tmp_path / "engines"))
    run = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", str(path), "--quiet"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    agreement = {}
    for artifact in Run.read(tmp_path / "engines/trial/results.json").artifacts:
        assert artifact.accuracy.agreement is not None
        agreement[artifact.target] = artifact.accuracy.agreement.value or 0
    assert agreement["ort"] == 1
    assert agreement["coreml"] >= 0.95
    assert agreement["trt"] >= 0.8
