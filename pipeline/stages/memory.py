"""How much memory an artifact takes: asked of a process that does nothing but run it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core import cpu_classes
from pipeline.core.errors import PipelineError
from pipeline.core.figures import Number, measured_here
from pipeline.core.plain import read_json
from pipeline.stages.own_process import run_worker
from pipeline.steps.facts.bench import Memory

if TYPE_CHECKING:
    from pipeline.steps.artifact import Artifact

WORKER = "pipeline.stages.memory_worker"


def memory_of(target: str, artifact: Artifact, batch: int, threads: int | None) -> Memory:
    """The most memory that a process takes that opens and runs an artifact.

    Args:
        target: Name of the target.
        artifact: What it built.
        batch: Images at a time.
        threads: CPU threads; None for all that are granted.
    """
    from pipeline.stages.memory_worker import FOUND, Found, Job

    cls = cpu_classes.restriction()
    folder = str(artifact.folder.resolve())
    job = Job(target, folder, batch, threads, cls.name if cls else "")
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        place = Path(name)
        (place / "job.json").write_text(json.dumps(job.to_dict()))
        try:
            run_worker(WORKER, str(place / "job.json"), name)
        except PipelineError as error:
            return Memory(Number.not_measured(str(error), unit="bytes"))
        found = Found.from_dict(read_json(place / FOUND), FOUND)
    peak = Number(float(found.peak), measured_here(), unit="bytes", by=found.device)
    return Memory(peak, found.before)
