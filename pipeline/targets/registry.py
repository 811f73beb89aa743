"""The deployment targets and the forms of the graph that they build from, by name."""

from __future__ import annotations

from pipeline.targets import floats
from pipeline.targets.base import Target
from pipeline.targets.coreml.target import CoreMLTarget
from pipeline.targets.forms import Form
from pipeline.targets.ort.target import OrtTarget
from pipeline.targets.tensorrt.target import TrtTarget

TARGETS: dict[str, Target] = {
    target.name: target for target in (TrtTarget(), OrtTarget(), CoreMLTarget())
}


def form_named(name: str) -> Form:
    """A form of the graph: one that all targets share, or a target's own.

    Raises:
        KeyError: No target has such a form.
    """
    own = (form for target in TARGETS.values() for form in target.forms)
    return {form.name: form for form in (*floats.SHARED, *own)}[name]
