"""What a graph is judged by where calibration images have no classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from calibration.judge import Graph, Judge, by_strict_executor
from calibration.kept import Kept
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


def test_a_graph_is_evaluated_once_and_known_by_its_bytes(tmp_path: Path) -> None:
    images = np.eye(3, dtype=np.float32).reshape(3, 1, 1, 3)
    labelled = CalibrationSet(images, np.arange(3), ("",) * 3)
    ran: list[Graph] = []

    def counting(model: Graph, images: Images) -> Logits:
        ran.append(model)
        return run(model, images)

    for _ in range(2):
        judge = Judge(Path("source"), labelled, 3, counting, Kept(tmp_path / "kept.jsonl"))
        assert judge(onnx.ModelProto()).agreement == 2 / 3
    assert len(ran) == 3  # the float network twice, the graph once
    judge(onnx.ModelProto(producer_name="another"))
    assert len(ran) == 4


def test_the_strict_executor_takes_one_thread_for_small_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = []

    class Executor:
        def __init__(self, model: Graph) -> None:
            pass

        def run_all(self, images: Images) -> Logits:
            threads.append(torch.get_num_threads())
            return run(Path("any"), images)

    monkeypatch.setattr("pipeline.emulate.onnx.executor.OnnxExecutor", Executor)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        by_strict_executor(Path("any"), np.zeros((2, 3, 8, 8), np.float32))
        by_strict_executor(Path("any"), np.zeros((2, 3, 224, 224), np.float32))
        assert (*threads, torch.get_num_threads()) == (1, 3, 3)
    finally:
        torch.set_num_threads(before)
