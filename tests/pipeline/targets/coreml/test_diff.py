from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.core.errors import ArtifactError
from pipeline.core.network import Network
from pipeline.core.preprocess import Pictures
from pipeline.emulate.layers import by_module, jump
from pipeline.steps.artifact import Artifact
from pipeline.targets.coreml.convert import convert, finish
from pipeline.targets.coreml.diff import diff, diff_package
from pipeline.targets.coreml.fitness import fitness
from pipeline.targets.coreml.network import deploy
from pipeline.targets.coreml.quiet import logged
from pipeline.targets.coreml.verify import probes
from pipeline.targets.findings import Finding
from tests.pipeline.emulate.faults import KINDS, NETWORKS, Kind, fault

Build = Callable[..., Artifact]


def test_whole_package_has_small_errors_everywhere(
    build: Build,
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
) -> None:
    errors = diff(build(), tiny(), make_photos(3, make_network()))
    assert max(error.relative for error in errors) < 1e-2
    assert jump(errors) is None
    modules = [error.module for error in by_module(errors)]
    assert modules[0] == "stem"
    assert {"stem", "mixer", "wide", "head"} <= set(modules)
    assert [error.line for error in errors] == sorted(error.line for error in errors)
    exact = diff(build("fp32"), tiny(), make_photos(3, make_network()), precision="float32")
    assert max(error.relative for error in exact) < 1e-5


def test_damaged_layer_is_named(
    package: Path,
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
) -> None:
    other = tiny()
    other.get_parameter("wide.weight").mul_(1.2)
    errors = diff_package(package, make_network(), other, make_photos(3, make_network()))
    found = jump(errors)
    assert found is not None
    assert found.module == "wide"
    assert found.to_dict()["operation"] == "conv"


def test_foreign_module_departs_at_once(
    package: Path,
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
) -> None:
    other = tiny()
    for parameter in other.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    found = jump(diff_package(package, make_network(), other, make_photos(1, make_network())))
    assert found is not None
    assert found.module == "stem"


def test_package_with_nothing_in_common(
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
    package: Path,
) -> None:
    of = make_network()
    smaller = dataclasses.replace(of, labels=of.labels[:2])

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lot = nn.Linear(768, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lot(x.flatten(1))  # type: ignore[no-any-return]

    with pytest.raises(ArtifactError, match="another network"):
        diff_package(package, smaller, Two().eval(), make_photos(1, of))


@pytest.mark.parametrize("network", range(NETWORKS))
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_at_fault_is_named(
    kind: Kind,
    network: int,
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
    tmp_path: Path,
) -> None:
    case, of, path = fault(kind, network), make_network(), tmp_path / "wrong.mlpackage"
    with logged(lambda line: None):
        finish(convert(deploy(case.wrong, of), of, "iOS16", ()), of, path, "fp16")
    found = jump(diff_package(path, of, case.right, make_photos(2, of)))
    assert found is not None
    assert found.module == case.module


def checks(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_fit_network(package: Path, make_network: Callable[..., Network]) -> None:
    found = checks(fitness(package, probes(make_network()).pixels))
    assert {name for name, finding in found.items() if finding.level == "problem"} == set()
    assert "0 overflows" in found["range"].found
    assert "0 transposes" in found["layout"].found
    assert found["rank"].to_dict()["level"] == "fine"


def test_float32_is_no_work_for_the_neural_engine(build: Build) -> None:
    found = checks(fitness(build("fp32").folder / "model.mlpackage"))["float16"]
    assert found.level == "problem"
    assert found.where


class _Unfit(nn.Module):
    """Five axes, a cumulative sum, transposes and values beyond float16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).reshape(-1, 2, 4, 16, 16).transpose(1, 2).reshape(-1, 8, 16, 16)
        x = x.cumsum(1) * 3e4
        return self.head(x.mean((2, 3)) / 3e4)  # type: ignore[no-any-return]


def test_unfit_network(make_network: Callable[..., Network], tmp_path: Path) -> None:
    of, path = make_network(), tmp_path / "unfit.mlpackage"
    with logged(lambda line: None):
        finish(convert(deploy(_Unfit().eval(), of), of, "iOS16", ()), of, path, "fp16")
    found = checks(fitness(path, np.full((2, 16, 16, 3), 255, np.uint8)))
    assert found["rank"].level == "problem"
    assert found["placement"].level == "problem"
    assert "cumsum" in found["placement"].advice
    assert found["layout"].level == "advice"
    assert found["range"].level == "problem"
