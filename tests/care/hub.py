"""A cache of the Hub's with a repository in it, as the Hub's own client lays it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ARCHITECTURE = "test_resnet"
LABELS = ["ant", "bee", "cat"]
CONFIG: dict[str, Any] = {
    "architecture": ARCHITECTURE,
    "num_classes": 3,
    "num_features": 64,
    "label_names": LABELS,
    "pretrained_cfg": {
        "tag": "untrained",
        "custom_load": False,
        "input_size": [3, 32, 32],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 0.8,
        "crop_mode": "center",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
        "num_classes": 3,
        "pool_size": [1, 1],
        "first_conv": "conv1.0",
        "classifier": "fc",
    },
}
CARD = "---\ntags:\n- timm\nlicense: cc-by-nc-4.0\n---\n# A network\n"


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let the Hub's client take a cache, and no network; it reads its environment when imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def lay(
    cache: Path,
    name: str = "mine/little",
    config: Any = None,
    card: str | None = CARD,
    weights: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Put a repository into a cache; returns its network."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    (snapshot / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    if card is not None:
        (snapshot / "README.md").write_text(card)
    torch.manual_seed(5)
    model: nn.Module = timm.create_model(ARCHITECTURE, num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn_like(module.running_mean) * 0.1  # type: ignore[arg-type]
    save_file(model.state_dict() if weights is None else weights, snapshot / "model.safetensors")
    return model
