"""Modules that compute in float32 where float16 breaks a package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calibration.budget import Budget
from calibration.sensitivity import Outcome
from pipeline.core.errors import BuildError, ConfigError, GateFailedError
from pipeline.core.network import Network
from pipeline.core.preprocess import Pictures
from pipeline.emulate.mil.constants import TensorType
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.mil.program import Constant, Operation, Program, read_program
from pipeline.steps.artifact import Artifact
from pipeline.steps.facts.graphs import BuildFacts, RepairFacts
from pipeline.targets.coreml import repair
from pipeline.targets.coreml.options import CoreMLOptions
from pipeline.targets.coreml.repair import products_by_module
from pipeline.targets.coreml.runner import EmulatedRunner
from pipeline.targets.registry import TARGETS, needs_calibration

from .conftest import Tiny

Build = Callable[..., Artifact]
Networks = Callable[..., Network]
Photos = Callable[..., Pictures]


class Block(nn.Module):
    """A convolution, and another one that undoes its scale."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.expand = nn.Conv2d(16, 32, 1, bias=False)
        self.shrink = nn.Conv2d(32, 16, 1)
        with torch.no_grad():
            self.expand.weight.mul_(factor)
            self.shrink.weight.div_(factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shrink(self.expand(x))  # type: ignore[no-any-return]


class Loud(Tiny):
    """The tiny network with a block whose inner values are beyond float16."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(1.0), Block(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def loud(factor: float = 2.0**17) -> nn.Module:
    return Loud(factor).eval().requires_grad_(False)


def repair_of(made: Artifact) -> RepairFacts:
    return RepairFacts.from_dict(made.facts["repair"], "the facts")


def test_what_float16_breaks_computes_in_float32(
    build: Build, make_network: Networks, make_photos: Photos
) -> None:
    with pytest.raises(BuildError, match="NaN or infinity"):
        build(module=loud, fresh=True)
    made = build(module=loud, fresh=True, repair=True)
    found = repair_of(made)
    # What writes the large values, and what reads them; the block around has neither.
    names = ["blocks.1.expand", "blocks.1.shrink"]
    assert [(part.part, part.type) for part in found.raised] == [(n, "float32") for n in names]
    assert found.raised[0].why.endswith("in float32")
    assert "holds" in found.raised[0].why
    assert found.broke.startswith("no finite answer, least headroom 0.")
    assert "at blocks.1.expand: conv" in found.broke
    assert found.beyond.startswith("the network itself leaves the range of float16: ")
    assert found.headroom is not None
    assert found.headroom >= 5
    assert found.error < 5e-3
    # At each of 8 x 8 places: 27 * 16 products of the stem, 4 * 512 of the blocks; 80 of the head.
    assert found.share == pytest.approx(2 * 512 * 64 / ((27 * 16 + 4 * 512) * 64 + 80))
    assert BuildFacts.from_facts(made.facts, "the facts").repair == found
    pictures = make_photos(4, make_network())
    with EmulatedRunner(made.folder / "model.mlpackage", made.network()) as runner:
        runner(pictures.pixels)
        numerics = runner.numerics()
    assert numerics is not None
    assert numerics.more["largest_value"] > 65504
    assert numerics.overflowed_tensors == (), "what is large is no float16"
    assert numerics.more["headroom"] >= 4
    executor = MilExecutor(made.folder / "model.mlpackage")
    logits = executor.predict(pictures.pixels)["logits"]
    expected = loud()(torch.from_numpy(pictures.images)).numpy()
    assert np.linalg.norm(logits - expected) < 5e-3 * np.linalg.norm(expected)


def float16_convolutions(made: Artifact) -> int:
    operations = read_program(made.folder / "model.mlpackage").operations
    kinds = [op.outputs[0][1].dtype for op in operations if op.type == "conv"]
    return kinds.count("FLOAT16")


def test_a_sound_network_is_the_plain_package(build: Build) -> None:
    plain, made = build(), build(repair=True)
    assert repair_of(made).words == "nothing had to be raised above float16"
    assert repair_of(made).broke == ""
    assert made.facts["calibration_images"] == 16
    weights = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert made.path(weights).read_bytes() == plain.path(weights).read_bytes()
    assert float16_convolutions(made) == float16_convolutions(plain) > 0


def test_headroom_that_is_too_small_is_raised_before_anything_overflows(build: Build) -> None:
    made = build(module=lambda: loud(2.0**12.5), fresh=True, repair=True)
    found = repair_of(made)
    assert found.broke.startswith("error 0.00")
    assert found.raised[0].why.endswith("in float32"), "not only after a trial"
    assert [part.part for part in found.raised] == ["blocks.1.expand", "blocks.1.shrink"]


def test_rounding_that_errs_too_much_raises_blocks_by_their_harm(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(self: Any, raised: frozenset[str]) -> Any:
        if not self.package.exists():
            self._write(raised)
        error = 0.01 if "blocks.1.shrink" in raised else 0.3
        return repair._Judged(Outcome(1.0, 1.0, error), None)

    monkeypatch.setattr(repair._Work, "judge", judged)
    made = build(module=lambda: loud(1.0), repair=True, fresh=True)
    found = repair_of(made)
    # With the rest of its block.
    raised = {part.part for part in found.raised}
    assert raised == {"blocks.1", "blocks.1.expand", "blocks.1.shrink"}
    assert {part.why for part in found.raised} == {
        "its rounding errs the most for its share of the products"
    }
    assert found.error == 0.01


def test_where_no_choice_holds_it_says_how_near_it_came(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.targets.coreml.repair._strict", lambda limit: 0.0)
    told = r"cannot repair tiny in float16: no choice of modules holds the budget \(headroom 4, "
    with pytest.raises(GateFailedError, match=told + r".*modules, .* of the products, error "):
        build(repair=True, fresh=True)


def test_more_than_the_allowed_share_is_no_repair(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "Budget", partial(Budget, max_share=0.1))
    told = (
        r"^cannot repair tiny in float16: the network itself .*; no choice of modules .* and 10% "
        r"of the products in float32; .* with 2 of \d modules, 41\.\d% of the products, "
    )
    with pytest.raises(GateFailedError, match=told):
        build(module=loud, fresh=True, repair=True)


class Settled(nn.Module):
    """A convolution that takes its BatchNorm in, and an activation of several operations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.Hardswish()
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


def settled() -> nn.Module:
    return Settled().eval().requires_grad_(False)


def test_products_belong_to_the_module_whose_result_holds_them(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Mapping[str, int]] = []
    original = repair.products_by_module

    def spy(*arguments: Any) -> Mapping[str, int]:
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(repair, "products_by_module", spy)
    build(module=loud, fresh=True, repair=True)
    build(module=settled, fresh=True, repair=True)
    first, second = ({name: count for name, count in each.items() if count} for each in seen)
    assert first == {
        "stem": 27 * 16 * 64,
        "blocks.0.expand": 512 * 64,
        "blocks.0.shrink": 512 * 64,
        "blocks.1.expand": 512 * 64,
        "blocks.1.shrink": 512 * 64,
        "head": 80,
    }
    # What the convolution computes is called by the BatchNorm that was folded into it.
    assert second == {"norm": 27 * 8 * 64, "head": 40}


def held(name: str, shape: tuple[int, ...], dtype: str = "FLOAT16") -> Operation:
    return Operation("const", 1, {}, ((name, TensorType(dtype, shape)),))


@pytest.mark.parametrize(
    ("kind", "shapes", "given", "made", "products"),
    [
        ("conv", {"x": (1, 6, 8, 8), "weight": (4, 3, 5, 5)}, {}, (1, 4, 8, 8), 4 * 64 * 3 * 25),
        ("conv_transpose", {"x": (1, 6, 4, 4), "weight": (6, 2, 3, 3)}, {}, (1, 2, 8, 8), 1728),
        ("linear", {"x": (1, 7, 6), "weight": (5, 6)}, {}, (1, 7, 5), 7 * 5 * 6),
        ("matmul", {"x": (2, 3, 4), "y": (2, 4, 5)}, {}, (2, 3, 5), 120),
        ("matmul", {"x": (2, 4, 3), "y": (2, 4, 5)}, {"transpose_x": True}, (2, 3, 5), 120),
        (
            "einsum",
            {"a": (2, 3, 4), "b": (2, 4, 5)},
            {"equation": "bij, bjk -> bik"},
            (2, 3, 5),
            120,
        ),
        (
            "scaled_dot_product_attention",
            {"query": (1, 2, 3, 4), "key": (1, 2, 5, 4), "value": (1, 2, 5, 6)},
            {},
            (1, 2, 3, 6),
            2 * 3 * 5 * (4 + 6),
        ),
        ("mul", {"x": (1, 6), "y": (1, 6)}, {}, (1, 6), 0),
    ],
)
@pytest.mark.parametrize("inline", [True, False])
def test_products_of_each_operation(
    kind: str,
    shapes: dict[str, tuple[int, ...]],
    given: dict[str, Any],
    made: tuple[int, ...],
    products: int,
    inline: bool,
) -> None:
    named: dict[str, Any] = {name: (name,) for name in shapes}
    if kind == "einsum":
        named = {"values": tuple(shapes)}
    named |= {name: (Constant(value) if inline else name,) for name, value in given.items()}
    program = Program(
        package=Path(),
        specification=7,
        operations=(
            *(held(name, shape) for name, shape in shapes.items()),
            Operation(kind, 9, named, (("made", TensorType("FLOAT16", made)),)),
        ),
        constants=given,
        arguments=(),
        results=("made",),
        inputs=(),
        outputs=(),
    )
    assert products_by_module(program, {"made": "here"})["here"] == products


def test_what_the_converter_made_of_a_module_is_raised_with_it(build: Build) -> None:
    made = build("mixed", module=settled, float32_operations=("norm", "act"))
    operations = read_program(made.folder / "model.mlpackage").operations
    dtypes = {op.type: op.outputs[0][1].dtype for op in operations}
    # coremltools makes it of the Hardswish, and calls it by no name of the network's.
    assert dtypes["sigmoid_hard"] == "FLOAT32"
    assert dtypes["linear"] == "FLOAT16"


def test_the_error_that_is_asked_for_is_held(build: Build) -> None:
    told = r"error 1e-07, .*modules, .* of the products, error "
    with pytest.raises(GateFailedError, match=told):
        build(repair=True, fresh=True, max_error=1e-7)


@pytest.mark.parametrize("precision", ["int8", "w8a8", "palette4", "pruned50", "mixed"])
def test_precisions_that_have_no_repair_are_refused(precision: str) -> None:
    target = TARGETS["coreml"]
    options = CoreMLOptions(repair=True, deployment_target="iOS18")
    with pytest.raises(ConfigError, match=f"for fp16 and not for {precision}"):
        target.check(precision, options)
    for fine in ("fp32", "fp16", "auto"):
        target.check(fine, options)


def test_calibration_images_are_asked_for_where_they_are_needed() -> None:
    target, repairing = TARGETS["coreml"], CoreMLOptions(repair=True)
    wanting: dict[str, Any] = {p: needs_calibration(target, p, repairing) for p in ("fp16", "fp32")}
    assert wanting == {"fp16": True, "fp32": False}
    assert not needs_calibration(target, "fp16", CoreMLOptions())
    assert not needs_calibration(target, "fp16", None)
    assert needs_calibration(target, "w8a8", None)
