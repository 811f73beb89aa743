"""How long a plan takes: from what earlier runs took, and where each figure comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import config
from pipeline.scheduler.estimate import LAST_TIME, RATES_FROM, Estimates
from pipeline.scheduler.plan import make_context, plan
from pipeline.stages.context import RunContext
from pipeline.steps import artifact
from pipeline.steps.step import Step
from pipeline.targets.registry import TARGETS

SIZE = 32
MACS = 2_000_000


def context(folder: Path, name: str = "mine", images: int | None = None) -> RunContext:
    values: dict[str, Any] = {
        "name": name,
        "output": str(folder),
        "model": {"name": "care_tiny", "checkpoint": "embedded"},
        "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
        "targets": {"trt": {"precisions": ["fp16"]}, "ort": {"precisions": ["fp32"]}},
    }
    if images is not None:
        values["validation"] = {"images": images}
    loaded = config.from_mapping(values).config
    return make_context(loaded, lambda line: None, lambda done, total=None, what="": None)


def made(
    folder: Path, name: str, seconds: float, facts: Mapping[str, Any], **beside: float
) -> None:
    def build(place: Path) -> Mapping[str, Any]:
        (place / "model.bin").write_bytes(b"x")
        return facts

    beside["seconds"] = seconds
    artifact.make(
        folder / name,
        kind="build",
        name=name,
        key="0" * 64,
        made_from={},
        tools={},
        build=build,
        seals={},
        beside=beside,
    )


def judged(folder: Path, name: str, seconds: float, images: int, **beside: float) -> None:
    facts = {"numbers": {"top1": {"samples": images}}}
    made(folder, f"validate/{name}", seconds, facts, **beside)


def exported(folder: Path, macs: int = MACS, model: str = "care_tiny", size: int = SIZE) -> None:
    network = {"description": {"model": model}, "input_shape": [3, size, size]}
    made(folder, "export", 3.0, {"macs": macs, "network": network})


def step(context: RunContext, name: str) -> Step:
    return next(step for step in plan(context) if step.name == name)


def test_what_was_measured_here_last_time_comes_first(tmp_path: Path) -> None:
    exported(tmp_path / "mine")
    exported(tmp_path / "other")
    made(tmp_path / "mine", "ort/fp32", 7.0, {})
    made(tmp_path / "other", "ort/fp32", 99.0, {})
    now = context(tmp_path)
    found = Estimates(now).of(step(now, "ort/fp32"))
    assert found is not None
    assert (found.at(None), found.at(1000), found.origin) == (7.0, 7.0, LAST_TIME)


def test_only_what_goes_over_the_images_grows_with_them(tmp_path: Path) -> None:
    judged(tmp_path / "mine", "ort-fp32", 9.0, 100, images_seconds=4.0)
    made(tmp_path / "mine", "validate/samples", 6.0, {"images": 100, "of": 300})
    now = context(tmp_path, images=50)
    estimates = Estimates(now)
    one = estimates.of(step(now, "validate/ort-fp32"))
    assert one is not None
    assert one.at(None) == 9.0
    assert one.at(1000) == 5.0 + 40.0
    samples = estimates.of(step(now, "validate/samples"))
    assert samples is not None
    assert samples.at(50) == 3.0
    assert estimates.images == 50
    assert Estimates(context(tmp_path)).images == 300
    assert estimates.in_words(step(now, "validate/ort-fp32")) == f"about 7 s, {LAST_TIME}"


def test_other_results_of_the_same_network_tell(tmp_path: Path) -> None:
    exported(tmp_path / "mine")
    exported(tmp_path / "older")
    exported(tmp_path / "larger", size=2 * SIZE)
    exported(tmp_path / "another", model="resnet18")
    for name, seconds in (("another", 1.0), ("larger", 2.0), ("older", 5.0)):
        made(tmp_path / name, "trt/fp16", seconds, {})
    now = context(tmp_path)
    found = Estimates(now).of(step(now, "trt/fp16"))
    assert found is not None
    assert (found.at(None), found.origin) == (5.0, f"from {tmp_path / 'older'}")
    assert Estimates(now).of(step(now, "bench/ort")) is None


def test_another_network_of_near_size_is_scaled(tmp_path: Path) -> None:
    exported(tmp_path / "mine")
    exported(tmp_path / "far", macs=1000 * MACS, model="resnet18")
    exported(tmp_path / "near", macs=4 * MACS, model="resnet10t")
    judged(tmp_path / "far", "ort-fp32", 800.0, 10)
    judged(tmp_path / "near", "ort-fp32", 8.0, 10)
    now = context(tmp_path)
    found = Estimates(now).of(step(now, "validate/ort-fp32"))
    assert found is not None
    assert found.at(20) == pytest.approx(4.0)
    assert found.origin == f"from {tmp_path / 'near'}, by multiply-accumulates"


def test_decoding_is_known_from_any_network(tmp_path: Path) -> None:
    made(tmp_path / "another", "validate/samples", 6.0, {"images": 100, "of": 100})
    exported(tmp_path / "another", model="resnet18")
    now = context(tmp_path)
    found = Estimates(now).of(step(now, "validate/samples"))
    assert found is not None
    assert (found.at(200), found.origin) == (12.0, f"from {tmp_path / 'another'}")


def test_without_any_run_rates_tell_and_else_nothing(tmp_path: Path) -> None:
    exported(tmp_path / "mine")
    now = context(tmp_path)
    estimates = Estimates(now)
    found = estimates.of(step(now, "validate/trt-fp16"))
    assert found is not None
    assert found.at(1000) == pytest.approx(1000 * TARGETS["trt"].emulates_at["fp16"] * MACS / 1e9)
    assert found.origin == RATES_FROM
    # How many images there are was told by nobody: one is not what they are.
    assert found.at(None) is None
    assert estimates.in_words(step(now, "validate/trt-fp16")) == "time not known yet"
    assert estimates.of(step(now, "validate/ort-fp32")) is None
    assert estimates.in_words(step(now, "validate/ort-fp32")) == "time not known yet"


def test_a_network_that_is_loaded_is_counted(tmp_path: Path) -> None:
    now = context(tmp_path)
    estimates = Estimates(now)
    assert estimates.macs == 0
    conv = torch.nn.Conv2d(3, 4, 1, bias=False)
    network = SimpleNamespace(input_shape=(3, SIZE, SIZE), description={"model": "x"})
    now.source.__dict__.update(module=conv, network=network)
    assert Estimates(now).macs == 3 * 4 * SIZE * SIZE


def test_images_in_one_file_are_counted_where_the_network_is_loaded(tmp_path: Path) -> None:
    """Before a first run: nothing but the dataset tells how many there are."""
    now = context(tmp_path)
    assert Estimates(now).images is None
    now.source.__dict__.update(module=torch.nn.Identity(), validation=range(7))
    assert Estimates(now).images == 7


def test_what_could_not_be_judged_and_what_is_damaged_tell_nothing(tmp_path: Path) -> None:
    made(tmp_path / "mine", "validate/trt-fp16", 0.1, {"numbers": {"top1": {"samples": None}}})
    made(tmp_path / "mine", "ort/fp32", 3.0, {})
    (tmp_path / "mine/ort/fp32/artifact.json").write_text("{")
    now = context(tmp_path)
    for name in ("validate/trt-fp16", "ort/fp32"):
        assert Estimates(now).of(step(now, name)) is None


def test_a_plan_sums_up_and_says_what_is_not_known(tmp_path: Path) -> None:
    judged(tmp_path / "mine", "ort-fp32", 60.0, 100, images_seconds=60.0)
    made(tmp_path / "mine", "ort/fp32", 60.0, {})
    now = context(tmp_path, images=100)
    names = ("ort/fp32", "validate/ort-fp32", "bench/ort", "validate/samples")
    first, second, third, fourth = (step(now, name) for name in names)
    lines = Estimates(now).lines(
        [(first, None), (second, "forced"), (third, "forced"), (fourth, "forced")]
    )
    assert lines == [
        "3 steps to run: about 1 min, and not known yet for bench/ort, validate/samples",
        "with 50,000 validation images all steps: about 8 h 21 min (validate/ort-fp32 8 h 20 min), "
        "and not known yet for bench/ort, validate/samples",
    ]
    assert Estimates(now).lines([(third, "forced")]) == [
        "1 step to run: time not known yet: no run here has measured any of them"
    ]
    assert Estimates(now).lines([(third, None)]) == []
