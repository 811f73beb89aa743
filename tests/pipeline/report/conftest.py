from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import Config, load
from pipeline.core import timing
from pipeline.core.errors import BuildError, GateFailedError
from pipeline.core.figures import Latency, Number, State
from pipeline.report.results import collect
from pipeline.scheduler.execute import Outcome
from pipeline.stages.bench import headline
from pipeline.stages.validate import NAMES, accuracy, closeness
from pipeline.steps import artifact
from pipeline.steps.step import StageResult
from pipeline.steps.step import State as StepState

CONFIG = """
name: care_tiny
output: {output}
model: {{name: care_tiny, checkpoint: embedded}}
data: {{validation: fashion-mnist, calibration: fashion-mnist}}
targets:
  trt: {{precisions: [fp16, int8]}}
  ort: {{precisions: [fp32, int8]}}
  coreml: {{precisions: [fp16, mixed]}}
"""
NO_GPU = "no NVIDIA GPU was found: run the same command on a machine that has one"
NO_MAC = "Core ML predictions need macOS 13 or newer: run the same command on a Mac"
IMAGES, CLASSES = 600, 10


class Maker:
    """Writes artifacts as the stages do, with figures of seeded noise."""

    def __init__(self, config: Config) -> None:
        self.config = config
        rng = np.random.default_rng(7)
        self.labels = rng.integers(0, CLASSES, IMAGES)
        self.logits = rng.normal(size=(IMAGES, CLASSES)).astype(np.float32)
        self.logits[np.arange(IMAGES), self.labels] += 3
        self.rng = rng

    def make(
        self, name: str, facts: Mapping[str, Any], *made_from: str, size: int = 20_000
    ) -> artifact.Artifact:
        def build(folder: Path) -> Mapping[str, Any]:
            (folder / "model.bin").write_bytes(name.encode() * (size // len(name)))
            return facts

        digests = {"checkpoint": "c0ffee" * 10 + "dead"} if not made_from else {}
        for other in made_from:
            digests[other] = artifact.Artifact.read(self.config.folder / other).digest
        return artifact.make(
            self.config.folder / name,
            kind="build",
            name=name,
            key="0" * 64,
            made_from=digests,
            tools={"some-builder": "1.2.3"},
            build=build,
        )

    def validated(
        self, name: str, noise: float, state: State, by: str, why: str, notes: Mapping[str, Any]
    ) -> None:
        moved = self.logits + self.rng.normal(size=self.logits.shape).astype(np.float32) * noise
        numbers = accuracy(moved, self.labels, state, by, why)
        numbers |= closeness(moved, self.logits, self.labels, numbers["top1"])
        plain = {key: number.to_dict() for key, number in numbers.items()}
        self.make(f"validate/{name}", {"numbers": plain, "notes": dict(notes)})

    def not_validated(self, name: str, why: str) -> None:
        numbers = {key: Number.not_measured(why).to_dict() for key in NAMES}
        self.make(f"validate/{name}", {"numbers": numbers})

    def benched(self, target: str, medians: Mapping[str, float], samples: int) -> None:
        names = [name for name in medians if name != "pytorch"]
        batches = {}
        for batch in (1, 8):
            timed = {
                name: {timing.ENGINE: Latency(tuple(self._times(batch * median, samples)))}
                for name, median in medians.items()
            }
            batches[str(batch)] = {
                "phases": {name: timing.plain(phases) for name, phases in timed.items()},
                "baseline": names[0],
                "ratio_to_baseline": _plain(timing.ratios(timed, names[0])),
                "ratio_to_pytorch": _plain(timing.ratios(timed, "pytorch")),
                "samples_ms": {n: list(p[timing.ENGINE].samples) for n, p in timed.items()},
            }
        whole = {n: Latency(tuple(self._times(m + 2, 80))).to_dict() for n, m in medians.items()}
        facts: dict[str, Any] = {
            "target": target,
            "protocol": dataclasses.asdict(timing.Protocol(20, samples, 8.0)),
            "machine": {"cpu": "Test CPU", "cpus_granted": 2},
            "load_before": 0.2,
            "date": "2026-01-02",
            "batches": batches,
            "end_to_end": whole,
            "cold_start_ms": {name: 40.0 + i for i, name in enumerate(names)},
            "devices": dict.fromkeys(medians, "Test runtime 1.0, 2 threads, Test CPU"),
        }
        facts["latency"] = {name: headline(facts, name).to_dict() for name in names}
        self.make(f"bench/{target}", facts)

    def _times(self, median: float, count: int) -> list[float]:
        return [float(value) for value in median * self.rng.lognormal(0, 0.08, count)]

    def not_benched(self, target: str, why: str) -> None:
        latency = {
            precision: Number.not_measured(why, unit="ms").to_dict()
            for precision in self.config.precisions(target)
        }
        self.make(f"bench/{target}", {"target": target, "latency": latency})


def _plain(ratios: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dataclasses.asdict(value) for name, value in ratios.items()}


def _graphs(make: Maker, classes: int) -> None:
    network = {
        "labels": [f"class {i}" for i in range(classes)],
        "input_shape": [1, 28, 28],
        "preprocess": {"size": 28, "mean": [0.286], "std": [0.353]},
    }
    export = {"nodes": 240, "opset": 20, "difference_to_pytorch": 3e-7, "network": network}
    make.make("export", export)
    simplified = {"simplified": True, "why_not": "", "nodes_before": 240, "nodes": 198}
    make.make("onnx", {**simplified, "network": network}, "export")
    warning = "the class 'bag' has 3 images less than the others"
    make.make("calibration", {"images": 512, "digest": "ab" * 32, "warnings": [warning]})
    make.make("precision/float16", {"casts": 2, "network": network}, "onnx")
    layers = {"computing": 90, "by_kind": {"CONVOLUTION": 60, "MATRIX_MULTIPLY": 30}}
    for precision in ("fp16", "int8"):
        make.make(
            f"trt/{precision}",
            {"network": layers, "engine_bytes": 1_900_000, "warnings": ["an int64 was clamped"]},
            "precision/float16",
            size=1_900_000,
        )
    passes = [{"name": "attention", "nodes_before": 198, "nodes_after": 150}]
    make.make("ort/fp32", {"passes": passes, "fallback": False}, "onnx", size=3_100_000)
    make.make("ort/int8", {"passes": passes, "fallback": False}, "onnx", size=1_000_000)
    make.make("coreml/fp16", {"operations": {"conv": 60, "add": 20}}, size=1_700_000)


def _run(folder: Path, classes: int = CLASSES) -> dict[str, Any]:
    """Results of a run in which everything occurs that can: also a failure and a gate."""
    path = folder / "pipeline.yaml"
    path.write_text(CONFIG.format(output=folder / "engines"))
    config = load(path)
    make = Maker(config)
    _graphs(make, classes)
    top = accuracy(make.logits, make.labels, State.MEASURED, "PyTorch 2, float32, CPU", "")
    numbers = {key: number.to_dict() for key, number in top.items()}
    make.make("validate/pytorch", {"numbers": numbers})
    strict = "emulated: strict ONNX executor"
    blocks = [{"block": "stage 1", "headroom": 0.8}]
    overflows = {"headroom": 0.8, "overflowed": 3, "blocks": blocks}
    make.validated("trt-fp16", 0.05, State.EMULATED, strict, NO_GPU, overflows)
    make.validated("trt-int8", 0.4, State.EMULATED, strict, NO_GPU, {"headroom": 31.0})
    make.validated("ort-fp32", 0.0, State.MEASURED, "ONNX Runtime 1, 2 threads", "", {})
    make.validated("ort-int8", 0.4, State.MEASURED, "ONNX Runtime 1, 2 threads", "", {})
    make.not_validated("coreml-fp16", NO_MAC)
    make.benched("ort", {"fp32": 1.0, "int8": 0.6, "pytorch": 3.0}, samples=100)
    make.not_benched("trt", NO_GPU)
    make.not_benched("coreml", NO_MAC)
    error = BuildError("coremltools refuses the operation 'erf' in blocks.1.mlp")
    skipped = ("validate", "validate/coreml-mixed", StepState.SKIPPED, "coreml/mixed failed")
    outcome = Outcome(
        [
            StageResult("build", "ort/fp32", StepState.DONE, "not built yet", 2.0),
            StageResult("build", "coreml/mixed", StepState.FAILED, str(error), 1.0, error),
            StageResult(*skipped),
        ],
        [GateFailedError("ort/int8: agreement is 0.95, min_agreement allows 0.97 (measured)")],
    )
    results = collect(config, Path("configs/my run.yaml"), outcome)
    results["date"] = "2026-01-02 03:04"
    return results


@pytest.fixture(scope="session")
def _full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(tmp_path_factory.mktemp("full"))


@pytest.fixture
def results(_full: dict[str, Any]) -> dict[str, Any]:
    """Measured, emulated, not measured, failed: one run with all of them."""
    return copy.deepcopy(_full)


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of a network with 1000 classes."""
    return _run(tmp_path_factory.mktemp("imagenet"), classes=1000)


@pytest.fixture
def nothing(tmp_path: Path) -> dict[str, Any]:
    """Results of a run whose very first step failed."""
    path = tmp_path / "pipeline.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "engines"))
    error = BuildError("care_tiny does not export to ONNX: no memory")
    outcome = Outcome([StageResult("export", "export", StepState.FAILED, str(error), 0.1, error)])
    return collect(load(path), path, outcome)
