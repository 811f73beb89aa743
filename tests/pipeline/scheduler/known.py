"""Imported by the server that processes are forked from: it has read the code of toy steps then."""

from __future__ import annotations

from pathlib import Path

from tests.pipeline.scheduler import test_audit, test_cuts, toys
from tests.pipeline.scheduler.toys import Settings, context_of

for _steps_of in (toys.steps_of, test_cuts.steps_of, test_audit.steps_of):
    for _step in _steps_of(context_of(Settings(Path("nowhere", "run")))):
        _step.code()
