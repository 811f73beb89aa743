"""Results' folders as the stages leave them, with figures of seeded noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Config, load
from pipeline.core import timing
from pipeline.core.figures import Latency, Number, State
from pipeline.core.machine import Machine
from pipeline.core.network import Network
from pipeline.core.plain import Facts
from pipeline.core.runner import Numerics
from pipeline.report.model import Run
from pipeline.scheduler.execute import Outcome
from pipeline.stages.bench import batch_latency
from pipeline.stages.validate import accuracy, judge
from pipeline.steps import artifact
from pipeline.steps.facts.accuracy import Accuracy, ReferenceFacts, ValidationFacts
from pipeline.steps.facts.bench import BatchLatency, BenchFacts, EndToEnd, Measured
from pipeline.steps.facts.graphs import BuildFacts, CalibrationFacts, ExportFacts, SimplifyFacts
from pipeline.steps.step import StageResult
from pipeline.steps.step import State as StepState

CONFIG = """
name: care_tiny
output: {output}
model: {{name: care_tiny, checkpoint: embedded}}
data: {{validation: fashion-mnist, calibration: fashion-mnist}}
validation: {{gates: {{min_agreement: 0.97}}}}
targets:
  trt: {{precisions: [fp16, int8]}}
  ort: {{precisions: [fp32, int8]}}
  coreml: {{precisions: [fp16, mixed]}}
"""
NO_GPU = "no NVIDIA GPU was found: run the same command on a machine that has one"
NO_MAC = "Core ML predictions need macOS 13 or newer: run the same command on a Mac"
IMAGES, CLASSES = 600, 10
NAMES = ("trt/fp16", "trt/int8", "ort/fp32", "ort/int8", "coreml/fp16", "coreml/mixed")
STEPS = (
    "export",
    "onnx",
    "calibration",
    "precision/float16",
    *NAMES,
    "validate/pytorch",
    *(f"validate/{name.replace('/', '-')}" for name in NAMES),
    "bench/trt",
    "bench/ort",
    "bench/coreml",
)


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
        self,
        name: str,
        facts: Facts | Mapping[str, Any],
        *made_from: str,
        size: int = 20_000,
        seconds: float | None = None,
    ) -> artifact.Artifact:
        def build(folder: Path) -> Mapping[str, Any]:
            (folder / "model.bin").write_bytes(name.encode() * (size // len(name)))
            return facts.to_facts() if isinstance(facts, Facts) else facts

        digests = {"checkpoint": "c0ffee" * 10 + "dead"} if not made_from else {}
        sources = [artifact.Artifact.read(self.config.folder / other) for other in made_from]
        digests |= {source.name: source.digest for source in sources}
        return artifact.make(
            self.config.folder / name,
            kind="build",
            name=name,
            key="0" * 64,
            made_from=digests,
            tools={"some-builder": "1.2.3"},
            build=build,
            seals={source.name: source.seal for source in sources},
            beside={"seconds": seconds},
        )

    def reference(self) -> None:
        by = "PyTorch 2, float32, CPU"
        top1, top5 = accuracy(self.logits, self.labels, State.MEASURED, by, "")
        self.make("validate/pytorch", ReferenceFacts(Accuracy(top1, top5)))

    def validated(
        self, name: str, noise: float, state: State, by: str, why: str, numerics: Numerics | None
    ) -> None:
        moved = self.logits + self.rng.normal(size=self.logits.shape).astype(np.float32) * noise
        numbers = judge(moved, self.logits, self.labels, state, by, why)
        self._validation(name, numbers, numerics)

    def not_validated(self, name: str, why: str) -> None:
        self._validation(name, Accuracy.not_measured(why), None)

    def _validation(self, name: str, numbers: Accuracy, numerics: Numerics | None) -> None:
        target, precision = name.split("/")
        facts = ValidationFacts(target, precision, numbers, numerics)
        self.make(f"validate/{target}-{precision}", facts, name)

    def benched(
        self,
        target: str,
        medians: Mapping[str, float],
        samples: int,
        batches: tuple[int, ...] = (1, 8),
    ) -> None:
        names = [name for name in medians if name != "pytorch"]
        timed = {batch: self._batch(medians, samples, batch, names[0]) for batch in batches}
        whole = {n: Latency(tuple(self._times(m + 2, 80))).summary() for n, m in medians.items()}
        measured = Measured(
            protocol=timing.Protocol(20, samples, 8.0),
            machine=Machine("Test CPU", 2, "Test OS"),
            load_before=0.2,
            date="2026-01-02",
            batches=timed,
            end_to_end=EndToEnd(min(batches), whole),
            cold_start_ms={name: 40.0 + i for i, name in enumerate(names)},
            throughput={},
            device_state={},
            devices=dict.fromkeys(medians, "Test runtime 1.0, 2 threads, Test CPU"),
        )
        latency = {name: measured.headline(name) for name in names}
        builds = [f"{target}/{name}" for name in names]
        self.make(f"bench/{target}", BenchFacts(target, latency, measured), *builds)

    def _batch(
        self, medians: Mapping[str, float], samples: int, batch: int, baseline: str
    ) -> BatchLatency:
        timed = {
            name: {timing.ENGINE: Latency(tuple(self._times(batch * median, samples)))}
            for name, median in medians.items()
        }
        return batch_latency(timed, baseline)

    def _times(self, median: float, count: int) -> list[float]:
        return [float(value) for value in median * self.rng.lognormal(0, 0.08, count)]

    def not_benched(self, target: str, why: str) -> None:
        precisions = self.config.precisions(target)
        latency = {name: Number.not_measured(why, unit="ms") for name in precisions}
        self.make(f"bench/{target}", BenchFacts(target, latency))


def _graphs(make: Maker, classes: int) -> None:
    network = Network(
        "care_tiny",
        tuple(f"class {i}" for i in range(classes)),
        (1, 28, 28),
        {"size": 28, "mean": [0.286], "std": [0.353]},
    )
    make.make("export", ExportFacts(240, 20, 3e-7, network))
    make.make("onnx", SimplifyFacts(True, "", 240, 198, network), "export")
    warning = "the class 'bag' has 3 images less than the others"
    make.make("calibration", CalibrationFacts(512, "ab" * 32, (warning,)))
    make.make("precision/float16", {"casts": 2, "network": network.to_dict()}, "onnx")
    layers = {"computing": 90, "by_kind": {"CONVOLUTION": 60, "MATRIX_MULTIPLY": 30}}
    engine = {"layers": layers, "engine_bytes": 1_900_000}
    for precision in ("fp16", "int8"):
        facts = BuildFacts("trt", precision, ("an int64 was clamped",), more=engine)
        make.make(f"trt/{precision}", facts, "precision/float16", size=1_900_000)
    passes = [{"name": "attention", "nodes_before": 198, "nodes_after": 150}]
    for precision, size in (("fp32", 3_100_000), ("int8", 1_000_000)):
        facts = BuildFacts("ort", precision, more={"passes": passes, "fallback": False})
        make.make(f"ort/{precision}", facts, "onnx", size=size)
    operations = {"operations": {"conv": 60, "add": 20}}
    make.make("coreml/fp16", BuildFacts("coreml", "fp16", more=operations), size=1_700_000)


def configured(folder: Path, gates: str = "min_agreement: 0.97") -> Config:
    """The configuration, with results below a folder."""
    path = folder / "pipeline.yaml"
    text = CONFIG.format(output=folder / "engines")
    path.write_text(text.replace("min_agreement: 0.97", gates))
    return load(path)


def fill(config: Config, classes: int = CLASSES) -> Maker:
    """Artifacts in which everything occurs that can: measured, emulated, not measured, missing."""
    make = Maker(config)
    _graphs(make, classes)
    make.reference()
    strict = "emulated: strict ONNX executor"
    blocks = [{"block": "stage 1", "headroom": 0.8}]
    overflow = Numerics(3, ("stage 1: Mul x",), {"headroom": 0.8, "blocks": blocks})
    quiet = Numerics(more={"headroom": 31.0})
    make.validated("trt/fp16", 0.05, State.EMULATED, strict, NO_GPU, overflow)
    make.validated("trt/int8", 0.4, State.EMULATED, strict, NO_GPU, quiet)
    make.validated("ort/fp32", 0.0, State.MEASURED, "ONNX Runtime 1, 2 threads", "", None)
    make.validated("ort/int8", 0.4, State.MEASURED, "ONNX Runtime 1, 2 threads", "", None)
    make.not_validated("coreml/fp16", NO_MAC)
    make.benched("ort", {"fp32": 1.0, "int8": 0.6, "pytorch": 3.0}, samples=100)
    make.not_benched("trt", NO_GPU)
    make.not_benched("coreml", NO_MAC)
    return make


def ended(*selected: str) -> Outcome:
    """How a run ended that found these steps up to date; the others were not selected."""
    return Outcome(
        [StageResult("some stage", name, StepState.UP_TO_DATE) for name in selected],
        [name for name in STEPS if name not in selected],
    )


Partial = Callable[..., Run]
"""Reports a run of some steps: (*steps, there=whether earlier artifacts lie there, gates=)."""
