"""Finds the fewest parts of a graph that need a wider type, where 16 bits break the network.

    found = repair(graph, images, Request())
    write_graph(found.model, path)

A runtime without precisions by layer, such as TensorRT 11, takes them from the graph: a part that
is raised computes in bfloat16 or float32, with a Cast at its borders. Which parts, is decided on
calibration images:

1. By the values that the float32 network has: a tensor that comes too near to the type's limit
   raises the part that writes it and those that read it.
2. By the strict executor on the graph with these parts raised: what still overflows is raised too,
   the first failure first, since others follow from it.
3. In bfloat16, which costs a GPU next to nothing, if the logits err little with it; else in
   float32.
4. Where the budget does not hold so, by measuring what each block is to blame for: blocks are
   raised in the order of error by share of products, see `calibration.sensitivity`.
5. What was raised without need is lowered again, the largest first.

The limits are stricter by `MARGIN` than those that are to hold, because other images judge.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from calibration.budget import Budget
from calibration.kept import Kept
from calibration.sample import CalibrationSet
from calibration.sensitivity import Groups, Limits, Outcome, search
from pipeline.core.errors import GateFailedError, InputError
from pipeline.core.figures import compare, top_k
from pipeline.core.files import digest_of
from pipeline.core.memory import freed_memory_kept
from pipeline.core.network import Images, Logits
from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.emulate.ranges import TensorRange, first_failure
from pipeline.graphs.float16 import BFLOAT16, FLOAT16, HalfFacts, HalfType, to_types
from pipeline.graphs.modules import Parts, with_initializers

MARGIN = 1.25
"""How much stricter limits are where parts are chosen than where the result is judged."""

RANGE_IMAGES = 128
"""Most images of which the values in float32 are looked at."""

MOST_ROUNDS = 32
"""Most evaluations until nothing overflows any more: a network rarely needs more than two."""

MOST_LOWERED = 24
"""Most parts that are tried in a narrower type at the end."""

AIM = 5e-3
"""Error of the logits down to which a wider type is taken for what is raised anyway. Sound networks
have less in float16; deep ones with random weights have up to 0.04, whatever is raised."""

LITTLE = 1.1
"""How much more error than with the widest type is taken for the same."""

LEAST_SHARE = 1e-3
"""Least share of the products for which a part in float32 is tried in bfloat16."""

Types = Mapping[str, HalfType | None]
"""Parts that are raised, with the type that each gets; None is float32."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        base: The type that all computes in but for what is raised.
        raise_to: Types to raise to, the cheapest first; None is float32.
        budget: What has to hold.
        images: Most images on which graphs are judged.
    """

    base: HalfType = FLOAT16
    raise_to: tuple[HalfType | None, ...] = (BFLOAT16, None)
    budget: Budget = field(default_factory=Budget)
    images: int = 64


@dataclass(frozen=True)
class Judged:
    """How a graph did.

    Attributes:
        outcome: Its logits against those of the float32 network.
        headroom: The least of all tensors; 0 where infinities or NaN arise without an overflow.
        weakest: The tensor with the least, or the first that is not finite; None without any.
    """

    outcome: Outcome
    headroom: float
    weakest: TensorRange | None

    @property
    def words(self) -> str:
        """What it had, for people."""
        error = self.outcome.logit_error
        if not math.isfinite(error):
            told = "no finite answer"
        else:
            told = f"error {error:.2g}, same class on {self.outcome.agreement:.1%} of the images"
        where = f" at {place(self.weakest)}" if self.weakest else ""
        return f"{told}, least headroom {self.headroom:.3g}{where}"


@dataclass(frozen=True)
class Conversion:
    """Rewrites a graph so that each part computes in its type.

    Attributes:
        base: The type of all that is not raised.
        types: What is raised.
        parts: The parts of the float32 graph.
    """

    base: HalfType
    types: Types
    parts: Parts

    def __call__(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, HalfFacts]:
        """Rewrite the float32 graph, or one that was made of it and has the same tensors.

        Raises:
            BuildError: A constant lies beyond the type that reads it.
        """
        used = (self.base, *self.types.values())
        return to_types(model, self.type_of, [half for half in used if half])

    def type_of(self, node: onnx.NodeProto) -> HalfType | None:
        """The type that a node computes in; None for float32."""
        return self.types.get(self.parts.of(node.output[0]), self.base)


@dataclass(frozen=True)
class Raised:
    """A part that was raised.

    Attributes:
        part: Its name.
        type: The type in which it computes: "float32" or "bfloat16".
        share: Its share of the network's products.
        why: What would go wrong without it.
    """

    part: str
    type: str
    share: float
    why: str


@dataclass(frozen=True)
class Repaired:
    """A graph that holds the budget on the images that it was chosen on.

    Attributes:
        model: The graph.
        conversion: Rewrites a graph with the same tensors in the same way.
        raised: What was raised, in the order of the graph.
        parts: Parts that the graph has.
        share: Share of the products that are raised.
        before: The graph with nothing raised; None where there is none, since a constant lies
            beyond the type.
        after: The repaired graph.
        beyond: Where the float32 network itself leaves the range of the type; "" if nowhere.
        images: Images that the graphs were judged on.
        evaluations: Graphs that were judged.
        facts: What the conversion did.
    """

    model: onnx.ModelProto
    conversion: Conversion
    raised: tuple[Raised, ...]
    parts: int
    share: float
    before: Judged | None
    after: Judged
    beyond: str
    images: int
    evaluations: int
    facts: HalfFacts

    @property
    def broke(self) -> str:
        """How the network does with nothing raised, for people; "" where it holds."""
        if not self.raised:
            return ""
        if self.before is None:
            return f"a constant lies beyond {self.conversion.base.name}"
        return self.before.words

    def raises(self, node: onnx.NodeProto) -> bool:
        """Whether a node computes in a wider type than the rest."""
        return self.conversion.type_of(node) is not self.conversion.base


def place(entry: TensorRange) -> str:
    """Where a tensor is, for people: its module, operator and name."""
    where = f"{entry.module}: " if entry.module else ""
    return f"{where}{entry.op_type} {entry.tensor}"


def repair(
    source: onnx.ModelProto,
    images: CalibrationSet,
    request: Request,
    *,
    kept: Kept | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Repaired:
    """Raise the fewest parts of a float32 graph with which a narrow type holds the budget.

    Args:
        source: The float32 graph: one input, one output, nothing quantized. It is not changed.
        images: What to decide on; labels below 0 are unknown.
        request: What is asked for.
        kept: Remembers outcomes, so that a search that was killed goes on.
        log: Takes a line for each graph that was judged.

    Raises:
        InputError: The graph is quantized or in 16 bits already, a weight is NaN, the float32
            network gives no finite answer, or the images do not fit.
        GateFailedError: Nothing that may be raised holds the budget; the message says how near it
            came.
    """
    refuse_unfit(source)
    return _Work(source, images, request, kept or Kept(), log).run()


def refuse_unfit(source: onnx.ModelProto) -> None:
    """Refuse what is no float32 graph, and weights that are not numbers.

    Raises:
        InputError: The message says what to give in its place, or names the weight.
    """
    for node in source.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
            raise InputError(
                f"the graph is quantized already (node {node.name or node.output[0]!r}, "
                f"{node.op_type}): repair the float32 graph that it was made from"
            )
    for tensor in source.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            raise InputError(
                f"the graph is not float32: its tensor {tensor.name!r} is in 16 bits; repair the "
                "float32 graph that it was made from"
            )
        if tensor.data_type == TensorProto.FLOAT:
            lost = int(np.isnan(numpy_helper.to_array(tensor)).sum())
            if lost:
                raise InputError(
                    f"the weight {tensor.name!r} holds {lost} values that are not a number: no "
                    "precision mends that; export the network again"
                )


class _Judge:
    """Judges graphs against the float32 graph, on the same images.

    Args:
        source: The float32 graph.
        images: What to judge on; labels below 0 are unknown.
        exact: What is known of the float32 graph's tensors, by name.
    """

    def __init__(
        self, source: onnx.ModelProto, images: CalibrationSet, exact: Mapping[str, TensorRange]
    ) -> None:
        self.images, self.exact = images.images, exact
        self._reference = by_float32(source, self.images)
        # Without a label the float32 network's answer stands for the right one.
        self._labels = np.where(images.labels < 0, self._reference.argmax(1), images.labels)
        self.baseline = Outcome(self._top1(self._reference), 1.0, 0.0)

    def __call__(self, model: onnx.ModelProto) -> Judged:
        """How a graph does."""
        with freed_memory_kept():
            executor = OnnxExecutor(model, record=True)
            logits = executor.run_all(self.images)
        entries = self._telling(model, executor.overflow_report())
        compared = compare(logits, self._reference)
        error = compared.relative_error if compared.finite else math.nan
        lost = first_failure(entries)
        weakest = lost or min(entries, key=lambda entry: entry.headroom, default=None)
        headroom = weakest.headroom if weakest else math.inf
        return Judged(Outcome(self._top1(logits), compared.agreement, error), headroom, weakest)

    def limits(self, budget: Budget, margin: float = 1.0) -> Limits:
        """What the logits have to hold; one image always may be lost."""
        return Limits(
            max_top1_drop=max(budget.max_top1_drop, 1 / len(self.images)),
            max_error=None if budget.max_error is None else budget.max_error / margin,
        )

    def _top1(self, logits: Logits) -> float:
        return top_k(logits, self._labels) / len(self.images)

    def _telling(self, model: onnx.ModelProto, report: list[TensorRange]) -> list[TensorRange]:
        """What can tell of lost range, under the tensors' names in the float32 graph.

        What is infinite in float32 too, such as a mask, is so on purpose, and 8-bit types saturate.
        """
        casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast"}
        entries = []
        for entry in report:
            name = entry.tensor
            while name not in self.exact and name in casts:
                name = casts[name]
            known = self.exact.get(name)
            on_purpose = entry.op_type == "Initializer" or (known and not known.finite)
            if on_purpose or entry.dtype.startswith(("int", "uint", "float8")):
                continue
            module = known.module if known else entry.module
            entries.append(replace(entry, tensor=name, module=module))
        return entries


def by_float32(source: onnx.ModelProto, images: Images) -> Logits:
    """Logits of a float32 graph."""
    with freed_memory_kept():
        return OnnxExecutor(source).run_all(images)


def ranges_of(source: onnx.ModelProto, images: Images) -> dict[str, TensorRange]:
    """Ranges of all tensors of a float32 graph, by name, in the order of the graph.

    Raises:
        InputError: There are no images, or the network itself gives no finite answer.
    """
    if not len(images):
        raise InputError("there are no images to choose precisions on: give some")
    with freed_memory_kept():
        executor = OnnxExecutor(source, moved=True)
        logits = executor.run_all(images)
    report = {entry.tensor: entry for entry in executor.overflow_report()}
    if not np.isfinite(logits).all():
        first = first_failure(report.values())
        where = f", first at {place(first)}" if first else ""
        raise InputError(
            f"the network itself gives no finite answer in float32{where}: no precision mends "
            "that; check its weights and its images"
        )
    return report


@dataclass(frozen=True)
class Verified:
    """How a repaired graph does on images that had no say in it.

    Attributes:
        judged: How it does.
        images: How many images that was.
        holds: The budget holds.
    """

    judged: Judged
    images: int
    holds: bool


def verify(
    source: onnx.ModelProto, model: onnx.ModelProto, images: CalibrationSet, budget: Budget
) -> Verified:
    """Judge a repaired graph on other images, by the budget itself.

    Args:
        source: The float32 graph.
        model: The repaired graph.
        images: What to judge on.
        budget: What has to hold.

    Raises:
        InputError: There are no images, or the float32 network gives no finite answer for them.
    """
    judge = _Judge(source, images, ranges_of(source, images.images))
    judged = judge(model)
    logits_hold = judge.limits(budget).hold(judged.outcome, judge.baseline)
    roomy = judged.headroom >= budget.headroom
    return Verified(judged, len(images.images), logits_hold and roomy)


class _Work:
    """One repair, in order."""

    def __init__(
        self,
        source: onnx.ModelProto,
        images: CalibrationSet,
        request: Request,
        kept: Kept,
        log: Callable[[str], None],
    ) -> None:
        self.request, self.kept, self.log = request, kept, log
        self.budget, self.base = request.budget, request.base
        self.source = with_initializers(source)
        self.parts = Parts(self.source)
        self.why: dict[str, str] = {}
        self.seen: dict[str, Judged] = {}
        self.exact = ranges_of(self.source, _some(images, RANGE_IMAGES).images)
        self.judging = _Judge(self.source, _some(images, request.images), self.exact)
        self.limits = self.judging.limits(self.budget, MARGIN)
        self.aim = AIM / MARGIN

    def run(self) -> Repaired:
        """Decide what is raised, and make the graph."""
        before = None if self._large_constants() else self.judge({})
        beyond = self._beyond()
        types: Types = {}
        if before is None or not self._holds(before):
            types = self._raised()
        after = self.judge(types)
        share = self.parts.share(types)
        if not self._holds(after) or share > self.budget.max_share:
            raise GateFailedError(self._how_near(types, after, beyond))
        conversion = Conversion(self.base, types, self.parts)
        model, facts = conversion(self.source)
        return Repaired(
            model=model,
            conversion=conversion,
            raised=tuple(self._told(name, types[name]) for name in self.parts.in_order(types)),
            parts=len(self.parts.all),
            share=share,
            before=before,
            after=after,
            beyond=beyond,
            images=len(self.judging.images),
            evaluations=len(self.seen),
            facts=facts,
        )

    # Looking at the float32 network.

    def _beyond(self) -> str:
        """Where the float32 network leaves the base type."""
        beyond = [e for e in self.exact.values() if e.largest > self.base.largest]
        if not beyond:
            return ""
        worst = max(beyond, key=lambda entry: entry.largest)
        first = "" if worst is beyond[0] else f", first at {place(beyond[0])}"
        return (
            f"the network itself leaves the range of {self.base.name}: {worst.largest:.2g} at "
            f"{place(worst)}{first} (float32)"
        )

    # Making and judging graphs.

    def judge(self, types: Types) -> Judged:
        """How the graph with some parts raised does."""
        key = self._key(types)
        if key not in self.seen:
            model, _ = Conversion(self.base, types, self.parts)(self.source)
            self.seen[key] = self.judging(model)
            told = f"{len(types)} of {len(self.parts.all)} parts raised"
            share = self.parts.share(types)
            self.log(f"{told} ({share:.1%} of the products): {self.seen[key].words}")
        return self.seen[key]

    def _large_constants(self) -> set[str]:
        """Parts that read a constant beyond the base type."""
        found: set[str] = set()
        for tensor in self.source.graph.initializer:
            if tensor.data_type != TensorProto.FLOAT:
                continue
            value = numpy_helper.to_array(tensor)
            finite = np.abs(value[np.isfinite(value)])
            if finite.size and float(finite.max()) > self.base.largest:
                for name in self.parts.reading(tensor.name):
                    found.add(name)
                    self.why.setdefault(
                        name, f"its constant {tensor.name} holds {finite.max():.3g}"
                    )
        return found

    def _holds(self, judged: Judged) -> bool:
        return self._roomy(judged) and self.limits.hold(judged.outcome, self.judging.baseline)

    def _roomy(self, judged: Judged) -> bool:
        return judged.headroom >= self.budget.headroom * MARGIN

    # Raising.

    def _raised(self) -> Types:
        """The parts that are raised for the budget to hold."""
        needed = self._out_of_range()
        ways: list[Types] = []
        for wide in self.request.raise_to:
            if wide is self.base:
                continue
            ways.append(self._closed(dict.fromkeys(needed, wide), wide))
            if self.parts.share(ways[-1]) > self.budget.max_share:
                return ways[-1]
            if self._error(ways[-1]) <= self.aim:
                break
        self.aim = max(self.aim, LITTLE * self._error(ways[-1]))
        for types in ways:
            if self._fine(types):
                return self._lowered(types, needed)
        types = self._for_error(ways[-1])
        return self._lowered(types, needed) if self._fine(types) else types

    def _error(self, types: Types) -> float:
        """Error of the logits; infinite where they are not finite."""
        error = self.judge(types).outcome.logit_error
        return error if math.isfinite(error) else math.inf

    def _fine(self, types: Types) -> bool:
        """Whether the budget holds, and a wider type would bring the logits no nearer."""
        return self._holds(self.judge(types)) and self._error(types) <= self.aim

    def _out_of_range(self) -> set[str]:
        """Parts around tensors that come too near to the limit of the base type in float32."""
        found = self._large_constants()
        limit = self.base.largest / (self.budget.headroom * MARGIN)
        for entry in self.exact.values():
            if entry.largest > limit:
                found |= self._blame(entry.tensor, f"holds {entry.largest:.3g} in float32")
        return found

    def _blame(self, tensor: str, what: str) -> set[str]:
        """The parts around a tensor, of which it is noted why they are raised."""
        around = self.parts.around(tensor)
        for name in around:
            self.why.setdefault(name, f"{tensor} {what}")
        return around

    def _closed(self, types: Types, wide: HalfType | None) -> Types:
        """With all raised that still lacks headroom."""
        for _ in range(MOST_ROUNDS):
            judged = self.judge(types)
            weakest = judged.weakest
            if weakest is None or self._roomy(judged):
                break
            more = self._blame(weakest.tensor, _what(weakest)) - set(types)
            if not more:  # what is wide already was lost before
                more = self.parts.before(weakest.tensor, types)
                for name in more:
                    self.why.setdefault(name, f"it rounds away what {weakest.tensor} is made from")
            if not more or self.parts.share(types) > self.budget.max_share:
                break
            types = {**types, **dict.fromkeys(more, wide)}
        return types

    def _for_error(self, types: Types) -> Types:
        """With blocks raised to the widest type until the logits err little enough."""
        wide = self.request.raise_to[-1]
        blocks = [b for b in self.parts.blocks if set(self.parts.of_block(b)) - set(types)]
        if not blocks:
            return types

        def with_blocks(chosen: Collection[str]) -> Types:
            more = (name for block in chosen for name in self.parts.of_block(block))
            return {**dict.fromkeys(more, wide), **types}

        def evaluate(chosen: Groups) -> Outcome:
            raised = with_blocks(chosen)
            return self.kept.outcome(self._key(raised), lambda: self._outcome(raised))

        worth = {b: max(1e-4, self.parts.share(self.parts.of_block(b))) for b in blocks}
        found = search(
            blocks,
            evaluate,
            baseline=self.judging.baseline,
            limits=self.limits,
            benefit=worth,
            always_rank=False,
            refinements=0,
        )
        order = [alone.group for alone in found.ranking]
        chosen = [block for block in order if block in found.excluded]
        while chosen and self.parts.share(with_blocks(chosen)) > self.budget.max_share:
            chosen.pop()
        raised = with_blocks(chosen)
        for name in set(raised) - set(types):
            self.why.setdefault(name, "its rounding errs the most for its share of the products")
        return raised

    def _outcome(self, types: Types) -> Outcome:
        """Outcome of a graph; one that lacks headroom holds no limit."""
        judged = self.judge(types)
        if self._roomy(judged):
            return judged.outcome
        return replace(judged.outcome, logit_error=math.inf)

    def _key(self, types: Types) -> str:
        """By what an outcome is kept: the graph, what is raised in it, and what has to hold."""
        named = {name: _name(half) for name, half in types.items()}
        return digest_of([self.digest, self.base.name, named, self.budget.headroom])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the float32 graph."""
        return hashlib.sha256(self.source.SerializeToString(deterministic=True)).hexdigest()

    def _lowered(self, types: Types, needed: Collection[str]) -> Types:
        """With all lowered again that the budget does not need, the most products first."""
        order = sorted(types, key=lambda name: -self.parts.all[name].products)
        tried = 0
        for name in order:
            share = self.parts.share([name])
            for narrower in self._narrower(types[name], share, needed=name in needed):
                if tried == MOST_LOWERED:
                    return types
                tried += 1
                lower = {other: half for other, half in types.items() if other != name}
                if narrower is not self.base:
                    lower[name] = narrower
                if self._fine(lower):
                    types = lower
                    break
        return types

    def _narrower(
        self, wide: HalfType | None, share: float, *, needed: bool
    ) -> Iterable[HalfType | None]:
        """Types below one that are worth a trial, the narrowest first.

        The base type cannot hold what is needed, and few products gain nothing by bfloat16.
        """
        if not needed:
            yield self.base
        if share >= LEAST_SHARE:
            cheaper = self.request.raise_to[: self.request.raise_to.index(wide)]
            yield from (half for half in cheaper if half is not self.base)

    # Telling.

    def _told(self, name: str, half: HalfType | None) -> Raised:
        return Raised(name, _name(half), self.parts.share([name]), self.why.get(name, ""))

    def _how_near(self, types: Types, judged: Judged, beyond: str) -> str:
        """That nothing holds the budget, and how near it came."""
        share, budget = self.parts.share(types), self.budget
        allowed = f"headroom {budget.headroom:g}"
        if budget.max_error is not None:
            allowed += f", error {budget.max_error:g}"
        allowed += f", a drop of {self.limits.max_top1_drop:.2%}"
        allowed += f" and {100 * budget.max_share:g}% of the products raised"
        remedy = "fp32" if self.base is BFLOAT16 else "bf16 or fp32"
        raised = f"{len(types)} of {len(self.parts.all)} parts raised, {share:.1%} of the products"
        lines = [
            f"no choice of parts holds the budget ({allowed}; limits of values {MARGIN:g} times as "
            f"strict, for other images): with {raised}, {judged.words}",
            f"build {remedy}, or allow more",
        ]
        return "; ".join([beyond, *lines] if beyond else lines)


def _some(images: CalibrationSet, most: int) -> CalibrationSet:
    """At most so many of the images, spread evenly over all."""
    total = len(images.images)
    if total <= most:
        return images
    chosen = np.linspace(0, total - 1, most).round().astype(int)
    return CalibrationSet(images.images[chosen], images.labels[chosen], ())


def _name(half: HalfType | None) -> str:
    return half.name if half else "float32"


def _what(entry: TensorRange) -> str:
    if entry.finite:
        return f"holds {entry.largest:.3g}, too near to the limit of {entry.dtype}"
    if entry.overflowed:
        return f"overflows {entry.dtype}: {entry.largest:.3g}"
    return f"becomes infinite or no number in {entry.dtype}"
