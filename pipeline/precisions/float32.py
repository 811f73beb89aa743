"""float32: the graph as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.artifact import write_atomically
from pipeline.errors import BuildError
from pipeline.precisions.base import Form, FormJob


class Float32(Form):
    """The source graph, byte for byte."""

    name = "float32"

    def versions(self) -> dict[str, str]:
        """What decides the result: see `Form`."""
        return {}

    def convert(self, job: FormJob, destination: Path) -> dict[str, Any]:
        """Copy the source. See `Form`."""
        try:
            content = job.source.read_bytes()
        except OSError as error:
            raise BuildError(
                f"cannot read the graph {job.source}: {error.strerror or error}; run the export "
                "stage again"
            ) from error
        write_atomically(destination, content)
        return {}
