"""Conversions that are wrong in the ways that conversions go wrong: each must be noticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.core.errors import ArtifactError, BuildError, UnsupportedOperatorError
from pipeline.core.network import Network
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.mil.program import read_program
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml.build import COMPRESSED, FLOAT16, FLOAT32
from pipeline.targets.coreml.convert import convert, finish
from pipeline.targets.coreml.network import deploy
from pipeline.targets.coreml.quiet import logged
from pipeline.targets.coreml.verify import verify


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Path]:
    def make(module: nn.Module, of: Network, precision: str = "fp16") -> Path:
        path = tmp_path / "damaged.mlpackage"
        float32 = None if precision == "fp32" else ()
        with logged(lambda line: None):
            finish(convert(deploy(module, of), of, "iOS16", float32), of, path, precision)
        return path

    return make


def test_whole_package_passes(
    package: Path, tiny: Callable[..., nn.Module], make_network: Callable[..., Network]
) -> None:
    facts = verify(package, tiny(), make_network(), FLOAT16)
    assert facts["exact_relative_error"] < 1e-3
    assert facts["rounded_flips"] == 0


def test_wrong_mean(
    converted: Callable[..., Path],
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
) -> None:
    wrong = converted(tiny(), make_network(mean=[0.5, 0.5, 0.5]))
    with pytest.raises(BuildError, match="differ from PyTorch's"):
        verify(wrong, tiny(), make_network(), FLOAT16)


def test_one_average_std(
    converted: Callable[..., Path],
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
) -> None:
    wrong = converted(tiny(), make_network(std=[0.226, 0.226, 0.226]), "fp32")
    with pytest.raises(BuildError, match="differ from PyTorch's"):
        verify(wrong, tiny(), make_network(), FLOAT32)


def test_swapped_channels(
    package: Path, tiny: Callable[..., nn.Module], make_network: Callable[..., Network]
) -> None:
    def swap(specification: Any) -> None:
        image = specification.description.input[0].type.imageType
        image.colorSpace = image.BGR

    saved.edit(package, swap)
    with pytest.raises(BuildError, match=r"differ from PyTorch's .* begins at stem \(conv"):
        verify(package, tiny(), make_network(), FLOAT16)


def test_division_with_an_epsilon(
    converted: Callable[..., Path],
    tiny: Callable[..., nn.Module],
    tiny_class: type[nn.Module],
    make_network: Callable[..., Network],
) -> None:
    class Reciprocal(tiny_class):  # type: ignore[valid-type, misc]
        def divide(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a * (b + 1e-4).reciprocal()  # what Core ML's `inverse` computes by default

    wrong = converted(Reciprocal().eval(), make_network())
    with pytest.raises(BuildError, match=r"differ from PyTorch's .* begins at the network itself"):
        verify(wrong, tiny(), make_network(), FLOAT16)


def test_network_that_float16_weights_move_is_judged_by_that(
    converted: Callable[..., Path],
    tiny_class: type[nn.Module],
    make_network: Callable[..., Network],
) -> None:
    class Cancelling(tiny_class):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.full((5, 16), 300.0))
            with torch.no_grad():
                self.head.weight += self.offset

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.gelu(self.stem(x)).mean((2, 3))
            return self.head(x) - nn.functional.linear(x, self.offset)  # type: ignore[no-any-return]

    of, module = make_network(), Cancelling().eval().requires_grad_(False)
    limits = dataclasses.replace(FLOAT16, rounded=None)
    facts = verify(converted(module, of), module, of, limits)
    assert facts["exact_relative_error"] > 0.02
    assert facts["exact_relative_error"] < 2 * facts["float16_weights_relative_error"]
    other = make_network(mean=[0.9, 0.1, 0.5])
    with pytest.raises(BuildError, match="differ from PyTorch's"):
        verify(converted(module, other), module, of, limits)


def test_missing_softmax(
    package: Path, tiny: Callable[..., nn.Module], make_network: Callable[..., Network]
) -> None:
    def skip(specification: Any) -> None:
        function = specification.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        block.operations[-1].inputs["probabilities"].arguments[0].name = "logits"

    saved.edit(package, skip)
    with pytest.raises(ArtifactError, match="no softmax of its logits"):
        verify(package, tiny(), make_network(), COMPRESSED)


def test_overflow_is_found_whatever_the_limits(
    converted: Callable[..., Path],
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
) -> None:
    huge = tiny()
    huge.get_parameter("wide.weight").mul_(1e6)
    with pytest.raises(BuildError, match="leaves the range of float16"):
        verify(converted(huge, make_network()), huge, make_network(), COMPRESSED)


def test_weight_file_missing_or_cut_off(package: Path) -> None:
    weights = package / saved.WEIGHTS / "weight.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="is cut off"):
        read_program(package)
    weights.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        read_program(package)


def test_foreign_package_and_older_kind_of_model(package: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        read_program(tmp_path / "none.mlpackage")

    def older(specification: Any) -> None:
        specification.neuralNetwork.SetInParent()

    saved.edit(package, older)
    with pytest.raises(ArtifactError, match="neuralNetwork"):
        read_program(package)


def test_unknown_operation_is_named_with_its_line(package: Path) -> None:
    def change(specification: Any) -> None:
        function = specification.mlProgram.functions["main"]
        operations = function.block_specializations[function.opset].operations
        next(op for op in operations if op.type == "gelu").type = "frobnicate"

    saved.edit(package, change)
    with pytest.raises(UnsupportedOperatorError, match=r"'frobnicate' \(line \d+"):
        MilExecutor(package)


def test_label_list_of_the_wrong_length(package: Path) -> None:
    def drop(specification: Any) -> None:
        function = specification.mlProgram.functions["main"]
        classify = function.block_specializations[function.opset].operations[-1]
        del classify.inputs["classes"].arguments[0].value.immediateValue.list.values[-1]

    saved.edit(package, drop)
    with pytest.raises(ArtifactError, match="label"):
        read_program(package)


def test_damage_of_an_artifact_is_found_before_it_runs(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    import shutil

    from pipeline.targets.coreml.target import CoreMLTarget

    folder = Path(shutil.copytree(build().folder, tmp_path / "artifact"))
    weights = folder / "model.mlpackage" / saved.WEIGHTS / "weight.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match="has changed"):
        CoreMLTarget().emulate(dataclasses.replace(build(), folder=folder), None)
