"""Which networks of timm come through: what stands for a family, how it is judged, what is kept."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import timm_breadth as breadth
import torch
from timm.models import PretrainedCfg
from timm_breadth import LIMITS, PASSES, Line

import care.networks  # noqa: F401  registers ours with timm, which are no family of its own
from pipeline.report.model import Run
from pipeline.scheduler.plan import STAGES
from pipeline.steps.facts.graphs import RepairFacts
from pipeline.steps.step import State


def test_the_smallest_classifier_stands_for_its_family() -> None:
    sizes = breadth.members("starnet")
    assert sizes == sorted(sizes)
    assert sizes[0][1] == "starnet_s050"
    families = breadth.families()
    assert "resnet" in families
    assert not {breadth.family_of("care_s0"), breadth.family_of("mlla_t")} & set(families)
    made = timm.create_model("starnet_s050", num_classes=breadth.CLASSES)
    assert sizes[0][0] == sum(p.numel() for p in made.parameters())
    assert breadth.family_of("levit_128s") == "levit"


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 64), ("test_vit", 64)])
def test_the_smallest_size_that_a_network_takes_is_its_own(name: str, size: int) -> None:
    assert breadth.smallest_size(name) == size


class Halved(torch.nn.Module):
    """Halves an image three times before a BatchNorm; one more sees a single position always."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.AvgPool2d(64), torch.nn.BatchNorm2d(3))
        self.gate = torch.nn.BatchNorm2d(3)
        self.head = torch.nn.Linear(3, breadth.CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.gate(self.body(images).mean((2, 3), keepdim=True))
        logits: torch.Tensor = self.head(pooled.flatten(1))
        return logits


def test_a_size_is_sensible_where_norms_see_as_many_positions_as_they_shall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert breadth.single_positions(Halved().eval(), 64) == {"body.1", "gate"}
    assert breadth.single_positions(Halved().eval(), 128) == {"gate"}
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: Halved())
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name, **kwargs: None)
    assert breadth.smallest_size("halved") == 128


class Stacked(torch.nn.Module):
    """Takes multiples of 42 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3 * 42 * 42, breadth.CLASSES)
        torch.nn.init.trunc_normal_(self.head.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.pixel_unshuffle(images, 42).mean((2, 3))
        logits: torch.Tensor = self.head(pooled)
        return logits


def test_a_size_that_timm_states_is_tried_and_weights_are_not_filled_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stated = PretrainedCfg(input_size=(3, 546, 546), min_input_size=(3, 126, 126))
    made: list[Stacked] = []

    def create(name: str, **kwargs: object) -> Stacked:
        made.append(Stacked())
        return made[-1]

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name, **kwargs: stated)
    assert breadth.smallest_size("stacked") == 126
    assert {each.head.weight.device.type for each in made} == {"meta"}


def test_a_network_without_logits_is_told_by_its_shapes() -> None:
    features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 12))
    with pytest.raises(breadth.NoLogitsError, match=r"gives \(1, 12\)"):
        breadth.single_positions(features, 2)


def test_images_are_seeded_and_in_classes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        breadth.write_images(tmp_path / folder, 32, 12, seed=4)
    breadth.write_images(tmp_path / "c", 32, 12, seed=5)
    first, second, other = (sorted((tmp_path / each).rglob("*.png")) for each in "abc")
    assert len({path.parent.name for path in first}) == breadth.CLASSES
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert [p.read_bytes() for p in first] != [p.read_bytes() for p in other]
    assert len(first) == 12


def test_only_what_is_broken_is_repaired(tmp_path: Path) -> None:
    plain = breadth.settings("resnet18", 64, tmp_path)["targets"]
    assert not any("repair" in target for target in plain.values())
    mended = breadth.settings("resnet18", 64, tmp_path, ["coreml"])["targets"]
    assert mended["coreml"]["repair"] is True
    assert "repair" not in mended["trt"]


def test_8_bits_are_looked_at_without_other_targets(tmp_path: Path) -> None:
    targets = breadth.settings("resnet18", 64, tmp_path, limits=breadth.INT8_LIMITS)["targets"]
    assert targets == {"ort": {"precisions": ["fp32", "int8"], "tune": False}}
    line = Line("resnet", outcome={"ort/fp32": PASSES, "ort/int8": "validate: relative error 0.7"})
    assert not breadth._is_broken(line, "ort/int8")  # no repair is for it


def test_lines_of_8_bits_are_none_of_the_others(tmp_path: Path) -> None:
    path, jobs = tmp_path / "lines.jsonl", []
    for int8, limits in ((False, LIMITS), (True, breadth.INT8_LIMITS)):
        for names in (None, ["resnet18"]):
            jobs.append(breadth._job(["resnet"] if names is None else None, names, int8=int8))
            line = Line("resnet", "resnet18", 64 + len(jobs), named=names is not None)
            line.outcome, line.errors = dict.fromkeys(limits, PASSES), dict.fromkeys(limits, 0.1)
            with path.open("a") as file:
                file.write(json.dumps(asdict(line)) + "\n")
    assert [[line.size for line in job.lines(path)] for job in jobs] == [[65], [66], [67], [68]]
    markers = ["breadth", "networks", "breadth in 8 bits", "networks in 8 bits"]
    assert [job.marker for job in jobs] == markers
    rows = list(breadth.table(jobs[3].lines(path), 1, "networks", jobs[3].limits))
    assert rows[-3] == "| family | network | size | ort/fp32 | ort/int8 |"


@pytest.mark.parametrize(
    ("outcome", "broken"),
    [
        (PASSES, False),
        ("validate: its logits are not finite", True),
        ("validate: relative error 3.0e-02, 2e-02 allowed", True),
        ("coreml/fp16: breadth: the Core ML package gives NaN (rounded arithmetic)", True),
        ("coreml/fp16: coremltools cannot convert breadth", False),
        ("export: does not export", False),
    ],
)
def test_half_precision_breaks_what_float32_does_not(outcome: str, broken: bool) -> None:
    line = Line("vgg", outcome={"ort/fp32": PASSES, "coreml/fp16": outcome})
    assert breadth._is_broken(line, "coreml/fp16") is broken
    line.outcome["ort/fp32"] = "validate: relative error 3.0e-03, 1e-03 allowed"
    assert not breadth._is_broken(line, "coreml/fp16")


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (PASSES, "passes after repair: nothing had to be raised above float16; before: broken"),
        ("validate: still", "broken; repaired: validate: still"),
    ],
)
def test_a_repair_is_a_state_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: str, told: str
) -> None:
    facts = RepairFacts("float16", "", (), 5, 0.0, 0.001, None, "", 4, 1)
    run = SimpleNamespace(artifacts=[SimpleNamespace(name="trt/fp16", repair=facts)])
    monkeypatch.setattr(Run, "read", lambda path: run)
    line = Line("vgg", "vgg11", 64, outcome={"trt/fp16": "broken"}, errors={"trt/fp16": 0.01})

    def judge(line: Line, results: Path, artifacts: dict[str, float]) -> None:
        line.outcome[next(iter(artifacts))] = after

    monkeypatch.setattr(breadth, "_judge", judge)
    breadth._judge_repair(line, tmp_path, {"trt/fp16": 2e-2})
    assert line.outcome["trt/fp16"] == told
    text = "\n".join(breadth.table([line, Line("dla", way=breadth.WAY)], 98))
    more = ", 1 more after a repair" if after == PASSES else ""
    assert f"- `trt/fp16`: 0 of 2 pass{more}\n" in text
    assert "1 lines with * are of an earlier way" in text
    assert "| vgg* | vgg11 | 64 |" in text
    assert "| dla |" in text
    if after == PASSES:
        assert "| passes after repair, 1e-02: nothing had to be raised" in text


def test_logits_of_an_earlier_run_are_no_result_of_a_repair(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the repair fails, those from before it lie there still."""
    kept = tmp_path / "validate/trt-fp16/logits.npy"
    kept.parent.mkdir(parents=True)
    np.save(kept, np.zeros((1, 10)))
    steps = [
        SimpleNamespace(name="calibration", state=State.FAILED, why="no images"),
        SimpleNamespace(name="validate/trt-fp16", state=State.SKIPPED, why="calibration failed"),
    ]
    monkeypatch.setattr(Run, "read", lambda path: SimpleNamespace(steps=steps))
    line = Line("vgg", "vgg11", 64)
    breadth._judge(line, tmp_path, {"trt/fp16": 2e-2})
    assert line.outcome == {"trt/fp16": "calibration: no images"}


def test_a_repair_has_every_stage_that_it_needs() -> None:
    assert set(STAGES) - set(breadth.STAGES) == {"bench", "report"}


def test_networks_of_a_fixed_size_are_told_another() -> None:
    assert breadth.kwargs_of("test_vit", 64) == {"img_size": 64}
    assert breadth.kwargs_of("test_vit", 160) == {}
    assert breadth.kwargs_of("test_resnet", 64) == {}


def logits() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(16, 10)).astype(np.float32)


def test_a_relative_error_within_the_limit_passes() -> None:
    reference = logits()
    assert breadth.verdict(reference * 1.009, reference, 1e-2) == PASSES
    told = breadth.verdict(reference * 1.02, reference, 1e-2)
    assert told == "validate: relative error 2.0e-02, 1e-02 allowed"


def test_one_image_is_enough_to_fail() -> None:
    reference = logits()
    found = reference.copy()
    found[3] = -found[3]
    assert breadth.verdict(found, reference, 1e-2).startswith("validate: relative error 2.0e+00")
    found[3] = np.nan
    told = breadth.verdict(found, reference, 1e-2)
    assert told == "validate: its logits are not finite"
    assert breadth.verdict(found, reference, 1e-2, "at a layer") == f"{told}: at a layer"


def test_an_image_with_a_clear_margin_keeps_its_class_where_the_error_passes() -> None:
    rng = np.random.default_rng(1)
    reference, limit = logits(), 0.05
    ordered = np.sort(reference, axis=1)
    norms = np.linalg.norm(reference, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 1.5 * limit * norms
    assert 0 < clear.sum() < len(clear)
    for _ in range(200):
        noise = rng.normal(size=reference.shape)
        noise *= (0.999 * limit * norms / np.linalg.norm(noise, axis=1))[:, None]
        found = (reference + noise).astype(np.float32)
        assert breadth.verdict(found, reference, limit) == PASSES
        assert (found.argmax(1) == reference.argmax(1))[clear].all()


def test_lines_are_resumed_and_half_ones_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert breadth.read_lines(path) == []
    first, last = Line("vgg", "vgg11", 64), Line("vgg", "vgg11_bn", 96)
    named = Line("vgg", "vgg13", 64, named=True)
    text = "\n".join(json.dumps(asdict(line)) for line in (first, Line("dla"), last, named))
    path.write_text(f'{text}\n{{"family": "resn')
    assert breadth.read_lines(path) == [last, Line("dla"), named]


def test_a_family_that_has_a_line_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def apart(family: str, seconds: float, name: str | None, limits: dict[str, float]) -> Line:
        assert limits == LIMITS
        ran.append(name or family)
        passes = dict.fromkeys(LIMITS, PASSES), dict.fromkeys(LIMITS, 0.0)
        return Line(
            family, name or "a net", 64, 5, *passes, named=name is not None, way=breadth.WAY
        )

    monkeypatch.setattr(breadth, "apart", apart)
    monkeypatch.setattr(breadth, "warm", lambda: None)
    lines, docs = tmp_path / "lines.jsonl", tmp_path / "breadth.md"

    def run(*arguments: str) -> None:
        command = ["timm_breadth.py", "--lines", str(lines), "--docs", str(docs), *arguments]
        monkeypatch.setattr("sys.argv", command)
        breadth.main()

    run("--only", "vgg", "dla")
    run("--only", "vgg", "dla", "resnet", "--limit", "1")
    assert ran == ["vgg", "dla", "resnet"]
    run("--only", "vgg", "--again")
    assert ran[-1] == "vgg"
    text = docs.read_text()
    assert f"3 of {len(breadth.families())} families were run" in text
    assert "- `trt/fp16`: 3 of 3 pass" in text
    assert "| dla | a net | 64 | passes, 0e+00 |" in text
    run("--names", "vgg13", "dla34")
    run("--names", "vgg13", "dla34", "resnet18")
    assert ran[-3:] == ["vgg13", "dla34", "resnet18"]
    text = docs.read_text()
    assert f"3 of {len(breadth.families())} families were run" in text
    assert "3 of 3 networks were run" in text
    assert "| vgg | vgg13 | 64 | passes, 0e+00 |" in text
    with pytest.raises(SystemExit):
        run("--names", "no_such_network")
    assert "timm has no network no_such_network" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--only", "no_such_family")
    assert "timm has no family no_such_family" in capsys.readouterr().err


def test_a_network_that_stands_for_its_family_is_not_run_again(tmp_path: Path) -> None:
    path, job = tmp_path / "lines.jsonl", breadth._job(None, ["dla34", "vgg13"])
    line = Line("dla", "dla34", outcome=dict.fromkeys(LIMITS, PASSES))
    path.write_text(json.dumps(asdict(line)))
    assert [line.name for line in job.lines(path)] == ["dla34"]


def test_a_process_that_answers_dies_or_hangs_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(family: str, *, name: str | None, limits: dict[str, float]) -> Line:
        assert limits == LIMITS
        if family == "dies":
            os.write(2, b"words\nlast words\n")
            os._exit(3)
        if family == "hangs":
            time.sleep(600)
        return Line(family, name or "smallest")

    monkeypatch.setattr(breadth, "look", look)
    assert breadth.apart("vgg", 600, "vgg13").name == "vgg13"
    why = "its process ended with code 3: last words"
    assert set(breadth.apart("dies", 600).outcome.values()) == {why}
    line = breadth.apart("hangs", 0.1, "vgg13")
    assert set(line.outcome.values()) == {"it took more than 0.1 s"}
    assert (line.family, line.name, line.named) == ("hangs", "vgg13", True)
