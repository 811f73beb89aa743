"""What coremltools misreads, converted with and without our mends, against torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from pipeline.core.network import Network
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.mil.record import module_owners
from pipeline.targets.coreml import convert as conversion
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml.network import deploy
from pipeline.targets.coreml.quiet import logged
from pipeline.targets.coreml.rewrites import rewrite

SHAPE = (1, 4, 6, 8)
OTHER = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
W = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(2))
LSTM = nn.LSTM(8, 5, batch_first=True, bidirectional=True).requires_grad_(False)
GRU = nn.GRU(8, 5, batch_first=True).requires_grad_(False)

MISREAD: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu exact": F.gelu,
    "add alpha": lambda x: torch.add(x, OTHER, alpha=2.5),
    "add number alpha": lambda x: torch.add(x, 3, alpha=2),
    "sub alpha": lambda x: torch.sub(x, OTHER, alpha=2.5),
    "rsub alpha": lambda x: torch.rsub(x, OTHER, alpha=2.5),
    "rsub number alpha": lambda x: torch.rsub(x, 1.5, alpha=2.5),
    "rsub": lambda x: 1 - x,
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 1e-3),
    "1 / x": lambda x: 1 / (x.abs() + 1e-3),
    "clamp from below": lambda x: x.clamp(min=0.3),
    "alias": lambda x: torch.ops.aten.alias(torch.ops.aten.alias(x) + 1),
    "detach": lambda x: x.detach() * 2,
    "addcmul": lambda x: torch.addcmul(x, OTHER, OTHER, value=0.3),
    "addcdiv": lambda x: torch.addcdiv(x, OTHER, OTHER.abs() + 1, value=0.3),
    "celu": lambda x: F.celu(x, 1.3),
    "pad that cuts": lambda x: F.pad(x, (-1, 2, -2, -1), value=0.5),
    "pad that cuts channels": lambda x: F.pad(x, (1, -2, 0, 0, -1, 0)),
    "pad that reflects and adds": lambda x: F.pad(x, (2, 1, 0, 1), mode="reflect"),
    "six axes unbound": lambda x: torch.sub(
        *x.reshape(1, 4, 3, 2, 2, 4).permute(3, 0, 4, 2, 1, 5).unbind(0)
    ),
    "six axes and sums": lambda x: (
        x.reshape(1, 1, 4, 6, 2, 4) + OTHER.reshape(4, 6, 8)[..., :2, None] + OTHER[0, 0, 0, :4]
    ).reshape(24, 8),
    "six axes and a linear layer": lambda x: F.linear(
        x.reshape(1, 2, 2, 3, 4, 4).transpose(2, 4), W[:, :, 0, 0]
    ).flatten(0, 4),
    "pad cut": lambda x: F.pad(x, (-1, 2, 0, -3)),
    "pad cut alone": lambda x: F.pad(x, (-1, -1, -1, -1)),
    "pad by a value": lambda x: F.pad(x, (2, -2, 1, 0), value=1.5),
    "lstm": lambda x: LSTM(x[:, 0])[0],
    "gru": lambda x: GRU(x[:, 0])[0],
    # Read right, and kept that way: what networks with decoders and sorting need.
    "conv_transpose": lambda x: F.conv_transpose2d(x, W, stride=2),
    "conv_transpose padded": lambda x: F.conv_transpose2d(x, W, stride=2, padding=1, dilation=2),
    "conv_transpose output_padding": lambda x: F.conv_transpose2d(
        x, W, stride=2, padding=1, output_padding=1
    ),
    "conv_transpose wide output_padding": lambda x: F.conv_transpose2d(
        x, W, stride=3, padding=1, output_padding=2
    ),
    "conv_transpose one axis": lambda x: F.conv_transpose1d(
        x[:, :, 0], W[:, :, 0], stride=2, padding=1, output_padding=1
    ),
    "bilinear": lambda x: F.interpolate(x, size=(9, 11), mode="bilinear"),
    "bilinear aligned": lambda x: F.interpolate(
        x, size=(9, 11), mode="bilinear", align_corners=True
    ),
    "bilinear smaller": lambda x: F.interpolate(x, size=(3, 5), mode="bilinear"),
    "nearest by a fraction": lambda x: F.interpolate(x, scale_factor=1.5),
    "nearest to a size": lambda x: F.interpolate(x, size=(9, 11)),
    "tril": torch.tril,
    "triu": lambda x: torch.triu(x, 1),
    "argsort": lambda x: torch.argsort(x, -1).float(),
    "sort": lambda x: torch.sort(x, -1, descending=True).values,
}


class Cases(nn.Module):
    """One output for each case."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(x) + 0 for function in MISREAD.values())


def exported(module: nn.Module) -> ExportedProgram:
    example = torch.zeros(SHAPE)
    program: ExportedProgram = torch.export.export(module.eval(), (example,))
    return program.run_decompositions({})  # type: ignore[no-any-return]


def convert(program: ExportedProgram, path: Path) -> MilExecutor:
    import coremltools as ct

    with logged(lambda line: None):
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        saved.save(model, path)
        del model  # here, where its warning about a temporary folder is caught
    return MilExecutor(path, precision="float32")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, list[Any]]:
    """Two images, and what the package of all cases makes of them."""
    path = tmp_path_factory.mktemp("cases") / "model.mlpackage"
    executor = convert(rewrite(exported(Cases())), path)
    images = 2 * torch.randn(2, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
    return images, list(executor.predict(images.numpy()).values())


@pytest.mark.parametrize("index", range(len(MISREAD)), ids=list(MISREAD))
def test_operation_is_converted_as_it_is_meant(found: tuple[Tensor, list[Any]], index: int) -> None:
    images, answers = found
    reference = list(MISREAD.values())[index]
    expected = torch.cat([reference(image) for image in images.split(1)])
    np.testing.assert_allclose(answers[index], expected.numpy(), rtol=2e-6, atol=5e-6)


def test_gelu_by_tanh_stays_one_operation_of_its_module(tmp_path: Path) -> None:
    program = rewrite(exported(nn.Sequential(nn.Identity(), nn.GELU("tanh"))))
    executor = convert(program, tmp_path / "model.mlpackage")
    assert executor.operations() == {"gelu": 1}
    (gelu,) = (op for op in executor.program.operations if op.type == "gelu")
    assert module_owners(program)[gelu.outputs[0][0]] == "1"


def test_result_that_is_an_alias(tmp_path: Path) -> None:
    class Alias(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.alias(x.relu())  # type: ignore[no-any-return]

    executor = convert(rewrite(exported(Alias())), tmp_path / "model.mlpackage")
    images = OTHER.numpy()
    (answer,) = executor.predict(images).values()
    np.testing.assert_array_equal(answer, np.maximum(images, 0))


class Folded(nn.Module):
    """Adds up patches that overlap, as VOLO does."""

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 3, padding=1, stride=2)
        return F.fold(patches, x.shape[-2:], 3, padding=1, stride=2).mean((2, 3))


def test_patches_that_overlap_are_added_up(tmp_path: Path) -> None:
    preprocess = {"size": 8, "crop": 1.0, "interpolation": "bicubic", "channels": "rgb"}
    preprocess |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    network = Network("folded", ("a", "b", "c"), (3, 8, 8), preprocess)
    with logged(lambda line: None):
        model = conversion.convert(deploy(Folded().eval(), network), network, "iOS16", None)
    conversion.finish(model, network, tmp_path / "p.mlpackage", "fp32")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    found = MilExecutor(tmp_path / "p.mlpackage", precision="float32").predict(pixels)["logits"]
    images = torch.from_numpy((pixels / 255).astype(np.float32)).permute(0, 3, 1, 2)
    np.testing.assert_allclose(found, Folded()(images).numpy(), atol=1e-4)
