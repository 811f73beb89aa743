"""A model in an ONNX Runtime session."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import InputError
from pipeline.core.huge_pages import HugePages
from pipeline.core.machine import cpu_as_seen
from pipeline.core.network import Images, Logits, Pixels
from pipeline.core.runner import DeviceState, PhotoRunner, Runner, Timed
from pipeline.targets.ort.session import Settings, runtime, start


class OrtRunner(Runner):
    """A model in an ONNX Runtime session.

    Args:
        model: An ONNX file with one input and one output.
        settings: How to open it.
        threads: How many threads.
    """

    def __init__(self, model: Path, settings: Settings, threads: int) -> None:
        self._pages = HugePages(wanted=settings.huge_pages)
        self._session: Any = start(model, settings, threads)
        self._input = self._session.get_inputs()[0]
        self._output = self._session.get_outputs()[0].name
        if isinstance(self._input.shape[0], int):
            self.smallest = self.largest = self._input.shape[0]
        self.device = (
            f"ONNX Runtime {runtime().__version__}, {self._session.get_providers()[0]}, "
            f"{threads} {'thread' if threads == 1 else 'threads'}, {cpu_as_seen()}"
        )

    def __call__(self, images: Images) -> Logits:
        """See `Runner.__call__`."""
        return self.timed(images).logits

    def timed(self, images: Images) -> Timed:
        """See `Runner.timed`; what is done for huge pages is no part of a call's time."""
        self._pages.before_call()
        begin = time.perf_counter()
        logits = self._answer(images)
        took = 1e3 * (time.perf_counter() - begin)
        self._pages.after_call(len(images))
        return Timed(logits, {"engine": took})

    def _answer(self, images: Images) -> Logits:
        if self._session is None:
            raise InputError("the runner is closed: open the artifact again")
        self._check(images)
        logits: Logits = self._session.run([self._output], {self._input.name: images})[0]
        return logits

    def device_state(self) -> DeviceState | None:
        """See `Runner.device_state`: memory in huge pages, or why there is none."""
        moved = self._pages.moved
        if moved is None:
            return None
        more = {"no_huge_pages": moved.why} if moved.why else {"huge_pages_bytes": moved.bytes}
        return DeviceState(more=more)

    def _check(self, images: Images) -> None:
        wanted = self._input.shape
        fits = len(images.shape) == len(wanted) and all(
            not isinstance(want, int) or want == have
            for want, have in zip(wanted, images.shape, strict=True)
        )
        if not fits or images.dtype != np.float32 or not len(images):
            shape = ", ".join(str(side) for side in wanted)
            raise InputError(
                f"the model takes float32 images of shape ({shape}), not {images.dtype} of shape "
                f"{images.shape}: preprocess them with the artifact's own preprocessing"
            )

    def close(self) -> None:
        """See `Runner.close`."""
        self._session = None


class OrtPhotoRunner(PhotoRunner):
    """A model that takes decoded photographs, in an ONNX Runtime session.

    Args:
        model: An ONNX file, see `pipeline.graphs.photo`.
        settings: How to open it.
        threads: How many threads.
    """

    def __init__(self, model: Path, settings: Settings, threads: int) -> None:
        self._session: Any = start(model, settings, threads)
        self._input = self._session.get_inputs()[0].name
        self.device = f"ONNX Runtime {runtime().__version__}, {model.name}, {cpu_as_seen()}"

    def __call__(self, photo: Pixels) -> Logits:
        """See `PhotoRunner.__call__`."""
        if self._session is None:
            raise InputError("the runner is closed: open the artifact again")
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
            raise InputError(
                "the model takes a decoded photograph, uint8 (height, width, 3), not "
                f"{photo.dtype} of shape {photo.shape}"
            )
        logits: Logits = self._session.run(None, {self._input: photo})[0]
        return logits

    def close(self) -> None:
        """See `PhotoRunner.close`."""
        self._session = None
