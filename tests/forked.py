"""Processes that begin clean, without each one loading what they need anew."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_LOADED = (
    "care.train",
    "torch.distributed",
    "tests.pipeline.scheduler.known",
)
"""One list for all tests: the first that asks starts the server, and what it loads is settled."""


def context() -> ForkServerContext:
    """Processes are forked from one server, which has loaded packages and done nothing else."""
    made: ForkServerContext = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(_LOADED))
    return made
