"""Opens one artifact and runs it, in a process that does nothing else: how much memory that takes.

See `pipeline.stages.memory.memory_of`. What to do and what was found are JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core import cpu_classes, machine
from pipeline.core.errors import UnavailableError
from pipeline.core.plain import Plain, read_json
from pipeline.core.preprocess import Pictures, Preprocess
from pipeline.steps.artifact import Artifact
from pipeline.targets.registry import TARGETS

FOUND = "memory.json"
CALLS = 3
"""A runtime takes memory at the first call, and sometimes at the second."""


@dataclass(frozen=True)
class Job(Plain):
    """What to run.

    Attributes:
        target: The target.
        artifact: Folder of the artifact.
        batch: Images at a time.
        threads: CPU threads; None for all that are granted.
        cpu_class: Name of the class of CPUs that the runtime sees; "" for the CPU as it is.
    """

    target: str
    artifact: str
    batch: int
    threads: int | None
    cpu_class: str = ""


@dataclass(frozen=True)
class Found(Plain):
    """What it took.

    Attributes:
        device: What ran it.
        before: The most bytes that the process had before it opened the artifact.
        peak: The same at the end.
    """

    device: str
    before: int
    peak: int


def work(job: Job) -> Found:
    """Run the artifact on noise, and look at this process.

    Raises:
        UnavailableError: It does not run here, or the system does not tell.
    """
    target, artifact = TARGETS[job.target], Artifact.read(Path(job.artifact))
    if job.cpu_class:
        target.restrict(cpu_classes.named(job.cpu_class))
    if why := target.missing(artifact):  # loads the runtime
        raise UnavailableError(why)
    network = artifact.network()
    depth, height, width = network.input_shape
    shape = (job.batch, height, width, depth)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pictures = Pictures(noise, Preprocess.from_dict(network.preprocess))
    before = machine.peak_memory()
    with target.open(artifact, threads=job.threads) as runner:
        images = runner.input_of(pictures)
        for _ in range(CALLS):
            runner(images)
        peak = machine.peak_memory()
    if before is None or peak is None:
        raise UnavailableError("this system does not tell how much memory a process had")
    return Found(runner.device, before, peak)


def main(arguments: list[str]) -> None:
    """Read the job, do it, and write down what was found."""
    job, folder = map(Path, arguments)
    found = work(Job.from_dict(read_json(job), str(job)))
    (folder / FOUND).write_text(json.dumps(found.to_dict()))
