"""Public reports of wrong answers of this runtime, as tests of our validation on Linux."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.core import figures
from pipeline.core.errors import UnsupportedOperatorError
from pipeline.core.network import Images, Logits
from pipeline.core.runner import Numerics
from pipeline.steps.artifact import Artifact
from pipeline.targets.coreai import network as network_module
from pipeline.targets.coreai import runner as runner_module
from pipeline.targets.coreai.fitness import fitness
from pipeline.targets.coreai.package import BYTECODE, MODEL
from pipeline.targets.coreai.program import Graph, Operation, Program, TensorType, read
from pipeline.targets.coreai.runner import APPLE
from pipeline.targets.coreai.runtime import Runtime
from pipeline.targets.coreai.target import CoreAITarget

from .conftest import images, job, made, needs_coreai


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
    """Answers with one 1 at the largest of its logits, as a segmentation with its argmax inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 5, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.stem(x).mean((2, 3))
        answer: Tensor = torch.arange(5) == logits.argmax(1, keepdim=True)
        return answer.to(logits.dtype)


class Ranking(nn.Module):
    """A detector's end: values of the places with the best scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 2, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores, values = self.stem(x).flatten(2).split(1, dim=1)
        best = scores.topk(5, dim=2).indices
        return values.gather(2, best).flatten(1)  # type: ignore[no-any-return]


TARGET = CoreAITarget()
LABELED = np.array([0, 1, 2, 3, 4, 0])


def validated(artifact: Artifact) -> tuple[Logits, Numerics]:
    """Logits of all images, and what Apple's runtime on some of them says to these."""
    runner = TARGET.emulate(artifact, None)
    assert runner is not None
    with runner:
        runner.expect(LABELED)
        logits = runner(images(6))
        numerics = runner.numerics()
    assert numerics is not None
    return logits, numerics


def expected(module: Callable[[], nn.Module]) -> Logits:
    with torch.inference_mode():
        logits: Logits = module().eval()(torch.from_numpy(images(6))).numpy()
    return logits


def with_2d_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As coreai-torch alone converts a linear layer."""
    monkeypatch.setattr(network_module, "_without_2d_products", lambda module, example: None)


def zeros(logits: Logits) -> Logits:
    """Every confidence was 0 (issue 115)."""
    return np.zeros_like(logits)


def next_class(logits: Logits) -> Logits:
    """The argmax was another place (issue 116)."""
    return np.roll(logits, 1, axis=1)


def off(logits: Logits) -> Logits:
    """Logits were off by 0.039 of their size (issue 51)."""
    noise = np.random.default_rng(0).normal(size=logits.shape)
    noise *= 0.039235 * np.linalg.norm(logits) / np.linalg.norm(noise)
    return (logits + noise).astype(np.float32)


@dataclass(frozen=True)
class Report:
    """What was reported of a device.

    Attributes:
        issue: Its number in coreai-torch.
        module: A network with what it is about.
        wrong: The wrong answer that a device gave without an error.
        check: The check of `fitness` that warns of it.
        level: What that finds.
    """

    issue: int
    module: Callable[[], nn.Module]
    wrong: Callable[[Logits], Logits]
    check: str
    level: str


REPORTS = (
    Report(115, Ranking, zeros, "float16 by default", "advice"),
    Report(116, Selecting, next_class, "selection", "advice"),
    Report(51, HardHead, off, "products", "problem"),
)


@pytest.fixture(params=REPORTS, ids=lambda report: f"issue-{report.issue}")
def report(request: pytest.FixtureRequest) -> Report:
    found: Report = request.param
    return found


@pytest.fixture
def asset(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """The reported network in float16."""
    if report.check == "products":
        with_2d_products(monkeypatch)
    return made(tmp_path / "x", job(module=report.module))


@needs_coreai
def test_linux_answers_rightly_and_fitness_warns_of_devices(
    report: Report, asset: Artifact
) -> None:
    logits, numerics = validated(asset)
    measured, emulated = numerics.more[f"{APPLE}, 3 images"]
    assert (measured["flips"], emulated["flips"]) == (0, 0)
    assert emulated["relative_difference"] < 5e-3
    assert figures.compare(logits, expected(report.module)).relative_error < 5e-3
    assert figures.compare(logits, expected(report.module)).flips == 0
    found = {finding.check: finding for finding in fitness(read(asset.folder / MODEL / BYTECODE))}
    assert found[report.check].level == report.level
    assert f"issues/{report.issue})" in found[report.check].advice


@needs_coreai
def test_the_reported_answer_would_be_withdrawn(
    report: Report, asset: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the runtime here were as wrong as that of a device, no figure would be given."""

    class Wrong(Runtime):
        def __call__(self, given: Images) -> Logits:
            return report.wrong(super().__call__(given))

    monkeypatch.setattr(runner_module, "Runtime", Wrong)
    with pytest.raises(UnsupportedOperatorError, match="the executor differs from it"):
        validated(asset)


@needs_coreai
def test_51_is_not_met_by_what_is_built(tmp_path: Path) -> None:
    """As 1x1 convolutions there is no product of two axes left."""
    asset = made(tmp_path / "x", job(module=HardHead))
    written = read(asset.folder / MODEL / BYTECODE)
    found = {finding.check: finding for finding in fitness(written)}
    assert found["products"].level == "fine"
    assert written.counts()["conv2d"] == 3
    logits, _ = validated(asset)
    assert figures.compare(logits, expected(HardHead)).relative_error < 5e-3


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
