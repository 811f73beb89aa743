"""What is measured while a network is trained, of an epoch and since the last line of the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


class Meters:
    """Sums of an epoch, and of the steps since the last that was logged.

    Attributes:
        seconds: Time that the steps of the epoch took.
        unreadable: Training images of the epoch that could not be read, of this process.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.unreadable = 0
        self._loss, self._steps = 0.0, 0
        self.begin()

    def begin(self) -> None:
        """Start the figures between two lines of the log anew."""
        self._recent_loss, self._recent_steps = 0.0, 0
        self._recent_seconds = self._recent_wait = 0.0
        self._recent_all = 0

    def add(self, loss: float) -> None:
        """The loss of a step that was taken."""
        self._loss, self._steps = self._loss + loss, self._steps + 1
        self._recent_loss, self._recent_steps = self._recent_loss + loss, self._recent_steps + 1

    def waited(self, seconds: float) -> None:
        """A step waited for its images."""
        self._recent_wait += seconds

    def took(self, seconds: float) -> None:
        """A step took so long, waiting included."""
        self.seconds += seconds
        self._recent_seconds += seconds
        self._recent_all += 1

    @property
    def mean(self) -> float:
        """Mean loss of the epoch; NaN before the first step."""
        return self._loss / self._steps if self._steps else math.nan

    @property
    def recent(self) -> float:
        """Mean loss since the last line of the log; NaN without a step."""
        return self._recent_loss / self._recent_steps if self._recent_steps else math.nan

    def figures(self, images_per_step: int, device: torch.device) -> dict[str, float]:
        """Speed since the last line of the log.

        Args:
            images_per_step: Of all processes.
            device: Whose memory is looked at, if it is a GPU.
        """
        seconds = max(self._recent_seconds, 1e-9)
        found = {
            "images_per_second": images_per_step * self._recent_all / seconds,
            "data_wait": self._recent_wait / seconds,
        }
        if device.type == "cuda":
            found["gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        return found

    def state(self) -> dict[str, float | int]:
        """What goes into a checkpoint, so that the logs of a run that goes on are the same."""
        return {
            "seconds": self.seconds,
            "unreadable": self.unreadable,
            "loss": self._loss,
            "steps": self._steps,
            "recent loss": self._recent_loss,
            "recent steps": self._recent_steps,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Meters:
        """The inverse of `state`."""
        meters = cls()
        meters.seconds, meters.unreadable = float(state["seconds"]), int(state["unreadable"])
        meters._loss, meters._steps = float(state["loss"]), int(state["steps"])
        meters._recent_loss = float(state["recent loss"])
        meters._recent_steps = int(state["recent steps"])
        return meters
