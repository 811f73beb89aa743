from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from care.fuse import fuse
from pipeline.core.network import Network
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.mil.program import read_program
from pipeline.targets.coreml.build import FLOAT16
from pipeline.targets.coreml.convert import convert, finish
from pipeline.targets.coreml.network import deploy
from pipeline.targets.coreml.quiet import logged
from pipeline.targets.coreml.verify import probes, verify

SIZES = (4, 8, 8, 12)


def depthwise(channels: int, kernel: Any, padding: Any, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, padding=padding, groups=channels, **more)


class Parts(nn.Module):
    """A stem, parts mixed each in its own way, joined and classified."""

    def __init__(self, *mixers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, sum(SIZES), 3, padding=1)
        self.mixers = nn.ModuleList(mixers)
        self.head = nn.Linear(sum(SIZES), 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts(self.stem(x).split(SIZES, dim=1))
        return self.head(torch.cat(parts, 1).mean((2, 3)))  # type: ignore[no-any-return]

    def parts(self, parts: tuple[Tensor, ...]) -> list[Tensor]:
        return [mix(part) for mix, part in zip(self.mixers, parts, strict=True)]


class UsedTwice(Parts):
    def parts(self, parts: tuple[Tensor, ...]) -> list[Tensor]:
        first, *rest = super().parts(parts)
        return [first + parts[1].mean((1, 2, 3), keepdim=True), *rest]


class Turned(Parts):
    def parts(self, parts: tuple[Tensor, ...]) -> list[Tensor]:
        return super().parts(parts)[::-1]


def mixers(*last: nn.Module) -> list[nn.Module]:
    return [nn.ReLU(), nn.Sigmoid(), *last]


Convert = Callable[[nn.Module], MilExecutor]


@pytest.fixture
def converted(make_network: Callable[..., Network], tmp_path: Path) -> Convert:
    """Converts a network in float32, and checks that it computes the same."""

    def make(module: nn.Module) -> MilExecutor:
        of, module = make_network(), module.eval()
        path = tmp_path / "model.mlpackage"
        with logged(lambda line: None):
            finish(convert(deploy(module, of), of, "iOS16", None), of, path, "fp32")
        executor = MilExecutor(path, precision="float32")
        pictures = probes(of)
        with torch.inference_mode():
            expected = module(torch.from_numpy(pictures.images))
        found = executor.predict(pictures.pixels)["logits"]
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
        return executor

    return make


def test_two_sizes_become_one(converted: Convert) -> None:
    network = Parts(*mixers(depthwise(8, 3, 1, bias=False), depthwise(12, 5, 2)))
    executor = converted(network)
    assert executor.operations()["conv"] == 2
    (split,) = (op for op in executor.program.operations if op.type == "split")
    assert [kind.shape[1] for _, kind in split.outputs] == [4, 8, 20]


def test_three_become_one(converted: Convert) -> None:
    network = Parts(nn.ReLU(), depthwise(8, 5, 2), depthwise(8, 5, 2), depthwise(12, 3, 1))
    assert converted(network).operations()["conv"] == 2


def test_all_parts_become_one_without_a_split(converted: Convert) -> None:
    network = Parts(depthwise(4, 3, 1), depthwise(8, 5, 2), depthwise(8, 5, 2), depthwise(12, 5, 2))
    operations = converted(network).operations()
    assert (operations["conv"], operations["split"]) == (2, 0)


@pytest.mark.parametrize(
    "pair",
    [
        (depthwise(8, 7, 3), depthwise(12, 1, 0)),  # more zeros than numbers
        (depthwise(8, (7, 1), (3, 0)), depthwise(12, (1, 7), (0, 3))),  # likewise
        (depthwise(8, 3, 2, dilation=2), depthwise(12, 3, 1)),  # taps at other places
        (nn.Conv2d(8, 8, 3, padding=1), depthwise(12, 3, 1)),  # not depthwise
        (depthwise(8, 3, 1), nn.Identity()),
    ],
)
def test_what_does_not_fit_stays(converted: Convert, pair: tuple[nn.Module, nn.Module]) -> None:
    found = converted(Parts(*mixers(*pair))).operations()["conv"]
    assert found == 1 + sum(isinstance(mixer, nn.Conv2d) for mixer in pair)


def test_parts_that_others_take_stay(converted: Convert) -> None:
    network = UsedTwice(nn.ReLU(), depthwise(8, 3, 1), depthwise(8, 3, 1), depthwise(12, 3, 1))
    # The second and the third; the first of these parts has another user.
    assert converted(network).operations()["conv"] == 3


def test_the_order_is_kept(converted: Convert) -> None:
    network = Turned(nn.ReLU(), nn.ReLU(), depthwise(8, 3, 1), depthwise(12, 3, 1))
    assert converted(network).operations()["conv"] == 3


@pytest.mark.soak
def test_care_s0_has_few_operations_and_holds_in_half_precision(
    parity_model: Callable[[str], nn.Module],
    make_network: Callable[..., Network],
    tmp_path: Path,
) -> None:
    labels = tuple(f"class {i}" for i in range(1000))
    of = dataclasses.replace(make_network(size=224), name="care_s0", labels=labels)
    module, package = fuse(parity_model("care_s0")), tmp_path / "model.mlpackage"
    with logged(lambda line: None):
        finish(convert(deploy(module, of), of, "iOS16", ()), of, package, "fp16")
    program = read_program(package)
    kinds = [op.type for op in program.operations if op.type != "const"]
    assert len(kinds) <= 560
    assert "transpose" not in kinds
    assert max(len(kind.shape) for op in program.operations for _, kind in op.outputs) == 4
    facts = verify(package, module, of, FLOAT16)
    assert facts["exact_relative_error"] <= 1e-3
    assert facts["rounded_relative_error"] <= 2e-3
