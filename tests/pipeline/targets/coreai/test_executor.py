"""The executor against Apple's own runtime, operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core import figures
from pipeline.core.errors import ArtifactError, DataError, UnsupportedOperatorError
from pipeline.targets.coreai.convert import canonical, convert
from pipeline.targets.coreai.executor import Executor
from pipeline.targets.coreai.network import export
from pipeline.targets.coreai.operators import OPERATORS
from pipeline.targets.coreai.program import Graph, Operation, Program, TensorType, read, unpack
from pipeline.targets.coreai.quiet import logged
from pipeline.targets.coreai.runtime import Runtime

from .conftest import LABELS, Build, images, needs_coreai, network


class Case(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.compute = compute
        self.weight = nn.Parameter(torch.randn(len(LABELS), 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of what a case computes, (1, 3, …)."""
        return F.linear(self.compute(x).flatten(2).mean(2), self.weight)


def elementwise(x: Tensor) -> Tensor:
    y = torch.relu(x) + torch.sigmoid(x) * F.silu(x) - torch.tanh(x).abs() / 2
    y = y + torch.exp(-x.abs()) + torch.sqrt(x.abs() + 1) + torch.rsqrt(x.abs() + 1)
    y = y + torch.log(x.abs() + 1) + torch.erf(x) + torch.sin(x) * torch.cos(x)
    return torch.maximum(torch.minimum(y, x + 2), x - 2) + (x.abs() + 1) ** 1.5


def activations(x: Tensor) -> Tensor:
    exact, bent = F.gelu(x), F.gelu(x, approximate="tanh")
    return exact + bent + F.hardswish(x) + F.hardsigmoid(x) + F.elu(x) + F.relu6(x)


def choices(x: Tensor) -> Tensor:
    mixed = torch.where((x > 0) & (x != 1) | ~(x == 2), x, -x)
    return mixed.amax(2, keepdim=True) + mixed.amin(3, keepdim=True) + mixed.sum(2, keepdim=True)


def shapes(x: Tensor) -> Tensor:
    first, rest = x.split([1, 2], dim=1)
    joined = torch.cat([rest, first], dim=1).permute(0, 1, 3, 2)
    part = joined[:, :, 2:14:3, 1:].unsqueeze(2).squeeze(2)
    return F.pad(part, (1, 2, 3, 0), value=0.5).reshape(1, 3, -1).softmax(-1) * 20


def pools(x: Tensor) -> Tensor:
    largest = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    mean = F.avg_pool2d(x, 2)[:, :, :1, :1]
    return largest + mean


_DRAWN = torch.Generator().manual_seed(2)
WIDE = torch.randn(6, 3, 3, 3, generator=_DRAWN)
DEEP = torch.randn(6, 1, 3, 3, generator=_DRAWN)
POINT = torch.randn(3, 6, 1, 1, generator=_DRAWN)


def convolutions(x: Tensor) -> Tensor:
    wide, deep, point = (weight.to(x.dtype) for weight in (WIDE, DEEP, POINT))
    y = F.conv2d(x, wide, stride=2, padding=1)
    return F.conv2d(F.conv2d(y, deep, groups=6, dilation=2, padding=2), point) / 10


def products(x: Tensor) -> Tensor:
    q, v = x.flatten(2), x.flatten(2).transpose(1, 2)
    return (q @ v) @ q / 256


def selections(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    values, places = flat.topk(7, dim=2)
    least = flat.gather(2, flat.topk(5, dim=2, largest=False).indices)
    first = flat.gather(2, flat.argmax(2, keepdim=True))
    return torch.cat([values, 2 * flat.gather(2, places), 3 * least, 4 * first], dim=2)


CASES = (elementwise, activations, choices, shapes, pools, convolutions, products, selections)
Saved = Callable[[Callable[[Tensor], Tensor], bool], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Saves a case, once."""

    @cache
    def save(compute: Callable[[Tensor], Tensor], half: bool) -> Path:
        with logged():
            program = convert(export(Case(compute), network(), half=half), network())
            asset = tmp_path_factory.mktemp("case") / "case.aimodel"
            canonical(program).save_asset(asset)
        return asset

    return save


@needs_coreai
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("compute", CASES)
def test_apples_runtime_agrees(
    compute: Callable[[Tensor], Tensor], saved: Saved, half: bool
) -> None:
    asset = saved(compute, half)
    program = read(asset / "main.mlirb")
    pictures = images(2)
    runtime = Runtime(asset)
    apple = runtime(pictures)
    runtime.close()
    found = figures.compare(Executor(program)(pictures), apple)
    assert found.relative_error < (3e-3 if half else 3e-6)
    with torch.inference_mode():
        expected = torch.cat([Case(compute)(torch.from_numpy(one[None])) for one in pictures])
    exact = Executor(program, half=False)(pictures)
    assert figures.compare(exact, expected.numpy()).relative_error < (3e-3 if half else 3e-6)


@needs_coreai
def test_of_several_largest_values_the_first_counts(saved: Saved) -> None:
    """Where torch leaves it open."""

    def places(x: Tensor) -> Tensor:
        capped = torch.minimum(x.flatten(2), torch.zeros((), dtype=x.dtype))
        first = capped.argmax(2, keepdim=True)
        return first.to(x.dtype) / 256

    asset = saved(places, False)
    runtime = Runtime(asset)
    apple = runtime(images(3))
    runtime.close()
    np.testing.assert_allclose(
        Executor(read(asset / "main.mlirb"))(images(3)), apple, rtol=0, atol=1e-6
    )


@needs_coreai
def test_the_cases_cover_the_table(saved: Saved) -> None:
    """What no case reaches is written by other converters' versions, or by compressed weights."""
    assets = [saved(compute, half) for compute in CASES for half in (False, True)]
    seen = {name for asset in assets for name in read(asset / "main.mlirb").counts()}
    left = set(OPERATORS) - seen
    assert left <= {
        *("add", "batch_matmul", "broadcast_to", "shrink_dims", "expand_dims", "equal", "or"),
        *("blockwise_shift_scale", "lut_to_dense", "not", "not_equal", "and"),
    }, left


@needs_coreai
def test_many_images_are_as_good_as_one(build: Build) -> None:
    executor = Executor(read(build().folder / "model.aimodel" / "main.mlirb"))
    pictures = images(5)
    together = executor(pictures)
    alone = np.concatenate([executor(picture[None]) for picture in pictures])
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-3)


@needs_coreai
def test_rounding_is_seen(build: Build) -> None:
    program = read(build().folder / "model.aimodel" / "main.mlirb")
    exact = Executor(program, half=False, record=True)
    rounded = Executor(program)(images(2))
    assert 0 < figures.compare(rounded, exact(images(2))).relative_error < 5e-3
    assert max(exact.largest().values()) < 100
    assert any(name.startswith("conv2d main") for name in exact.largest())


@needs_coreai
def test_images_of_another_size_are_refused(build: Build) -> None:
    executor = Executor(read(build().folder / "model.aimodel" / "main.mlirb"))
    with pytest.raises(DataError, match=r"takes \(3, 16, 16\), not \(3, 8, 8\)"):
        executor(images(1, size=8))


@needs_coreai
def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "main.mlirb"
    path.write_bytes(b"no program")
    with pytest.raises(ArtifactError, match="is no Core AI program"):
        read(path)


def program_of(kind: str, dtype: str = "f32") -> Program:
    image, logits = TensorType(dtype, (1, 3, 4, 4)), TensorType(dtype, (1, 3, 4, 4))
    operation = Operation(kind, (0,), ((1, logits),), {})
    return Program({"main": Graph((("image", 0, image),), (("logits", 1),), (operation,))})


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(UnsupportedOperatorError, match="the operation scan of Core AI"):
        Executor(program_of("scan"))


def test_a_value_beyond_float16_becomes_infinite() -> None:
    program = program_of("exp", "f16")
    assert np.isinf(Executor(program)(np.full((1, 3, 4, 4), 12.0, np.float32))).all()
    exact = Executor(program, half=False, record=True)
    assert np.isfinite(exact(np.full((1, 3, 4, 4), 12.0, np.float32))).all()
    assert max(exact.largest().values()) == pytest.approx(np.exp(12.0), rel=1e-5)


@pytest.mark.parametrize(
    ("packed", "width", "signed", "numbers"),
    [
        ([0x21, 0x03], 4, False, [1, 2, 3]),
        ([0x2F, 0x08], 4, True, [-1, 2, -8]),
        # 6 bits each, the lowest first: 1, 2, 3, 63.
        ([0x81, 0x30, 0xFC], 6, False, [1, 2, 3, 63]),
    ],
)
def test_unpacking(packed: list[int], width: int, signed: bool, numbers: list[int]) -> None:
    found = unpack(np.array(packed, np.uint8), width, len(numbers), signed=signed)
    assert found.tolist() == numbers
