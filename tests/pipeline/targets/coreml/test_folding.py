"""Tables of weights that are resized in each call are resized once, before a conversion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.network import Network
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.targets.coreml.convert import convert, finish
from pipeline.targets.coreml.folding import fold_resized_weights
from pipeline.targets.coreml.network import deploy
from pipeline.targets.coreml.quiet import logged


class Positions(nn.Module):
    """Adds a table of positions that is resized for the image; `also` resizes the image, too."""

    def __init__(self, *, buffer: bool = False, also: bool = False) -> None:
        super().__init__()
        table = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
        if buffer:
            self.register_buffer("table", table)
        else:
            self.table = nn.Parameter(table)
        self.stem = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 3)
        self.also = also

    def forward(self, image: Tensor) -> Tensor:
        if self.also:
            image = F.interpolate(image, (8, 8), mode="bicubic", antialias=True)
        table = F.interpolate(self.table * 2, (8, 8), mode="bicubic", antialias=True)
        x = self.stem(image) + table
        logits: Tensor = self.head(x.relu().mean((2, 3)))
        return logits


def exported(module: nn.Module, side: int = 8) -> torch.export.ExportedProgram:
    images = torch.zeros(1, 3, side, side)
    program: torch.export.ExportedProgram = torch.export.export(module.eval(), (images,))
    decomposed: torch.export.ExportedProgram = program.run_decompositions({})
    return decomposed


def resizes(program: torch.export.ExportedProgram) -> int:
    return sum("upsample" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("buffer", [False, True])
def test_what_is_resized_of_weights_alone_is_a_buffer(buffer: bool) -> None:
    torch.manual_seed(0)
    module = Positions(buffer=buffer)
    program = exported(module)
    assert resizes(program) == 1
    assert fold_resized_weights(program) == 1
    assert resizes(program) == 0
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(program.module()(images), module(images), atol=1e-6)


def test_what_depends_on_the_image_stays() -> None:
    module = Positions(also=True)
    program = exported(module, 16)
    assert resizes(program) == 2
    assert fold_resized_weights(program) == 1
    assert resizes(program) == 1
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(program.module()(images), module(images), atol=1e-6)


def test_a_program_without_such_stays_as_it_is() -> None:
    program = exported(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    before = str(program.graph)
    assert fold_resized_weights(program) == 0
    assert str(program.graph) == before


def test_core_ml_takes_such_a_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Positions().eval()
    preprocess = {"size": 8, "crop": 1.0, "interpolation": "bicubic", "channels": "rgb"}
    preprocess |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    network = Network("positions", ("a", "b", "c"), (3, 8, 8), preprocess)
    with logged(lambda line: None):
        model = convert(deploy(module, network), network, "iOS16", None)
    finish(model, network, tmp_path / "p.mlpackage", "fp32")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    found = MilExecutor(tmp_path / "p.mlpackage", precision="float32").predict(pixels)["logits"]
    images = torch.from_numpy(((pixels / 255 - 0.5) / 0.25).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        np.testing.assert_allclose(found, module(images).numpy(), atol=1e-4)
