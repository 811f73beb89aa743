"""Runs artifacts in a process that sees a CPU of another class, and writes down what they did.

A process cannot leave a class, so that each has one of its own, see
`pipeline.stages.own_process.run_worker`. What to do and the figures are JSON; the logits of every
precision lie beside the figures, (images, classes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.core import cpu_classes, machine, timing
from pipeline.core.answers import Answers, Drawing
from pipeline.core.cpu_classes import Purpose
from pipeline.core.network import Logits, in_batches
from pipeline.core.plain import Plain, read_json
from pipeline.core.runner import Runner
from pipeline.stages.drawn import draw
from pipeline.stages.images import batches
from pipeline.steps.artifact import Artifact
from pipeline.targets.registry import TARGETS

FIGURES = "figures.json"


@dataclass(frozen=True)
class Job(Plain):
    """What to run.

    Attributes:
        cpu_class: Name of the class.
        target: The target.
        artifacts: Folder by precision.
        samples: Folder of the validation images.
        batch: Images at a time when accuracy is judged.
        threads: CPU threads; None for all that are granted.
        protocol: How to measure latency.
        purpose: What is to be found out: answers over all samples, times, or both.
    """

    cpu_class: str
    target: str
    artifacts: Mapping[str, str]
    samples: str
    batch: int
    threads: int | None
    protocol: timing.Protocol
    purpose: Purpose = Purpose.BOTH


@dataclass(frozen=True)
class Figures(Plain):
    """What was measured.

    Attributes:
        devices: What ran each precision.
        busy: CPUs that others kept busy before or meanwhile.
        samples_ms: By precision, every timed call of one interleaved run at batch 1; none where
            answers alone were wanted.
        answers: By precision, whether timed calls answered as they had for all images; none where
            not both were wanted.
    """

    devices: Mapping[str, str]
    busy: float = 0.0
    samples_ms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    answers: Mapping[str, Answers] = field(default_factory=dict)


def work(job: Job, folder: Path) -> None:
    """Enter the class, run every artifact over the samples, then time them in turns, as asked.

    Raises:
        UnavailableError: The class cannot be entered here.
    """
    target = TARGETS[job.target]
    target.restrict(cpu_classes.named(job.cpu_class), job.purpose)
    samples = Artifact.read(Path(job.samples))
    with ExitStack() as stack:
        runners = {
            precision: stack.enter_context(
                target.open(Artifact.read(Path(place)), threads=job.threads)
            )
            for precision, place in job.artifacts.items()
        }
        judged: dict[str, Logits] = {}
        if job.purpose is not Purpose.TIMES:
            for precision, runner in runners.items():
                judged[precision] = _logits(runner, samples, job.batch)
                np.save(folder / f"{precision}.npy", judged[precision])
        if job.purpose is Purpose.ANSWERS:
            figures = Figures({precision: runner.device for precision, runner in runners.items()})
        else:
            figures = _timed(runners, samples, job.protocol, judged)
    (folder / FIGURES).write_text(json.dumps(figures.to_dict()))


def _timed(
    runners: Mapping[str, Runner],
    samples: Artifact,
    protocol: timing.Protocol,
    judged: Mapping[str, Logits],
) -> Figures:
    """Time runners in turns, on distinct images, whose answers are held against those judged."""
    busy, watch = machine.load(), machine.Watch()
    size = max(runner.smallest for runner in runners.values())
    drawn = draw(samples, judged)
    drawings = {name: Drawing() for name in runners}

    def hear(name: str, batch: int, logits: Logits) -> None:
        drawings[name].hear(batch, logits)

    timed = timing.interleaved(runners, drawn.batches(size), protocol, hear=hear)
    return Figures(
        devices={precision: runner.device for precision, runner in runners.items()},
        busy=max(busy, watch.others()),
        samples_ms={name: by[timing.ENGINE].samples for name, by in timed.items()},
        answers={name: drawn.compare(name, size, drawings[name]) for name in judged},
    )


def _logits(runner: Runner, samples: Artifact, batch: int) -> Logits:
    size = max(runner.smallest, min(batch, runner.largest or batch))
    parts = [
        in_batches(runner, runner.input_of(pictures), size, runner.smallest)
        for pictures in batches(samples, size)
    ]
    return np.concatenate(parts)


def main(arguments: list[str]) -> None:
    """Read the job, and do it."""
    job, folder = map(Path, arguments)
    work(Job.from_dict(read_json(job), str(job)), folder)
