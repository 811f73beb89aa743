"""What Core ML and Core AI share: parts of a result file, and what a Mac says of itself."""

from __future__ import annotations

import platform
import re
import subprocess
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Thermal = Literal["nominal", "fair", "serious", "critical", "unknown"]


class Part(BaseModel):
    """A part of a result file: what it does not know is refused, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Golden(Part):
    """What a device gave for the images of the golden kit, against the artifact's own logits.

    An error is the norm of the difference of an image's logits, relative to that of the expected
    ones; null where one is not finite.
    """

    images: int = Field(gt=0, description="Images of the kit.")
    same_class: int = Field(ge=0, description="Images with the expected class.")
    error: float | None = Field(default=None, ge=0, description="Largest of an image.")
    mean_error: float | None = Field(default=None, ge=0, description="Mean over the images.")
    holds: bool = Field(description="Both are within the kit's tolerances.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.same_class > self.images:
            raise ValueError(f"{self.same_class} of {self.images} images is no share")
        if self.holds and (self.error is None or self.mean_error is None):
            raise ValueError("logits that are not finite do not hold")
        return self

    @property
    def words(self) -> str:
        """The verdict, for people."""
        error = "not finite" if self.error is None else f"error {self.error:.2g}"
        verdict = "" if self.holds else "FAILS: "
        return f"{verdict}{self.same_class} of {self.images} alike, {error}"


def mac_model() -> str:
    """This Mac's identifier, such as "Mac14,7"; the processor's kind where it tells none."""
    try:
        return _output("sysctl", "-n", "hw.model").strip() or platform.machine()
    except (OSError, subprocess.SubprocessError):
        return platform.machine()


def thermal_state() -> Thermal:
    """How hot this Mac is, as far as `pmset` tells: it names limits, not temperatures."""
    try:
        text = _output("pmset", "-g", "therm")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    speed = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", text)
    if speed is not None:
        return "nominal" if int(speed[1]) >= 100 else "serious"
    # Macs with Apple's own chips record warnings only.
    return "nominal" if "No thermal warning level" in text else "unknown"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
