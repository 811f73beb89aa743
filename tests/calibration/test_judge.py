"""What a graph is judged by where calibration images have no classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from calibration.judge import Graph, Judge
from calibration.sample import CalibrationSet
from pipeline.core.network import Images, Logits


def run(model: Graph, images: Images) -> Logits:
    """Logits that are the images themselves; another graph's answer on the last one differs."""
    logits = images.reshape(len(images), -1)[:, :3].copy()
    if not isinstance(model, Path):
        logits[-1] = np.roll(logits[-1], 1)
    return logits


def test_without_labels_the_float_networks_answer_counts_as_right() -> None:
    images = np.eye(3, dtype=np.float32).reshape(3, 1, 1, 3)
    unknown = CalibrationSet(images, np.full(3, -1), ("",) * 3)
    judge = Judge(Path("source"), unknown, 3, run)
    assert judge.baseline.top1 == 1.0
    assert judge(onnx.ModelProto()).top1 == judge(onnx.ModelProto()).agreement == 2 / 3
    known = CalibrationSet(images, np.array([0, 1, 0]), ("",) * 3)
    assert Judge(Path("source"), known, 3, run).baseline.top1 == 2 / 3
