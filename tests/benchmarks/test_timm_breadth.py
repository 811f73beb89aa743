"""Which networks of timm come through: what stands for a family, how it is judged, what is kept."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm_breadth as breadth
from timm_breadth import LIMITS, PASSES, Line


def test_the_smallest_classifier_stands_for_its_family() -> None:
    sizes = breadth.members("starnet")
    assert sizes == sorted(sizes)
    assert sizes[0][1] == "starnet_s050"
    assert "resnet" in breadth.families()


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
    assert breadth.verdict(found, reference, 1e-2) == "validate: its logits are not finite"


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
    assert breadth.read_lines(path) == {}
    first, last = Line("vgg", "vgg11", 64), Line("vgg", "vgg11_bn", 96)
    text = "\n".join(json.dumps(asdict(line)) for line in (first, Line("dla"), last))
    path.write_text(f'{text}\n{{"family": "resn')
    assert breadth.read_lines(path) == {"vgg": last, "dla": Line("dla")}


def test_a_family_that_has_a_line_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def apart(family: str, seconds: float) -> Line:
        ran.append(family)
        return Line(family, "a net", 64, 5, dict.fromkeys(LIMITS, PASSES), dict.fromkeys(LIMITS, 0))

    monkeypatch.setattr(breadth, "apart", apart)
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
    with pytest.raises(SystemExit):
        run("--only", "no_such_family")
    assert "timm has no family no_such_family" in capsys.readouterr().err


def test_a_process_that_dies_or_hangs_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, -9, "", "words\nKilled")

    def hangs(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, more["timeout"])

    monkeypatch.setattr(subprocess, "run", dies)
    assert set(breadth.apart("vgg", 5).outcome.values()) == {
        "its process ended with code -9: Killed"
    }
    monkeypatch.setattr(subprocess, "run", hangs)
    assert set(breadth.apart("vgg", 5).outcome.values()) == {"it took more than 5 s"}
