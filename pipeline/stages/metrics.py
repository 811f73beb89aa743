"""Measures beside top-1: of each class, and by a function of the user's own.

The function takes logits (images, classes) and labels (images,), and returns numbers by name. Their
intervals come from a bootstrap over the images, so that it is called some hundred times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core import figures
from pipeline.core.callables import imported
from pipeline.core.errors import InputError, about
from pipeline.core.figures import Number
from pipeline.core.network import Logits
from pipeline.core.words import in_short, shown
from pipeline.steps.facts.accuracy import Accuracy, ByClass
from pipeline.steps.keys import own_code

ROUNDS = 100
"""Samples of the bootstrap: each calls the function once."""

MOST = 50
"""Numbers that a function may give."""

Labels = npt.NDArray[np.int64]
Metrics = Callable[[Logits, Labels], Mapping[str, float]]


def metrics_inputs(own: str | None) -> dict[str, Any]:
    """What decides the user's own measures, for a key; nothing of theirs is imported.

    Args:
        own: "package.module:function"; None where the user named none.

    Raises:
        ModelError: There is no such module.
    """
    if own is None:
        return {}
    with about("validation.metrics"):
        return {
            "settings validation.metrics": own,
            "the code of validation.metrics": own_code(own),
        }


def with_measures(
    numbers: Accuracy, logits: Logits, labels: Labels, names: Sequence[str], own: str | None
) -> Accuracy:
    """An artifact's figures, and the measures beside them.

    Args:
        numbers: The figures.
        logits: (images, classes).
        labels: The right classes, (images,).
        names: Of the classes, in the order of the logits.
        own: "package.module:function"; None where the user named none.

    Raises:
        InputError: The function cannot be called, or gives no numbers by name.
    """
    return dataclasses.replace(
        numbers,
        by_class=by_class(logits, labels, names, numbers.top1),
        metrics={} if own is None else own_metrics(logits, labels, own, numbers.top1),
    )


def by_class(logits: Logits, labels: Labels, names: Sequence[str], like: Number) -> ByClass | None:
    """Top-1 of each class that the images show; None where they show none.

    Args:
        logits: (images, classes); a row with a NaN counts as wrong.
        labels: The right classes, (images,).
        names: Of the classes, in the order of the logits.
        like: A figure of the same images, for how they came about.
    """
    if not len(labels):
        return None
    hits = (logits.argmax(1) == labels) & ~np.isnan(logits).any(1)
    total = np.bincount(labels, minlength=len(names))
    correct = np.bincount(labels, weights=hits, minlength=len(names)).astype(int)
    there: list[int] = np.flatnonzero(total).tolist()
    worst = min(there, key=lambda i: (correct[i] / total[i], -total[i]))
    number = dataclasses.replace(
        like,
        value=correct[worst] / total[worst],
        samples=int(total[worst]),
        interval=figures.wilson(int(correct[worst]), int(total[worst])),
    )
    shares = {names[i]: float(correct[i] / total[i]) for i in there}
    return ByClass(names[worst], number, shares)


def own_metrics(logits: Logits, labels: Labels, stated: str, like: Number) -> dict[str, Number]:
    """What the user's function gives, with intervals where it can be called on samples.

    Args:
        logits: (images, classes).
        labels: The right classes, (images,).
        stated: "package.module:function".
        like: A figure of the same images, for how they came about.

    Raises:
        InputError: It cannot be called, or gives no numbers by name.
    """
    with about("validation.metrics"):
        function = imported(stated)
        values = _called(function, logits, labels, stated)
        intervals = _intervals(function, logits, labels, list(values), stated)
    return {
        name: dataclasses.replace(like, value=value, interval=intervals.get(name))
        for name, value in values.items()
    }


def _called(function: Metrics, logits: Logits, labels: Labels, stated: str) -> dict[str, float]:
    try:
        # Copies: what it does to them is nobody else's business.
        given = function(logits.copy(), labels.copy())
    except Exception as error:  # somebody's own code
        raise InputError(f"{stated} failed: {in_short(error)}") from error
    if not isinstance(given, Mapping) or not given:
        raise InputError(
            f"{stated} gave {shown(repr(given))}: return numbers by name, such as {{'f1': 0.9}}"
        )
    if len(given) > MOST:
        raise InputError(f"{stated} gave {len(given)} numbers: return at most {MOST}")
    return {_name(name, stated): _number(value, name, stated) for name, value in given.items()}


def _name(name: object, stated: str) -> str:
    if not isinstance(name, str) or not name.strip() or shown(name) != name:
        raise InputError(f"{stated} gave the name {shown(repr(name))}: a name is a short text")
    return name


def _number(value: Any, name: object, stated: str) -> float:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{stated} gave {shown(repr(value))} as {name}: return a number")
    return float(value)


def _intervals(
    function: Metrics, logits: Logits, labels: Labels, names: Sequence[str], stated: str
) -> dict[str, tuple[float, float]]:
    """95 % intervals over samples of the images; none where it takes no sample or gives others."""
    generator = np.random.default_rng(0)
    rows: list[list[float]] = []
    for _ in range(ROUNDS):
        chosen = generator.integers(0, len(labels), len(labels))
        try:
            given = _called(function, logits[chosen], labels[chosen], stated)
        except InputError:
            return {}  # a class that a sample does not show, and the like
        if list(given) != list(names):
            return {}
        rows.append(list(given.values()))
    values = np.array(rows)
    if not np.isfinite(values).all():
        return {}
    low, high = np.percentile(values, [2.5, 97.5], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}
