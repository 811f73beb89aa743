"""Which modules of a network compute in float32 where float16 breaks it.

A package whose modules compute in different types is converted so from the start: Core ML takes a
type for each operation. Modules are chosen on calibration images, by the ML Program executor:

1. Where values of the float32 network come too near to float16's limit, the module that makes them
   and those that read them compute in float32.
2. What still overflows once the package is rounded is raised too, the first failure first.
3. Where the logits err too much though nothing overflows, blocks are raised in the order of harm.

Limits are `MARGIN` times as strict as those that are to hold, because other images judge.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.budget import Budget
from calibration.sensitivity import Limits, Outcome, search
from pipeline.core import figures
from pipeline.core.errors import GateFailedError
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.mil.program import Constant
from pipeline.emulate.mil.record import FLOAT16_LARGEST, TensorRange
from pipeline.emulate.onnx.graph import block_of
from pipeline.graphs.repair import MARGIN, MOST_ROUNDS
from pipeline.steps.facts.graphs import RaisedPart, RepairFacts
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml.convert import convert, finish
from pipeline.targets.coreml.network import owners_of

if TYPE_CHECKING:
    from torch import nn

    from pipeline.core.network import Logits
    from pipeline.core.preprocess import Pictures
    from pipeline.emulate.mil.program import Operation, Program
    from pipeline.targets.base import BuildJob
    from pipeline.targets.coreml.network import Deployed

Modules = frozenset[str]
Shapes = Mapping[str, tuple[int, ...]]

_BASELINE = Outcome(1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Mended:
    """What a repair chose.

    Attributes:
        float32: Modules that compute in float32, in the order of the program.
        facts: What was raised and why, for the artifact and for people.
    """

    float32: tuple[str, ...]
    facts: RepairFacts


@dataclass(frozen=True)
class _Judged:
    """A package with some modules in float32.

    Attributes:
        outcome: Its logits against the module's; without labels, equal answers stand for top-1.
        weakest: The float16 tensor with the least headroom, or the first that overflows.
    """

    outcome: Outcome
    weakest: TensorRange | None

    @property
    def headroom(self) -> float:
        """Of the weakest tensor; 0 where infinities or NaN arise without an overflow."""
        if self.weakest is None:
            return math.inf
        if self.weakest.overflows and self.weakest.headroom >= 1:
            return 0.0
        return self.weakest.headroom

    @property
    def words(self) -> str:
        """How it did, for people."""
        error = self.outcome.logit_error
        told = "no finite answer"
        if math.isfinite(error):
            told = f"error {error:.2g}, same class on {self.outcome.agreement:.1%} of the images"
        where = f" at {_place(self.weakest)}" if self.weakest else ""
        return f"{told}, least headroom {self.headroom:.3g}{where}"


def repair(job: BuildJob, deployed: Deployed, pictures: Pictures, folder: Path) -> Mended:
    """Choose the fewest modules in float32 with which a float16 package holds its limits.

    Args:
        job: What is built; its options state how much accuracy may be lost.
        deployed: The network as it is converted.
        pictures: Calibration images.
        folder: For packages that are made to be judged.

    Raises:
        GateFailedError: No choice of modules holds the limits; the message says how near it came.
    """
    return _Work(job, deployed, pictures, folder).run()


class _Work:
    """One repair, in order."""

    def __init__(self, job: BuildJob, deployed: Deployed, pictures: Pictures, folder: Path) -> None:
        from pipeline.targets.coreml.options import CoreMLOptions

        assert isinstance(job.options, CoreMLOptions)
        self.job, self.options, self.deployed = job, job.options, deployed
        self.pictures, self.package = pictures, folder / "trial.mlpackage"
        self.owners = owners_of(deployed.program)
        module = job.module().eval()
        self.reference = _logits(module, pictures)
        self.budget = Budget(
            max_error=self.options.max_error, max_top1_drop=self.options.max_top1_drop
        )
        self.limits = Limits(
            max_top1_drop=max(self.budget.max_top1_drop, 1 / len(pictures)),
            max_error=_strict(self.budget.max_error),
        )
        self.seen: dict[Modules, _Judged] = {}
        self.why: dict[str, str] = {}
        self.order: list[str] = []
        self.readers: dict[str, set[str]] = {}
        self.products: Mapping[str, int] = {}

    def run(self) -> Mended:
        """Choose, and tell what was chosen."""
        before = self.judge(frozenset())
        self._look_at_program()
        exact = self._exact()
        raised: Modules = frozenset()
        if not self._holds(before):
            raised = self._closed(self._near_the_limit(exact))
            raised = self._for_error(raised)
        after, share = self.judge(raised), self._share(raised)
        beyond = _beyond(exact)
        if not self._holds(after) or share > self.budget.max_share:
            raise GateFailedError(self._how_near(raised, after, beyond))
        chosen = tuple(name for name in self.order if name in raised)
        told = tuple(
            RaisedPart(name, "float32", self._share([name]), self.why[name]) for name in chosen
        )
        headroom = after.headroom
        facts = RepairFacts(
            base="float16",
            broke=before.words if raised else "",
            raised=told,
            parts=len(self.order),
            share=share,
            error=after.outcome.logit_error,
            headroom=headroom if math.isfinite(headroom) else None,
            beyond=beyond,
            images=len(self.pictures),
            evaluations=len(self.seen),
        )
        return Mended(chosen, facts)

    # Making and judging packages.

    def judge(self, raised: Modules) -> _Judged:
        """How the package with some modules in float32 does."""
        if raised not in self.seen:
            self._write(raised)
            executor = MilExecutor(self.package, record=True)
            logits = executor.predict(self.pictures.pixels)[saved.LOGITS]
            half = executor.program.in_float16()
            entries = [e for e in executor.ranges(self.owners) if e.name in half]
            self.seen[raised] = _Judged(self._outcome(logits), _weakest(entries))
            share = self._share(raised)
            told = f"{len(raised)} modules in float32 ({share:.1%} of the products)"
            self.job.log(f"{told}: {self.seen[raised].words}")
        return self.seen[raised]

    def _write(self, raised: Modules) -> None:
        shutil.rmtree(self.package, ignore_errors=True)
        network, target = self.job.network, self.options.deployment_target
        core = convert(self.deployed, network, target, sorted(raised))
        finish(core, network, self.package, self.job.precision)

    def _outcome(self, logits: Logits) -> Outcome:
        found = figures.compare(logits, self.reference)
        error = found.relative_error if found.finite else math.nan
        return Outcome(found.agreement, found.agreement, error)

    def _look_at_program(self) -> None:
        """Note the modules in the order of the package at hand, their products and readers."""
        executor = MilExecutor(self.package, record=True)
        executor.predict(self.pictures.pixels[:1])
        made = {entry.name: _module(entry) for entry in executor.ranges(self.owners)}
        self.order = list(dict.fromkeys(name for name in made.values() if name))
        self.products = products_by_module(executor.program, made)
        for operation in executor.program.operations:
            module = next((made[name] for name, _ in operation.outputs if name in made), "")
            for group in operation.inputs.values():
                for name in group:
                    if isinstance(name, str):
                        self.readers.setdefault(name, set()).add(module)

    def _exact(self) -> list[TensorRange]:
        """Ranges of all tensors without rounding."""
        executor = MilExecutor(self.package, precision="float32", record=True)
        executor.predict(self.pictures.pixels)
        return executor.ranges(self.owners)

    # Raising.

    def _near_the_limit(self, exact: Iterable[TensorRange]) -> Modules:
        found: set[str] = set()
        for entry in exact:
            if entry.headroom < self.budget.headroom * MARGIN:
                found |= self._blame(entry, f"holds {entry.largest:.3g} in float32")
        return frozenset(found)

    def _blame(self, entry: TensorRange, what: str) -> set[str]:
        """The modules around a tensor, of which it is noted why they are raised."""
        around = ({_module(entry)} | self.readers.get(entry.name, set())) - {""}
        for name in around:
            self.why.setdefault(name, f"{entry.name} {what}")
        return around

    def _closed(self, raised: Modules) -> Modules:
        """With all raised that still lacks headroom."""
        for _ in range(MOST_ROUNDS):
            judged = self.judge(raised)
            if judged.weakest is None or self._roomy(judged):
                break
            more = self._blame(judged.weakest, _what(judged.weakest)) - raised
            if not more or self._share(raised) > self.budget.max_share:
                break
            raised |= more
        return raised

    def _for_error(self, raised: Modules) -> Modules:
        """With blocks raised until the logits err little enough."""
        if self._holds(self.judge(raised)) or not self._roomy(self.judge(raised)):
            return raised
        blocks: dict[str, set[str]] = {}
        for name in self.order:
            blocks.setdefault(block_of(name), set()).add(name)

        def with_blocks(chosen: Collection[str]) -> Modules:
            return raised.union(*(blocks[block] for block in chosen))

        found = search(
            list(blocks),
            lambda chosen: self.judge(with_blocks(chosen)).outcome,
            baseline=_BASELINE,
            limits=self.limits,
            benefit={block: max(1e-4, self._share(blocks[block])) for block in blocks},
            always_rank=False,
        )
        for name in with_blocks(found.excluded):
            self.why.setdefault(name, "its rounding errs the most for its share of the products")
        return with_blocks(found.excluded)

    # Telling.

    def _holds(self, judged: _Judged) -> bool:
        return self._roomy(judged) and self.limits.hold(judged.outcome, _BASELINE)

    def _roomy(self, judged: _Judged) -> bool:
        return judged.headroom >= self.budget.headroom * MARGIN

    def _share(self, modules: Iterable[str]) -> float:
        total = max(1, sum(self.products.values()))
        return sum(self.products.get(name, 0) for name in modules) / total

    def _how_near(self, raised: Modules, judged: _Judged, beyond: str) -> str:
        """That nothing holds the budget, and how near it came."""
        budget = self.budget
        itself = f"{beyond}; " if beyond else ""
        return (
            f"cannot repair {self.job.network.name} in float16: {itself}no choice of modules holds "
            f"the budget (headroom {budget.headroom:g}, error {budget.max_error:g}, a drop of "
            f"{self.limits.max_top1_drop:.2%} and {100 * budget.max_share:g}% of the products in "
            f"float32; limits of values {MARGIN:g} times as strict, for other images): with "
            f"{len(raised)} of {len(self.order)} modules, {self._share(raised):.1%} of the "
            f"products, {judged.words}; build fp32, or allow more"
        )


def products_by_module(program: Program, modules: Mapping[str, str]) -> Mapping[str, int]:
    """Multiply-accumulates of one image, by the module that the result belongs to.

    Not those of the torch modules: a convolution that a BatchNorm was folded into bears its name.

    Args:
        program: Saved for one image.
        modules: By the name of the result.
    """
    results = (result for operation in program.operations for result in operation.outputs)
    shapes = {
        name: tuple(side or 1 for side in kind.shape)
        for name, kind in (*program.arguments, *results)
    }
    found: Counter[str] = Counter()
    for operation in program.operations:
        module = modules.get(operation.outputs[0][0], "") if operation.outputs else ""
        found[module] += _products(operation, program, shapes)
    return found


def _products(operation: Operation, program: Program, shapes: Shapes) -> int:
    """Multiply-accumulates of an operation; 0 of what sums no products."""
    made = math.prod(shapes[operation.outputs[0][0]]) if operation.outputs else 0

    def shape(parameter: str) -> tuple[int, ...]:
        return shapes[str(operation.inputs[parameter][0])]

    match operation.type:
        case "conv":
            return made * math.prod(shape("weight")[1:])
        case "conv_transpose":
            return math.prod(shape("x")) * math.prod(shape("weight")[1:])
        case "linear":
            return made * shape("weight")[-1]
        case "matmul":
            turned = _constant(operation, "transpose_x", program)
            return made * shape("x")[-2 if turned else -1]
        case "einsum":
            return _einsum(str(_constant(operation, "equation", program)), shapes, operation)
        case "scaled_dot_product_attention":
            keys = shape("key")[-2]
            return keys * (math.prod(shape("query")) + made)
    return 0


def _einsum(equation: str, shapes: Shapes, operation: Operation) -> int:
    """A product for each choice of all indices."""
    sides: dict[str, int] = {}
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    for term, name in zip(terms, operation.inputs["values"], strict=True):
        sides |= zip(term, shapes[str(name)], strict=True)
    return math.prod(sides.values())


def _constant(operation: Operation, parameter: str, program: Program) -> Any:
    """The constant that an operation is given; None without any."""
    given = operation.inputs.get(parameter, (None,))[0]
    return given.value if isinstance(given, Constant) else program.constants.get(str(given))


def _logits(module: nn.Module, pictures: Pictures) -> Logits:
    import torch

    with torch.inference_mode():
        logits: Logits = module(torch.from_numpy(pictures.images)).numpy()
    return logits


def _strict(limit: float | None) -> float | None:
    return None if limit is None else limit / MARGIN


def _weakest(entries: list[TensorRange]) -> TensorRange | None:
    lost = next((entry for entry in entries if entry.overflows), None)
    return lost or min(entries, key=lambda entry: entry.headroom, default=None)


def _module(entry: TensorRange) -> str:
    return entry.module.removeprefix("network").removeprefix(".")


def _place(entry: TensorRange) -> str:
    module = _module(entry)
    return f"{module}: {entry.operation} {entry.name}" if module else entry.name


def _what(entry: TensorRange) -> str:
    if not entry.overflows:
        return f"holds {entry.largest:.3g}, too near to the limit of float16"
    if entry.largest > FLOAT16_LARGEST:
        return f"overflows float16: {entry.largest:.3g}"
    return "becomes infinite or no number in float16"


def _beyond(exact: Collection[TensorRange]) -> str:
    """Where the float32 network leaves float16; "" if nowhere."""
    worst = max(exact, key=lambda entry: entry.largest)
    if worst.largest <= FLOAT16_LARGEST:
        return ""
    return (
        f"the network itself leaves the range of float16: {worst.largest:.2g} at {_place(worst)} "
        "(float32)"
    )
