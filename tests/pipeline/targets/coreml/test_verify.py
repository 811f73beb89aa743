"""What a package of float16 weights may differ by, and what the weights alone explain."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.core.errors import BuildError
from pipeline.core.network import Images, Logits, Network
from pipeline.core.preprocess import Preprocess
from pipeline.targets.coreml import verify as verification
from pipeline.targets.coreml.build import FLOAT16
from pipeline.targets.coreml.network import preprocess_of
from pipeline.targets.coreml.verify import probes, verify

HALF = Preprocess(4, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NETWORK = Network("net", ("a", "b"), (3, 4, 4), HALF.to_dict())


class Cancelling(nn.Module):
    """Logits that are a small difference of two large sums."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 2, bias=False), nn.Linear(48, 2, bias=False)
        generator = torch.Generator().manual_seed(0)
        weight = size * (1 + torch.rand(2, 48, generator=generator))
        self.first.weight.data = weight
        self.second.weight.data = weight - torch.randn(2, 48, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        logits: torch.Tensor = self.first(flat) - self.second(flat)
        return logits


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Images], Logits]], None]:
    """Lets a function stand for the package."""

    def put(package: Callable[[Images], Logits]) -> None:
        def answer(executor: Any, pixels: Any, path: Path) -> Logits:
            return package(preprocess_of(NETWORK).normalize(pixels))

        monkeypatch.setattr(verification, "answer", answer)
        executor = SimpleNamespace(MilExecutor=lambda package, precision: precision)
        monkeypatch.setitem(sys.modules, "pipeline.emulate.mil.executor", executor)
        monkeypatch.setattr(verification, "_where", lambda *_: "somewhere")

    return put


def off_by(module: nn.Module, share: float) -> Callable[[Images], Logits]:
    """The module's logits, moved by a share of their size."""

    def run(images: Images) -> Logits:
        logits = verification._logits(module, images)
        return np.asarray(logits * (1 + share), np.float32)

    return run


@pytest.mark.parametrize(("side", "channels"), [(28, 1), (64, 3), (300, 3)])
def test_probes_have_the_contrast_of_photographs(side: int, channels: int) -> None:
    spec = HALF if channels == 3 else Preprocess(4, 1.0, "bicubic", (0.5,), (0.5,), channels="gray")
    network = Network("net", ("a", "b"), (channels, side, side), spec.to_dict())
    pixels = probes(network).pixels
    assert 45 < pixels.std() < 64
    assert np.isin(pixels, (0, 255)).mean() < 0.05


Answering = Callable[[Callable[[Images], Logits]], None]


@pytest.mark.parametrize(("size", "share"), [(0.0, 0.019), (60.0, 0.03)])
def test_what_float16_weights_explain_passes(
    answering: Answering, size: float, share: float
) -> None:
    module = Cancelling(size).eval()
    answering(off_by(module, share))
    facts = verify(Path("net.mlpackage"), module, NETWORK, FLOAT16)
    assert facts["exact_relative_error"] == pytest.approx(share, rel=1e-3)
    if size:
        assert 0.015 < facts["float16_weights_relative_error"] < 0.1
    else:
        assert "float16_weights_relative_error" not in facts


def test_twice_what_they_explain_is_the_limit(answering: Answering) -> None:
    module = Cancelling(60.0).eval()
    answering(off_by(module, 0.03))
    own = verify(Path("net.mlpackage"), module, NETWORK, FLOAT16)["float16_weights_relative_error"]
    answering(off_by(module, 2.2 * own))
    with pytest.raises(BuildError, match=r"differ from PyTorch's by .* somewhere"):
        verify(Path("net.mlpackage"), module, NETWORK, FLOAT16)


def test_an_error_as_large_as_the_logits_is_one_whatever_the_weights_explain(
    answering: Answering,
) -> None:
    module = Cancelling(3000.0).eval()
    images = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    expected = verification._logits(module, images)
    assert verification._error_of_half_weights(module, images, expected) > 0.3
    answering(off_by(module, 0.3))
    with pytest.raises(BuildError, match=r"by 0\.3 of their size \(exact arithmetic, limit 0\.2\)"):
        verify(Path("net.mlpackage"), module, NETWORK, FLOAT16)


def test_a_network_that_leaves_float16_itself_is_named(answering: Answering) -> None:
    module = Cancelling(1e6).eval()
    answering(lambda images: np.full((len(images), 2), np.nan, np.float32))
    with pytest.raises(BuildError, match=r"the network itself leaves the range of float16: .* at "):
        verify(Path("net.mlpackage"), module, NETWORK, FLOAT16)
    with pytest.raises(BuildError, match=r"set targets\.coreml\.repair: true"):
        verify(Path("net.mlpackage"), module, NETWORK, FLOAT16)
    answering(lambda images: np.full((len(images), 2), np.nan, np.float32))
    calm = Cancelling(1.0).eval()
    with pytest.raises(BuildError, match=r"NaN or infinity \(exact arithmetic\): a value leaves"):
        verify(Path("net.mlpackage"), calm, NETWORK, FLOAT16)
