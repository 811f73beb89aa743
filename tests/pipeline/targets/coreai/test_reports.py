"""Public reports of wrong answers of this runtime, as tests of our validation on Linux."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.core.network import Logits, Network
from pipeline.targets.coreai.fitness import fitness
from pipeline.targets.coreai.package import MODEL
from pipeline.targets.coreai.program import Graph, Operation, Program, TensorType, read
from pipeline.targets.coreai.runtime import Runtime

from .conftest import images, job, made, needs_coreai, network


class HardHead(nn.Module):
    """MobileNetV3's head: pooling, a linear layer, hardswish, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.wide = nn.Linear(16, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.stem(x)).mean((2, 3))
        return self.head(nn.functional.hardswish(self.wide(x)))  # type: ignore[no-any-return]


class Selecting(nn.Module):
    """A classifier that answers with one 1 at the largest of its logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 5, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.stem(x).mean((2, 3))
        answer: Tensor = torch.arange(5) == logits.argmax(1, keepdim=True)
        return answer.to(logits.dtype)


def by_apple(folder: Path, module: Callable[[], nn.Module], of: Network) -> tuple[Logits, Logits]:
    """Apple's answers and PyTorch's."""
    made(folder, job(module=module, of=of))
    runtime = Runtime(folder / MODEL)
    apple = runtime(images(4))
    runtime.close()
    with torch.inference_mode():
        return apple, module().eval()(torch.from_numpy(images(4))).numpy()


@needs_coreai
def test_51_a_hardswish_after_a_linear_layer(tmp_path: Path) -> None:
    apple, expected = by_apple(tmp_path / "x", HardHead, network())
    assert abs(apple - expected).max() < 5e-3
    written = read(tmp_path / "x" / MODEL / "main.mlirb")
    findings = {finding.check: finding for finding in fitness(written)}
    # As 1x1 convolutions there is no product of two axes left.
    assert findings["products"].level == "fine"
    assert written.counts()["conv2d"] == 3


@needs_coreai
def test_116_an_argmax(tmp_path: Path) -> None:
    apple, expected = by_apple(tmp_path / "x", Selecting, network())
    assert apple.argmax(1).tolist() == expected.argmax(1).tolist()
    findings = {f.check: f for f in fitness(read(tmp_path / "x" / MODEL / "main.mlirb"))}
    assert findings["selection"].level == "advice"
    assert "issues/116" in findings["selection"].advice


@needs_coreai
def test_115_float16_by_default(tmp_path: Path) -> None:
    apple, expected = by_apple(tmp_path / "x", HardHead, network())
    assert apple.argmax(1).tolist() == expected.argmax(1).tolist()
    findings = {f.check: f for f in fitness(read(tmp_path / "x" / MODEL / "main.mlirb"))}
    assert findings["float16 by default"].level == "advice"
    assert "issues/115" in findings["float16 by default"].advice


def program_of(*kinds: str, dtype: str = "f16", shape: tuple[int, ...] = (1, 8)) -> Program:
    kind = TensorType(dtype, shape)
    operations = tuple(
        Operation(name, (place,), ((place + 1, kind),), {}) for place, name in enumerate(kinds)
    )
    return Program({"main": Graph((("image", 0, kind),), (("logits", 1),), operations)})


@pytest.mark.parametrize(
    ("program", "check", "level"),
    [
        (program_of("batch_matmul", "minimum"), "products", "problem"),
        (program_of("batch_matmul", "gelu"), "products", "advice"),
        (program_of("batch_matmul", shape=(1, 1, 8, 8)), "products", "fine"),
        (program_of("sort"), "selection", "advice"),
        (program_of("gelu"), "selection", "fine"),
        (program_of("gelu", dtype="f32"), "float16 by default", "fine"),
        (program_of("gelu", shape=(1, 2, 3, 4, 5)), "rank", "advice"),
        (program_of("gelu"), "rank", "fine"),
    ],
)
def test_what_only_a_device_shows_is_advice(program: Program, check: str, level: str) -> None:
    found = {finding.check: finding for finding in fitness(program)}
    assert found[check].level == level
    assert bool(found[check].advice) == (level != "fine")
