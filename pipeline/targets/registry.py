"""The deployment targets, by name. A target's package is loaded when the target is first asked for.

Names are known without loading anything: help and command lines need no more. A target from
elsewhere is added with `register`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.targets.base import Target, TargetOptions
    from pipeline.targets.forms import Form

_PLACES = {
    "trt": "pipeline.targets.tensorrt.target:TrtTarget",
    "ort": "pipeline.targets.ort.target:OrtTarget",
    "coreml": "pipeline.targets.coreml.target:CoreMLTarget",
    "coreai": "pipeline.targets.coreai.target:CoreAITarget",
}
"""Module and class of each target of this project, in the order of reports."""


class Registry(Mapping[str, "Target"]):
    """Targets by name, in the order in which they are built and reported."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)
        self._loaded: dict[str, Target] = {}

    def __getitem__(self, name: str) -> Target:
        if name not in self._places:
            raise KeyError(name)
        if name not in self._loaded:
            module, _, kind = self._places[name].partition(":")
            self._loaded[name] = getattr(importlib.import_module(module), kind)()
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def register(self, target: Target) -> None:
        """Add a target, such as one that lives outside of this project.

        Raises:
            ValueError: There is one of that name.
        """
        if target.name in self._places:
            raise ValueError(f"there is a target {target.name!r} already")
        kind = type(target)
        self._places[target.name] = f"{kind.__module__}:{kind.__qualname__}"
        self._loaded[target.name] = target

    def remove(self, name: str) -> None:
        """Take a target out again."""
        del self._places[name]
        self._loaded.pop(name, None)


TARGETS = Registry(_PLACES)


def able(method: str) -> list[str]:
    """Names of the targets that offer what others leave out, such as "diff" or "swift".

    Args:
        method: Name of a method or attribute that `Target` gives a default.
    """
    from pipeline.targets.base import Target

    default = getattr(Target, method)
    return [name for name in TARGETS if getattr(type(TARGETS[name]), method) is not default]


def needs_calibration(target: Target, precision: str, options: TargetOptions | None) -> bool:
    """Whether calibration images decide what a precision of a target becomes."""
    form = form_of(target, precision, options)
    return target.calibrates(precision, options) or (form is not None and form.calibrated)


def form_of(target: Target, precision: str, options: TargetOptions | None = None) -> Form | None:
    """The form of the graph that a precision of a target builds from; None for `MODULE`."""
    from pipeline.targets.base import MODULE

    name = target.form(precision, options)
    return None if name == MODULE else form_named(target, name)


def form_named(target: Target, name: str) -> Form:
    """The form of the graph of a name that a target gives."""
    from pipeline.targets.floats import SHARED
    from pipeline.targets.repaired import REPAIRED

    return next(form for form in (*target.forms, *SHARED, *REPAIRED) if form.name == name)
