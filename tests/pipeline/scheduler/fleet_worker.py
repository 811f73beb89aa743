"""A worker that knows the toy steps: a preload for Dask's worker, and what its processes run."""

from __future__ import annotations

import sys
from typing import Any

from pipeline.scheduler import worker
from pipeline.steps.artifact import Artifact
from pipeline.store import parcels
from pipeline.store.objects import Objects, object_name
from tests.pipeline.scheduler.fleet_toys import planner, said

worker.PROGRAM = "tests.pipeline.scheduler.fleet_worker"


def lying(real: Any) -> Any:
    """Sends an artifact, and lets other bytes lie under the digest that it reports."""

    def send(objects: Objects, artifact: Artifact) -> parcels.Parcel:
        true: parcels.Parcel = real(objects, artifact)
        record = artifact.files["file"]
        place = object_name(record.sha256 if said("lies") == "file" else true.sha256)
        with objects.files.open(f"{objects.root}/{place}", "r+b") as stream:
            stream.write(b"x")
        return true

    return send


if __name__ == "__main__":
    vars(worker)["planned"] = planner
    vars(worker)["machine_facts"] = lambda targets: {"cpu": {"kind": said("kind")}}
    if said("lies"):
        parcels.send = lying(parcels.send)
    worker.main(sys.argv[1:])
