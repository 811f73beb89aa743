"""Builds by Apple's own packages, and what the pipeline sees of them."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.core import figures
from pipeline.core.errors import ArtifactError, BuildError, ConfigError, UnavailableError
from pipeline.core.runner import Runner
from pipeline.steps.artifact import Artifact
from pipeline.targets.coreai import build as build_module
from pipeline.targets.coreai import network as network_module
from pipeline.targets.coreai import target as module
from pipeline.targets.coreai.package import MODEL, metadata
from pipeline.targets.coreai.program import read
from pipeline.targets.coreai.target import INSTALL, CoreAITarget

from .conftest import LABELS, Build, Tiny, images, job, made, needs_coreai, network, pictures

pytestmark = needs_coreai
TARGET = CoreAITarget()


def reference(pictures: Any) -> Any:
    with torch.inference_mode():
        return Tiny().eval()(torch.from_numpy(pictures)).numpy()


def emulated(artifact: Artifact) -> Runner:
    runner = TARGET.emulate(artifact, None)
    assert runner is not None
    return runner


LIMITS = {"fp32": 1e-5, "fp16": 5e-3, "int8": 0.05, "palette8": 0.05, "palette6": 0.2}


@pytest.mark.parametrize("precision", LIMITS)
def test_a_build_computes_what_the_network_does(build: Build, precision: str) -> None:
    artifact = build(precision)
    with emulated(artifact) as runner:
        found = figures.compare(runner(images()), reference(images()))
    assert found.relative_error < LIMITS[precision]
    verified = artifact.facts["verified"]
    assert verified["apple_runtime_relative_error"] < LIMITS[precision]
    assert verified["apple_runtime_to_executor"] < 1e-2


def test_fewer_bits_are_fewer_bytes(build: Build) -> None:
    sizes = [
        (build(p).folder / MODEL / "main.mlirb").stat().st_size for p in ("fp32", "fp16", "int8")
    ]
    assert sizes == sorted(sizes, reverse=True)
    for precision, kind in (("int8", "blockwise_shift_scale"), ("palette6", "lut_to_dense")):
        assert build(precision).facts["operations"][kind] >= 1


def test_an_asset_says_what_it_is(build: Build) -> None:
    said = metadata(build().folder / MODEL)
    assert json.loads(said["labels"]) == list(LABELS)
    assert json.loads(said["preprocessing"]) == network().preprocess
    assert said["digest"] == build().facts["digest"]
    assert said["precision"] == "fp16"


def test_a_linear_head_is_no_product_of_two_axes(build: Build) -> None:
    assert "batch_matmul" not in build().facts["operations"]
    products = {row["check"]: row["level"] for row in build().facts["fitness"]}
    assert products["products"] == "fine"


def test_two_processes_write_the_same_bytes(build: Build, tmp_path: Path) -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[2:4]\n"
        "from pathlib import Path\n"
        "from tests.pipeline.targets.coreai.conftest import job, made\n"
        "made(Path(sys.argv[1]), job('int8'))\n"
    )
    root = str(Path(module.__file__).parents[3])
    place = tmp_path / "again"
    subprocess.run([sys.executable, "-c", program, str(place), root, root], check=True)
    first, again = build("int8"), Artifact.read(place)
    assert {n: r.sha256 for n, r in again.files.items()} == {
        n: r.sha256 for n, r in first.files.items()
    }


def test_names_in_a_program_are_no_random_ones(build: Build) -> None:
    content = (build().folder / MODEL / "main.mlirb").read_bytes()
    assert not re.search(rb"resource_\d{6,}", content)
    assert b"layer_norm_" not in content.replace(b"layer_norm\x00", b"")
    assert str(Path(module.__file__).parents[3]).encode() not in content


def test_labels_have_to_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 2 labels, the network gives logits of shape"):
        made(tmp_path / "x", job(of=network(labels=("a", "b"))))


class Odd(nn.Module):
    """Has an operation that Core AI has no lowering for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x).mean((2, 3))  # type: ignore[no-any-return]


def test_what_cannot_be_converted_is_said(tmp_path: Path) -> None:
    place = tmp_path / "x"
    with pytest.raises(BuildError, match=r"cannot convert tiny: .*bessel_j0.*remove coreai"):
        made(place, job(module=Odd, of=network(labels=("a", "b", "c"))))
    assert not place.exists()


class Untraceable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"torch\.export cannot export tiny"):
        made(tmp_path / "x", job(module=Untraceable, of=network(labels=("a", "b", "c"))))


class Wide(nn.Module):
    """Leaves float16's range in between, as the published attention of CARE does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        big = x * 300 * x.abs().clamp(min=1) * 300
        return (big * big).mean((2, 3)) / 1e6


def test_nan_by_apples_runtime_is_no_build(tmp_path: Path) -> None:
    wanted = job(module=Wide, of=network(labels=("a", "b", "c")))
    with pytest.raises(BuildError, match="NaN or infinity, by Apple's Core AI runtime"):
        made(tmp_path / "x", wanted)


class Sensitive(nn.Module):
    """Its answer is the small difference of large values: float16 rounds away a part of it."""

    def __init__(self, large: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, len(LABELS), 3, 2, 1)
        self.large = large

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        # No constant, which the converter would fold into the bias.
        large = self.large * torch.sigmoid(y)
        return ((y + large) - large).mean((2, 3))  # type: ignore[no-any-return]


LARGE = 500.0


def test_what_rounding_loses_is_no_wrong_conversion(tmp_path: Path) -> None:
    verified = made(tmp_path / "x", job(module=lambda: Sensitive(LARGE))).facts["verified"]
    assert verified["exact_relative_error"] < 2e-3
    assert 0.02 < verified["relative_error"] < 0.05


def test_where_rounding_loses_too_much_fp16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"lose too much in float16; use precision fp32"):
        made(tmp_path / "x", job(module=lambda: Sensitive(8 * LARGE)))
    made(tmp_path / "y", job("fp32", module=lambda: Sensitive(LARGE)))


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_another_network_than_the_module_is_no_build(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the converter had lost the last layer's bias."""

    def export(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            module.get_parameter("head.bias").zero_()
        return network_module.export(module, *arguments, **keywords)

    monkeypatch.setattr(build_module, "export", export)
    with pytest.raises(BuildError, match=r"differ from PyTorch's by .*: the conversion is wrong"):
        made(tmp_path / "x", job(precision))
    assert not (tmp_path / "x").exists()


def test_fp32_holds_what_fp16_does_not(tmp_path: Path) -> None:
    made(tmp_path / "x", job("fp32", module=Wide, of=network(labels=("a", "b", "c"))))


def test_inspect_loads_it_by_apples_runtime(build: Build) -> None:
    assert "loaded by Apple's runtime" in TARGET.inspect(build())
    assert "5 labels" in TARGET.inspect(build())


def test_fitness_on_images(build: Build) -> None:
    rows = TARGET.fitness(build(), pictures())
    assert {"operations", "range", "float16 by default"} <= {row["check"] for row in rows}


@pytest.mark.skipif(platform.system() == "Darwin", reason="there it runs")
def test_a_mac_is_what_is_missing(build: Build) -> None:
    missing = TARGET.missing(build())
    assert missing is not None
    assert "macOS 27" in missing
    with pytest.raises(UnavailableError, match="macOS 27"):
        TARGET.open(build())


@pytest.mark.parametrize(("version", "runs"), [("26.3", False), ("27.0", True), ("28.1", True)])
def test_macs_of_27_run_it(
    build: Build, monkeypatch: pytest.MonkeyPatch, version: str, runs: bool
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), "arm64"))
    assert (TARGET.missing(build()) is None) == runs


def test_without_the_packages(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = build()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert TARGET.emulate(artifact, None) is None
    assert INSTALL in str(TARGET.missing(artifact))
    for call in (lambda: TARGET.build(job(), tmp_path), lambda: TARGET.inspect(artifact)):
        with pytest.raises(UnavailableError) as caught:
            call()
        assert INSTALL in str(caught.value)
        assert caught.value.exit_code == 4


def test_a_damaged_asset_is_not_emulated(build: Build, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(build().folder, place)
    program = place / MODEL / "main.mlirb"
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content)
    with pytest.raises(ArtifactError, match="has changed since it was written"):
        TARGET.emulate(Artifact.read(place), None)


def test_every_row_of_requirements_tells_how_to_get_it() -> None:
    rows = TARGET.requirements()
    assert {"coreai-core", "coreai-torch", "coreai-opt"} <= {row.name for row in rows}
    assert all(row.remedy for row in rows)
    assert importlib.util.find_spec("coreai") is None or rows[0].found


def test_a_program_is_read_without_the_compiler_afterwards(build: Build) -> None:
    program = read(build().folder / MODEL / "main.mlirb")
    assert program.main.inputs[0][2].shape == (1, 3, 16, 16)
    assert [name for name, _ in program.main.outputs] == ["logits"]
    weights = [op.constant for op in program.main.operations if op.constant is not None]
    assert any(w.dtype == np.float16 and w.shape == (32, 16, 1, 1) for w in weights)
