"""The two libraries: what is installed, how they are loaded, and what can be checked of an engine.

What they have in common, and where they part when they build, is in `builder.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import ArtifactError, UnavailableError
from pipeline.targets.tensorrt import builder
from pipeline.targets.tensorrt.builder import FULL as FULL
from pipeline.targets.tensorrt.builder import RTX as RTX
from pipeline.targets.tensorrt.builder import Library as Library

Choice = Literal["auto", "rtx", "tensorrt"]

_DISTRIBUTIONS = {
    RTX: ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    FULL: ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
}

INSTALL = {
    RTX: "pip install tensorrt-rtx-cu13",
    FULL: "pip install tensorrt-cu13",
}


def installed(name: str) -> str | None:
    """Version of a library, without importing it; None if it is not installed."""
    if importlib.util.find_spec(name) is None:
        return None
    for distribution in _DISTRIBUTIONS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    # Installed without metadata, as some system packages are: ask the module.
    return str(importlib.import_module(name).__version__)


def cuda_major(name: str) -> int:
    """Major CUDA version for which an installed library was made."""
    for distribution in _DISTRIBUTIONS[name]:
        try:
            metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        if "-cu" in distribution:
            return int(distribution.rpartition("-cu")[2])
    return 13


def load(name: str) -> Library:
    """Import one of the two libraries.

    Raises:
        UnavailableError: It is not installed, or its shared libraries do not load.
    """
    try:
        return builder.load(name)
    except ImportError as error:
        raise UnavailableError(f"cannot import {name}: {error}; {INSTALL[name]}") from error
    except (OSError, RuntimeError) as error:  # its wheels load shared libraries on import
        raise does_not_load(name, error) from error


def does_not_load(name: str, reason: object) -> UnavailableError:
    """The error about a library that is installed but damaged."""
    return UnavailableError(
        f"{name} is installed but does not load: {reason}; reinstall it ({INSTALL[name]})"
    )


def refuse_malformed(library: Library, logger: Any, engine: bytes, path: Path) -> bool:
    """Check what can be checked of an engine without a GPU: the header.

    Returns:
        Whether there was a check: only TensorRT-RTX has one.

    Raises:
        ArtifactError: It is no engine of this library and version.
    """
    runtime = library.module.Runtime(logger)
    if not hasattr(runtime, "get_engine_validity"):
        return False
    _, problems = runtime.get_engine_validity(engine)
    kinds = library.module.EngineInvalidityDiagnostics
    for kind, words in (
        (kinds.MALFORMED_ENGINE, "is damaged or no engine of this library"),
        (kinds.VERSION_MISMATCH, "was built by another version"),
    ):
        if int(problems) & int(kind):
            raise ArtifactError(f"{path} {words} ({library.title}): build it again")
    return True
