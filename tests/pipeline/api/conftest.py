"""One finished run by the public interface, and photographs to predict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline
from care.data import open_dataset

LABELS = ("T-shirt/top", "Ankle boot")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "name": "trial",
        "output": tmp_path_factory.mktemp("api") / "engines",
        "model": {"name": "care_tiny", "checkpoint": "embedded"},
        "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
        "targets": {
            "ort": {"precisions": ("fp32",)},
            "trt": {"precisions": ("fp16",), "compute_capabilities": ("8.9",)},
        },
        "validation": {"images": 20},
    }


@pytest.fixture(scope="module")
def results(settings: dict[str, Any], begin: Callable[[Path], Path]) -> pipeline.Results:
    begin(settings["output"] / "trial")
    stages = ("export", "simplify", "precision", "build", "validate")
    return pipeline.run(settings, only=stages)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An ankle boot, and a picture of 40 x 28 pixels that is one too."""
    folder = tmp_path_factory.mktemp("photos")
    dataset = open_dataset("fashion-mnist", "validation")
    boot = dataset.image(0)
    assert dataset.classes[dataset.label(0)] == "Ankle boot"
    boot.save(folder / "boot.png")
    wide = boot.resize((40, 28))
    (folder / "more").mkdir()
    wide.save(folder / "more" / "wide.png")
    (folder / "notes.txt").write_text("no image")
    return [folder / "boot.png", folder / "more" / "wide.png"]
