"""Processes of a test that begin clean, without each one loading PyTorch anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests import forked

_PATIENCE_S = 300.0


def run_apart(function: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> list[int]:
    """Call a function once for each tuple of arguments, side by side; returns the exit codes.

    See `forked`.
    """
    context = forked.context()
    processes = [context.Process(target=function, args=arguments) for arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_PATIENCE_S)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert None not in codes, "a process hangs"
    return [code for code in codes if code is not None]
