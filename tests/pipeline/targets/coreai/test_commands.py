"""Assets through the command line: a whole run, what it withdraws, what is missing or damaged."""

from __future__ import annotations

import dataclasses
import html
import json
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import pipeline.exports
from pipeline.cli import main
from pipeline.report.model import Run
from pipeline.targets.coreai import build, target
from pipeline.targets.coreai.package import MODEL, digest
from pipeline.targets.coreai.results import FORMAT
from pipeline.targets.coreai.runner import APPLE, Bound
from pipeline.targets.coreai.target import INSTALL

from .conftest import needs_coreai

pytestmark = [
    needs_coreai,
    # torch.onnx reads deprecated attributes of its own and of copyreg.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CONFIG = """\
name: trial
model: {name: care_tiny, checkpoint: embedded}
data: {validation: fashion-mnist, calibration: fashion-mnist}
export: {simplify: false}
targets:
  coreai: {precisions: [fp16], runtime_images: 10}
validation: {images: 40}
bench: {samples: 5, warmup: 1, max_seconds: 2}
output: OUTPUT
"""


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def configured(folder: Path) -> str:
    path = folder / "pipeline.yaml"
    path.write_text(CONFIG.replace("OUTPUT", str(folder / "engines")))
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, begin: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("run")
    begin(folder / "engines" / "trial")
    result = invoke("run", configured(folder), "--quiet")
    assert result.exit_code == 0, result.output
    return folder / "engines" / "trial"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> tuple[str, Path]:
    """A configuration, and the folder of its results: a copy to change."""
    shutil.copytree(finished.parent, tmp_path / "engines")
    return configured(tmp_path), tmp_path / "engines" / "trial"


def test_a_run_measures_some_images_and_emulates_all(finished: Path) -> None:
    (artifact,) = Run.read(finished / "results.json").artifacts
    assert (artifact.accuracy.top1.state, artifact.accuracy.top1.samples) == ("emulated", 40)
    assert artifact.numerics is not None
    measured, emulated = artifact.numerics.more[f"{APPLE}, 10 images"]
    assert (measured["state"], measured["images"]) == ("measured", 10)
    assert (emulated["state"], emulated["images"]) == ("emulated", 10)
    assert measured["top1"] == emulated["top1"] > 0.5
    page = html.unescape((finished / "report.html").read_text())
    assert f"{APPLE}, 10 images" in page
    assert "gives the same class for 10 of 10 images" in page


def test_a_run_withdraws_an_emulation_that_apples_runtime_contradicts(
    copied: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = copied
    recipe = build.RECIPES["fp16"]
    strict = dataclasses.replace(recipe.limits, runtime=Bound(0.0, 0.0))
    monkeypatch.setitem(build.RECIPES, "fp16", dataclasses.replace(recipe, limits=strict))
    shutil.rmtree(folder / "validate/coreai-fp16")
    result = invoke("run", config, "--quiet")
    assert result.exit_code == 0, result.output
    (artifact,) = Run.read(folder / "results.json").artifacts
    top1 = artifact.accuracy.top1
    assert (top1.value, top1.state) == (None, "not measured")
    assert re.search(r"was run on 10 images \(top-1 \d+\.00%\), and the executor differs", top1.why)
    assert "(limit 0)" in top1.why
    assert "the executor differs from it" in (folder / "report.html").read_text()


def test_without_the_packages_a_run_says_how_to_get_them(
    copied: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = copied
    shutil.rmtree(folder / "coreai")
    monkeypatch.setattr(target, "find_spec", lambda name: None)
    result = invoke("run", config)
    assert result.exit_code == 4, result.output
    words = " ".join(result.output.split())
    assert f"coreai-core is not installed: {INSTALL}" in words
    assert "Traceback" not in result.output


def test_a_built_asset_without_the_packages(
    copied: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = copied
    monkeypatch.setattr(target, "find_spec", lambda name: None)
    for arguments in (("bench",), ("fitness",)):
        result = invoke(*arguments, "--target", "coreai", "--config", config)
        assert result.exit_code == 4, result.output
        assert INSTALL in " ".join(result.output.split())


@pytest.mark.skipif(platform.system() == "Darwin", reason="there it is measured")
def test_latency_off_a_mac(copied: tuple[str, Path]) -> None:
    config, _ = copied
    bench = ("bench", "--target", "coreai", "--config", config)
    for arguments in (bench, (*bench, "--device", "mac"), (*bench, "--device", "iphone")):
        result = invoke(*arguments)
        assert result.exit_code == 4, result.output
        assert "bench --target coreai --import FILE" in " ".join(result.output.split())
    result = invoke(*bench, "--device", "watch")
    assert result.exit_code == 2
    assert "coreai: mac, iphone, ipad" in " ".join(result.output.split())


def test_a_measurement_from_a_device_reaches_the_report(copied: tuple[str, Path]) -> None:
    config, folder = copied
    golden = {"images": 16, "same_class": 16, "error": 0.001, "mean_error": 0.0, "holds": True}
    run = {"load_ms": [9.0], "first_ms": 2.0, "predict_ms": [1.0, 1.5, 1.25]}
    measured = {
        "format": FORMAT,
        "measured_at": "2026-11-02T03:04:05Z",
        "model": {"name": "trial", "digest": digest(folder / "coreai/fp16" / MODEL)},
        "device": {"model": "iPhone18,1", "os": "iOS 27.0.0"},
        "runs": [
            {**run, "compute_unit": "default", "difference_to_cpu_only": 0.001, "golden": golden},
            {**run, "compute_unit": "neural_engine", "difference_to_cpu_only": 0.04},
        ],
    }
    file = folder.parents[1] / "coreai-bench.json"
    file.write_text(json.dumps(measured))
    bench = ("bench", "--target", "coreai", "--config", config, "--import", str(file))
    result = invoke(*bench, "--device", "ipad")
    assert result.exit_code == 2
    assert "a device of class iphone, where ipad was asked for" in result.output
    result = invoke(*bench, "--device", "iphone")
    assert result.exit_code == 0, result.output
    assert "1.250 ms on iPhone18,1 (default)" in result.output
    assert "its logits are wrong by neural_engine" in " ".join(result.output.split())
    assert invoke("run", config, "--quiet").exit_code == 0
    (artifact,) = Run.read(folder / "results.json").artifacts
    assert (artifact.latency.value, artifact.latency.state) == (1.25, "measured")
    page = (folder / "report.html").read_text()
    assert "Measured on devices" in page
    assert "16 of 16 alike, error 0.001" in page
    measured["model"] = {"name": "other", "digest": "0" * 64}
    file.write_text(json.dumps(measured))
    result = invoke(*bench)
    assert result.exit_code == 2
    assert "is of another model" in result.output


def test_the_swift_package_holds_the_golden_kit_that_its_program_reads(
    finished: Path, tmp_path: Path
) -> None:
    swift = tmp_path / "swift"
    export = ("export", "coreml-bench", "trial", "--output", str(finished.parent))
    result = invoke(*export, "--target", "coreai", "--folder", str(swift))
    assert result.exit_code == 0, result.output
    assert "without a golden kit" not in result.output
    kit = swift / "Sources/CoreAIBench/Resources/golden"
    facts = json.loads((kit / "kit.json").read_text())
    template = Path(pipeline.exports.__path__[0], "templates/CoreAIGoldenKit.swift.txt")
    source = template.read_text()
    # Its words are the keys of the kit, and its files lie there.
    for key in re.findall(r"let (\w+): (?:Int|Double|\[Int\])$", source, re.MULTILINE):
        assert key in facts
    files = re.findall(r'appendingPathComponent\("([^"]+)"\)', source)
    assert sorted(files) == ["inputs.f32", "kit.json", "logits.f32"]
    inputs = np.fromfile(kit / "inputs.f32", "<f4").reshape(facts["input_shape"])
    logits = np.fromfile(kit / "logits.f32", "<f4").reshape(-1, facts["classes"])
    assert inputs.shape[1:] == (3, 64, 64)
    assert len(inputs) == len(logits) == facts["images"]
    # What Swift does with them, by Apple's runtime.
    from pipeline.targets.coreai.runtime import Runtime

    runtime = Runtime(swift / "Sources/CoreAIBench/Resources" / MODEL)
    answers = runtime(inputs[:4])
    runtime.close()
    errors = np.linalg.norm(answers - logits[:4], axis=1) / np.linalg.norm(logits[:4], axis=1)
    assert errors.max() <= facts["tolerance"]


def shorten(asset: Path) -> None:
    content = (asset / "main.mlirb").read_bytes()
    (asset / "main.mlirb").write_bytes(content[:1000])


def flip(asset: Path) -> None:
    content = bytearray((asset / "main.mlirb").read_bytes())
    content[len(content) // 2] ^= 1
    (asset / "main.mlirb").write_bytes(content)


def take(asset: Path) -> None:
    shutil.rmtree(asset)


def foreign(asset: Path) -> None:
    """Another program's asset in its place: whole, but not what was built."""
    (asset / "main.mlirb").write_bytes(b"ML\xefR" + b"\0" * 5000)
    (asset / "metadata.json").write_text('{"assetVersion": "2.0", "producer": "another"}')


DAMAGES: tuple[tuple[Callable[[Path], Any], str], ...] = (
    (shorten, "main.mlirb has 1000 bytes where"),
    (flip, "main.mlirb has changed since it was written"),
    (take, "is missing"),
    (foreign, "main.mlirb has 5004 bytes where"),
)


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damaged_and_foreign_assets_are_refused(
    copied: tuple[str, Path], damage: Callable[[Path], Any], words: str
) -> None:
    config, folder = copied
    damage(folder / "coreai/fp16" / MODEL)
    output = ("--output", str(folder.parent))
    result = invoke("check", "trial", *output)
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())
    for arguments in (
        ("fitness", "--target", "coreai", "--config", config),
        ("export", "coreml-bench", "trial", "--target", "coreai", *output, "--folder", "never"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, result.output
        assert words in " ".join(result.output.split())
        assert "Traceback" not in result.output
    assert not Path("never").exists()
