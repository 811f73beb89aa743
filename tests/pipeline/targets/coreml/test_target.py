from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.core import figures
from pipeline.core.errors import (
    ArtifactError,
    BuildError,
    ConfigError,
    InputError,
    UnavailableError,
    UnsupportedOperatorError,
)
from pipeline.core.files import file_hash
from pipeline.core.network import Images, Network
from pipeline.core.preprocess import Pictures
from pipeline.emulate.mil.program import read_program
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import BuildJob
from pipeline.targets.coreml.build import RECIPES
from pipeline.targets.coreml.options import CoreMLOptions
from pipeline.targets.coreml.target import CoreMLTarget

Build = Callable[..., Artifact]
TARGET = CoreMLTarget()

off_a_mac = pytest.mark.skipif(platform.system() == "Darwin", reason="macOS runs Core ML")


def logits(module: nn.Module, images: Images) -> Any:
    with torch.inference_mode():
        return module(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize(("precision", "error"), [("fp16", 5e-3), ("fp32", 1e-5), ("mixed", 5e-3)])
def test_emulated_package_gives_the_logits_of_pytorch(
    build: Build,
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
    precision: str,
    error: float,
) -> None:
    pictures = make_photos(40, make_network())
    runner = TARGET.emulate(build(precision), None)
    assert runner is not None
    with runner:
        found = figures.compare(runner(pictures.pixels), logits(tiny(), pictures.images))
        numerics = runner.numerics()
    assert found.relative_error < error
    assert found.flips == 0
    assert numerics is not None
    assert numerics.more["images"] == 32
    assert (numerics.overflowed_values, numerics.overflowed_tensors) == (0, ())
    assert "executor" in runner.device
    with pytest.raises(InputError, match="closed"):
        runner(pictures.pixels)


def test_the_second_reading_rounds_sums_in_float16(
    build: Build, make_network: Callable[..., Network], make_photos: Callable[..., Pictures]
) -> None:
    pixels = make_photos(4, make_network()).pixels
    runner = TARGET.emulate(build("fp16"), None)
    assert runner is not None
    with runner:
        second = runner.narrow_sums()
        assert second is not None
        assert second.device.endswith("sums of products in float16")
        assert runner.divides == second.divides == 8, "pictures of so few values"
        with second:
            narrow, wide = second(pixels), runner(pixels)
    assert not np.array_equal(narrow, wide)
    assert figures.compare(narrow, wide).relative_error < 2e-2
    without = TARGET.emulate(build("fp32"), None)
    assert without is not None
    with without:
        assert without.narrow_sums() is None


def test_mixed_by_module(build: Build) -> None:
    built = build("mixed", float32_operations=["wi*", "softmax"])
    program = read_program(built.folder / "model.mlpackage")
    kinds = {
        (op.outputs[0][0], op.outputs[0][1].dtype) for op in program.operations if op.type == "conv"
    }
    # The third convolution is the module named wide.
    assert {kind for _, kind in kinds} == {"FLOAT16", "FLOAT32"}
    assert [name for name, kind in kinds if kind == "FLOAT32"] == ["conv2d_2"]


def test_mixed_refuses_what_names_nothing(
    make_job: Callable[..., BuildJob], tmp_path: Path
) -> None:
    job = make_job("mixed", float32_operations=["sofmax"])
    with pytest.raises(ConfigError, match=r"names sofmax, .*; did you mean softmax\?"):
        TARGET.build(job, tmp_path)


def test_mixed_keeps_the_named_operations_in_float32(build: Build) -> None:
    def types(precision: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        program = read_program(build(precision).folder / "model.mlpackage")
        for operation in program.operations:
            found.setdefault(operation.type, set()).add(operation.outputs[0][1].dtype)
        return found

    assert types("fp16")["real_div"] == {"FLOAT16"}
    assert types("mixed")["real_div"] == {"FLOAT32"}
    assert types("mixed")["conv"] == {"FLOAT16"}


def test_package_describes_itself(build: Build) -> None:
    program = read_program(build().folder / "model.mlpackage")
    assert [(f.name, f.kind, f.colour) for f in program.inputs] == [("image", "image", "RGB")]
    assert [f.name for f in program.outputs] == ["classLabel", "classLabel_probs", "logits"]
    assert program.labels[-1] == "größe"
    assert program.metadata["author"] == "Ada"
    assert program.metadata["license"] == "MIT"
    assert program.metadata["origin"] == "a test"
    assert json.loads(program.metadata["preprocessing"])["std"] == [0.229, 0.224, 0.225]
    assert json.loads(program.metadata["labels"]) == list(program.labels)


@pytest.mark.parametrize(("system", "version"), [("iOS16", 7), ("iOS17", 8), ("iOS18", 9)])
def test_deployment_target_decides_the_specification(
    build: Build, system: str, version: int
) -> None:
    built = build(deployment_target=system)
    assert read_program(built.folder / "model.mlpackage").specification == version
    assert TARGET.inspect(built).endswith("5 labels")


def test_one_sided_clamps_have_no_infinity(build: Build) -> None:
    operations = build().facts["operations"]
    assert "clip" not in operations
    assert operations["maximum"] == 1


def test_two_builds_are_the_same_bytes(build: Build) -> None:
    # Both now: what other files of tests imported between two builds is not what is asked here.
    first, second = build("int8", fresh=True), build("int8", fresh=True)
    assert first.folder != second.folder
    for path in first.folder.rglob("model.mlpackage/**/*"):
        if path.is_file():
            assert file_hash(path) == file_hash(second.folder / path.relative_to(first.folder))


def test_what_was_recorded_is_taken_up_elsewhere(
    build: Build, make_network: Callable[..., Network], make_photos: Callable[..., Pictures]
) -> None:
    pixels, built = make_photos(40, make_network()).pixels, build("fp16")
    whole, first, second = (TARGET.emulate(built, None) for _ in range(3))
    assert whole is not None
    assert first is not None
    assert second is not None
    for part in (pixels[:16], pixels[16:32], pixels[32:]):
        whole(part)
    first(pixels[:16])
    second.go_on(16, json.loads(json.dumps(first.noted())))
    second(pixels[16:32])
    second(pixels[32:])
    assert whole.numerics() is not None
    assert second.numerics() == whole.numerics()


def test_parts_are_recorded_apart_and_joined(
    build: Build, make_network: Callable[..., Network], make_photos: Callable[..., Pictures]
) -> None:
    pixels, built = make_photos(48, make_network()).pixels, build("fp16")
    whole, joined, part = (TARGET.emulate(built, None) for _ in range(3))
    assert whole is not None
    assert joined is not None
    assert part is not None
    for batch in (pixels[:16], pixels[16:32], pixels[32:]):
        whole(batch)
    noted: list[Any] = []
    for first in (24, 0):
        part.begin(first)
        part(pixels[first:][:24])
        noted.insert(0, json.loads(json.dumps(part.noted())))
    assert len(noted[0]["compared"]) == len(noted[1]["compared"]) == 1
    joined.go_on(48, joined.joined(noted))
    assert whole.numerics() is not None
    found, expected = joined.numerics(), whole.numerics()
    assert found == expected


def test_gray_images(
    build: Build,
    tiny: Callable[..., nn.Module],
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
) -> None:
    gray, pictures = make_network(channels=1), make_photos(4, make_network(channels=1))
    built = build(of=gray, module=lambda: tiny(1))
    runner = TARGET.emulate(built, None)
    assert runner is not None
    found = figures.compare(runner(pictures.pixels), logits(tiny(1), pictures.images))
    assert found.relative_error < 5e-3
    program = read_program(built.folder / "model.mlpackage")
    assert program.inputs[0].colour == "GRAYSCALE"


class _Reflected(nn.Module):
    """A stem that does not begin with a plain convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"))  # type: ignore[no-any-return]


def test_std_is_multiplied_where_it_cannot_be_folded(
    build: Build, tiny: Callable[..., nn.Module]
) -> None:
    assert build().facts["std"] == "folded"
    torch.manual_seed(3)
    stem = _Reflected()
    assert build(module=lambda: tiny(stem=stem)).facts["std"] == "multiplied"


def test_noise_goes_to_the_log_not_to_the_screen(
    make_job: Callable[..., BuildJob], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    TARGET.build(make_job(log=lines.append), tmp_path)
    screen = capfd.readouterr()
    assert (screen.out, screen.err) == ("", "")
    assert any("MIL" in line for line in lines)
    assert len(lines) < 40


def test_precisions_that_need_a_newer_system_are_refused() -> None:
    old = CoreMLOptions()
    for name, recipe in RECIPES.items():
        if recipe.deployment_target == "iOS16":
            TARGET.check(name, old)
        else:
            with pytest.raises(
                ConfigError, match=f"set deployment_target: {recipe.deployment_target}"
            ):
                TARGET.check(name, old)
            TARGET.check(name, CoreMLOptions(deployment_target="iOS18"))


def test_mixed_needs_operations() -> None:
    with pytest.raises(ConfigError, match="float32_operations"):
        TARGET.check("mixed", CoreMLOptions(float32_operations=()))


def test_wrong_number_of_labels_is_refused(
    make_job: Callable[..., BuildJob], make_network: Callable[..., Network], tmp_path: Path
) -> None:
    of = dataclasses.replace(make_network(), labels=("a", "b"))
    with pytest.raises(ConfigError, match="2 labels, the network gives logits of shape"):
        TARGET.build(make_job(of=of), tmp_path)


def test_unsuitable_channels_are_refused(
    make_job: Callable[..., BuildJob], make_network: Callable[..., Network], tmp_path: Path
) -> None:
    of = dataclasses.replace(make_network(), input_shape=(4, 16, 16))
    with pytest.raises(ConfigError, match="1 or 3 channels"):
        TARGET.build(make_job(of=of), tmp_path)


def test_module_that_cannot_be_exported(
    make_job: Callable[..., BuildJob], tiny_class: type[nn.Module], tmp_path: Path
) -> None:
    class Branching(tiny_class):  # type: ignore[valid-type, misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.sum().item() > 3 else x * 2)  # type: ignore[no-any-return]

    with pytest.raises(BuildError, match=r"torch\.export cannot export tiny"):
        TARGET.build(make_job(module=lambda: Branching().eval()), tmp_path)


def test_preprocessing_that_does_not_fit_the_channels_is_refused(
    make_job: Callable[..., BuildJob], make_network: Callable[..., Network], tmp_path: Path
) -> None:
    gray = make_network(channels=1)
    with pytest.raises(ConfigError, match="takes 3 channels, its preprocessing gives 1: set"):
        TARGET.build(make_job(of=dataclasses.replace(gray, input_shape=(3, 16, 16))), tmp_path)
    without = dataclasses.replace(gray, preprocess={"mean": [0.5], "std": [0.5]})
    with pytest.raises(ConfigError, match="preprocess of tiny: preprocessing lacks size"):
        TARGET.build(make_job(of=without), tmp_path)


def test_what_is_no_batch_of_pixels_is_refused(
    build: Build, make_network: Callable[..., Network], make_photos: Callable[..., Pictures]
) -> None:
    runner = TARGET.emulate(build(), None)
    assert runner is not None
    assert runner.takes == "pixels"
    pictures = make_photos(2, make_network())
    assert runner.input_of(pictures) is pictures.pixels
    pixels = pictures.pixels
    for wrong in (pictures.images, pixels.astype(np.int64), pixels[..., :2], pixels[0]):
        with pytest.raises(InputError, match=r"takes uint8 pixels of shape \(batch, .*, 3\), not"):
            runner(wrong)


@off_a_mac
def test_a_package_that_cannot_be_emulated_is_built(
    build: Build, tiny_class: type[nn.Module], make_network: Callable[..., Network]
) -> None:
    """A gap of the executor says nothing about what was built."""

    class Seeking(tiny_class):  # type: ignore[valid-type, misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            place = x[:, 0].flatten(1).argmin(1, keepdim=True)
            return super().forward(x) + place.to(x.dtype) * 1e-3  # type: ignore[no-any-return]

    made = build(module=lambda: Seeking().eval())
    told = made.facts["verified"]["not_emulated"]
    assert told.startswith("operation 'reduce_argmin' (line ")
    assert made.facts["operations"]["reduce_argmin"] == 1
    with pytest.raises(UnsupportedOperatorError, match="reduce_argmin"):
        TARGET.emulate(made, None)


def test_off_a_mac_it_says_what_is_missing(build: Build) -> None:
    missing = TARGET.missing(build())
    assert missing is not None
    assert missing.startswith("Core ML predictions need macOS")
    assert "--import" in missing
    with pytest.raises(UnavailableError, match="need macOS"):
        TARGET.open(build())
    assert {r.name for r in TARGET.requirements()} == {"coremltools", "macOS"}


def test_foreign_labels_are_found(build: Build) -> None:
    facts = {**build().facts, "network": {**build().facts["network"], "labels": list("abcde")}}
    with pytest.raises(ArtifactError, match="labels"):
        TARGET.inspect(dataclasses.replace(build(), facts=facts))
    with pytest.raises(ArtifactError, match="states no network"):
        TARGET.inspect(dataclasses.replace(build(), facts={}))


@pytest.mark.slow
def test_care_tiny(
    build: Build,
    make_network: Callable[..., Network],
    make_photos: Callable[..., Pictures],
    parity_model: Callable[[str], nn.Module],
) -> None:
    from care.fuse import fuse

    def module() -> nn.Module:
        return fuse(parity_model("care_tiny"))

    of = dataclasses.replace(make_network(size=64), labels=tuple("0123456789"))
    built = build(of=of, module=module)
    operations = built.facts["operations"]
    assert sum(operations.values()) <= 265
    assert not {"transpose", "inverse"} & set(operations)
    # Clamps from below are no clips with an infinite upper bound.
    assert (operations["maximum"], operations["clip"]) == (10, 5)
    pictures = make_photos(16, of)
    runner = TARGET.emulate(built, None)
    assert runner is not None
    found = figures.compare(runner(pictures.pixels), logits(module(), pictures.images))
    assert found.relative_error < 3e-3
    assert found.flips == 0
