"""Which networks of timm come through: what stands for a family, how it is judged, what is kept."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm_breadth as breadth
from timm_breadth import LIMITS, PASSES, Line


def test_the_smallest_classifier_stands_for_its_family() -> None:
    sizes = breadth.members("starnet")
    assert sizes == sorted(sizes)
    assert sizes[0][1] == "starnet_s050"
    assert "resnet" in breadth.families()
    made = timm.create_model("starnet_s050", num_classes=breadth.CLASSES)
    assert sizes[0][0] == sum(p.numel() for p in made.parameters())
    assert breadth.family_of("levit_128s") == "levit"


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 64), ("test_vit", 64)])
def test_the_smallest_size_that_a_network_takes_is_its_own(name: str, size: int) -> None:
    assert breadth.smallest_size(name) == size


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

    def apart(family: str, seconds: float, name: str | None = None) -> Line:
        ran.append(name or family)
        passes = dict.fromkeys(LIMITS, PASSES), dict.fromkeys(LIMITS, 0.0)
        return Line(family, name or "a net", 64, 5, *passes, named=name is not None)

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
    path.write_text(json.dumps(asdict(Line("dla", "dla34"))))
    assert [line.name for line in job.lines(path)] == ["dla34"]


def test_a_process_that_answers_dies_or_hangs_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(family: str, *, name: str | None = None) -> Line:
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
