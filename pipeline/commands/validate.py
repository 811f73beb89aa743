"""`validate`: how accurate are the artifacts of one target here, or as on another CPU?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.commands.artifacts import builds_of, log_of
from pipeline.commands.console import RichConsole
from pipeline.config import Config
from pipeline.core.cpu_classes import Purpose, named, restriction
from pipeline.core.errors import InputError, UnavailableError
from pipeline.core.figures import State, measured_here
from pipeline.report import text
from pipeline.report.terminal import render
from pipeline.scheduler.plan import make_context, plan
from pipeline.stages.build import BuildStep
from pipeline.stages.images import read_labels
from pipeline.stages.names import LOGITS
from pipeline.stages.shards import logits_of
from pipeline.stages.validate import ReferenceStep, ValidateStep, judge, measured
from pipeline.steps.facts.accuracy import Accuracy
from pipeline.targets.base import Target
from pipeline.targets.registry import TARGETS


@dataclass(frozen=True)
class Judged:
    """What a validation gave.

    Attributes:
        text: A table for people.
        plain: The same for JSON.
    """

    text: str
    plain: dict[str, Any]


def in_words() -> str:
    """How figures of this process come about."""
    cls, state = restriction(), measured_here()
    if cls is None:
        return str(state)
    return f"{state}{' to' if state is State.RESTRICTED else ':'} {cls.title} ({cls.examples})"


def restrict(target: str, as_cpu: str | None, purpose: Purpose = Purpose.BOTH) -> None:
    """Let the target's runtime see a CPU of a class only, if one is named.

    Args:
        target: The target.
        as_cpu: Name of the class.
        purpose: What is to be found out: answers alone may be emulated where the CPU lacks
            instructions.

    Raises:
        InputError: There is no such class.
        UnavailableError: This machine cannot do that.
    """
    if as_cpu is not None:
        TARGETS[target].restrict(named(as_cpu), purpose)


def validate(
    config: Config, target: str, *, precision: tuple[str, ...], as_cpu: str | None = None
) -> Judged:
    """Judge artifacts on the validation images that a run has decoded, against PyTorch.

    Args:
        config: The configuration of the run that built them.
        target: The target.
        precision: Only these precisions; all if none is named.
        as_cpu: Name of a class of CPUs whose kernels the runtime shall take.

    Raises:
        InputError: The artifacts are not built or the images not decoded, or there is no such
            precision or class.
        UnavailableError: This machine runs none of them.
    """
    restrict(target, as_cpu, Purpose.ANSWERS)
    with log_of(config) as log, log.captured() as screen, RichConsole(screen) as console:
        context = make_context(config, log, console.progress)
        builds = builds_of(context, target, precision)
        steps = [
            s
            for s in plan(context)
            if isinstance(s, ValidateStep) and s.built.folder in {build.folder for build in builds}
        ]
        found = {step.built.precision: _judge(step) for step in steps}
    state = measured_here()
    table = Table("artifact", "top-1", "top-5", "agreement", "images", "by", box=None)
    for name, accuracy in found.items():
        agreement = accuracy.agreement
        assert agreement is not None
        table.add_row(
            f"{target}/{name}",
            text.percent(accuracy.top1),
            text.percent(accuracy.top5),
            text.percent(agreement),
            str(accuracy.top1.samples),
            accuracy.top1.by,
        )
    plain = {
        "target": target,
        "as_cpu": as_cpu,
        "state": str(state),
        "accuracy": {name: accuracy.to_dict() for name, accuracy in found.items()},
    }
    lines = [line for name, accuracy in found.items() for line in _beside(name, accuracy, target)]
    lines += doubts(TARGETS[target], builds)
    return Judged(render(table, *lines, in_words()), plain)


def doubts(runtime: Target, builds: Iterable[BuildStep]) -> list[str]:
    """What speaks against the answers of artifacts here, a line each."""
    found = (runtime.doubt(step.artifact()) for step in builds)
    return [f"(!) {doubt}" for doubt in found if doubt]


def _beside(precision: str, accuracy: Accuracy, target: str) -> Iterator[str]:
    """The worst class, and what the user's own function gives."""
    if accuracy.by_class is not None:
        worst = accuracy.by_class
        yield (
            f"{target}/{precision}: worst class: {worst.worst}: {text.percent(worst.top1)} of "
            f"{worst.top1.samples} images are right"
        )
    for name, number in accuracy.metrics.items():
        interval = text.number_interval(number)
        within = f" ({interval})" if interval else ""
        yield f"{target}/{precision}: {name}: {text.number(number)}{within}"


def _judge(step: ValidateStep) -> Accuracy:
    built = step.built.artifact()
    missing = step.runtime.missing(built)
    if missing is not None:
        raise UnavailableError(f"{built.name} not measured: {missing}")
    labels, reference = _samples(step)
    with step.runtime.open_to_judge(built) as runner:
        logits, _ = logits_of(step, runner, built.name)
    numbers = judge(logits, reference, labels, measured_here(), runner.device, "")
    return measured(step, numbers, logits, labels)


def _samples(step: ValidateStep) -> tuple[Any, Any]:
    """Labels of the validation images, and PyTorch's logits for them."""
    reference: ReferenceStep = step.reference
    for needed in (step.samples, reference):
        if not needed.folder.exists():
            raise InputError(
                f"{needed.folder} is not there yet: run python -m pipeline run --only validate"
            )
    logits = np.load(reference.artifact().path(LOGITS))
    return read_labels(step.samples.artifact()), logits
