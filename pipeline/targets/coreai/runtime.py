"""Apple's Core AI runtime: on Linux the one in `coreai-core`, on a Mac the system's own.

On Linux it is a judge, not a measure of speed: it computes an operation at a time and takes 0.1 to
0.6 s for an image of 64 x 64. The runtime is asynchronous; here a call waits for its answer.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.core.errors import ArtifactError
from pipeline.core.network import Images, Logits
from pipeline.targets.coreai.network import IMAGE, LOGITS
from pipeline.targets.coreai.program import MAIN
from pipeline.targets.coreai.quiet import logged

_T = TypeVar("_T")
CPU_ONLY = "cpu_only"
UNITS = ("default", CPU_ONLY, "gpu", "neural_engine")
"""What may be preferred on a Mac."""


class Runtime:
    """An asset opened by Apple's runtime.

    Args:
        package: The asset's folder; it was checked.
        compute_unit: One of `UNITS`; anything but "default" on a Mac only.

    Raises:
        ArtifactError: The runtime does not load it.
    """

    def __init__(self, package: Path, compute_unit: str = "default") -> None:
        # It costs every command of the pipeline 20 ms, and most open no asset.
        import asyncio

        _choose_system()
        self._loop = asyncio.new_event_loop()
        self._opened: Any = None
        try:
            with logged():
                self._function = self._wait(self._load(package, compute_unit))
        # The bindings raise whatever the runtime says, by types of their own.
        except Exception as error:
            self.close()
            reason = str(error).strip().partition("\n")[0]
            raise ArtifactError(f"Core AI does not load {package}: {reason}") from error

    async def _load(self, package: Path, compute_unit: str) -> Any:
        # Before other parts of the package, which import each other in a circle otherwise.
        import coreai.authoring as authoring

        # What is no asset ends the process, a few calls later.
        if not authoring.AIModelAsset.is_valid(package):
            raise ValueError("it is no asset")
        asset = authoring.AIModelAsset.load(package)
        executable = asset.executable(options(compute_unit))
        model = await executable.__aenter__()
        self._opened = executable
        return model.load_function(MAIN)

    def __call__(self, images: Images) -> Logits:
        """Logits of preprocessed images, (batch, classes), one by one."""
        return np.concatenate([self._wait(self._one(image[None])) for image in images])

    def timed(self, image: Images, calls: int) -> list[float]:
        """Time predictions of one image, its way in and out included, as in an app.

        Args:
            image: Preprocessed, (channels, height, width).
            calls: How many.

        Returns:
            Milliseconds of each call.
        """
        return self._wait(self._timed(image[None], calls))

    async def _timed(self, image: Images, calls: int) -> list[float]:
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            await self._one(image)
            times.append(1e3 * (time.perf_counter() - start))
        return times

    async def _one(self, image: Images) -> Logits:
        from coreai.runtime import NDArray

        answer = await self._function({IMAGE: NDArray(np.ascontiguousarray(image))})
        logits: Logits = np.array(answer[LOGITS].numpy(), np.float32)
        return logits

    def _wait(self, call: Coroutine[Any, Any, _T]) -> _T:
        return self._loop.run_until_complete(call)

    def close(self) -> None:
        """Let go of the model. Can be called again."""
        if self._loop.is_closed():
            return
        self._function = None
        if self._opened is not None:
            with logged():
                self._wait(self._opened.__aexit__(None, None, None))
        self._wait(self._loop.shutdown_default_executor())
        self._loop.close()


def _choose_system() -> None:
    """Let the packages take the system's Core AI on a Mac, unless the user chose otherwise.

    The runtime that they bring knows no compute units.
    """
    if platform.system() == "Darwin" and "USE_LOCAL_COREAI" not in os.environ:
        os.environ.setdefault("USE_OS_COREAI", "1")


def has_units() -> bool:
    """Whether compute units can be chosen here, by Apple's own word."""
    _choose_system()
    # Before other parts of the package, which import each other in a circle otherwise.
    import coreai.authoring  # noqa: F401
    from coreai.runtime import SpecializationOptions

    return bool(SpecializationOptions.is_supported())


def options(compute_unit: str) -> Any:
    """Apple's own options for a preference; None for the default, which is all that Linux has."""
    if compute_unit == "default":
        return None
    from coreai.runtime import SpecializationOptions

    if compute_unit == CPU_ONLY:
        return SpecializationOptions.cpu_only()
    from coreai.runtime import ComputeUnitKind

    kind = getattr(ComputeUnitKind, compute_unit)()
    return SpecializationOptions.from_preferred_compute_unit_kind(kind)
