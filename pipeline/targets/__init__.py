"""The deployment targets, by name."""

from __future__ import annotations

from pipeline.targets.base import Target
from pipeline.targets.coreml import CoreMLTarget
from pipeline.targets.ort import OrtTarget
from pipeline.targets.trt import TrtTarget

TARGETS: dict[str, Target] = {
    target.name: target for target in (TrtTarget(), OrtTarget(), CoreMLTarget())
}
