"""Finds the fewest parts of a graph that need a wider type, where 16 bits break the network.

    found = repair(graph, images, Request())
    write_graph(found.model, path)

A runtime without precisions by layer, such as TensorRT 11, takes them from the graph: a part that is
raised computes in bfloat16 or float32, with a Cast at its borders. Which parts, is decided on
calibration images:

1. By the values that the float32 network has: a tensor that comes too near to the type's limit
   raises the part that writes it and those that read it.
2. By the strict executor on the graph with these parts raised: what still overflows is raised too,
   the first failure first, since others follow from it.
3. In bfloat16, which costs a GPU next to nothing, if the budget holds so; else in float32.
4. Where the logits still err too much, by measuring what each block is to blame for: blocks are
   raised in the order of error by share of products, see `calibration.sensitivity`.
5. What was raised without need is lowered again, the largest first.

The limits are stricter by `MARGIN` than those that are to hold, because other images judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

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
from pipeline.graphs.float16 import (
    BFLOAT16,
    BFLOAT16_OPSET,
    FLOAT16,
    HalfFacts,
    HalfType,
    raise_opset,
    to_types,
)
from pipeline.graphs.parts import Parts, with_initializers

MARGIN = 1.25
"""How much stricter limits are where parts are chosen than where the result is judged."""

RANGE_IMAGES = 128
"""Most images of which the values in float32 are looked at."""

MOST_ROUNDS = 32
"""Most evaluations until nothing overflows any more: a network rarely needs more than two."""

MOST_LOWERED = 24
"""Most parts that are tried in a narrower type at the end."""

Types = Mapping[str, HalfType | None]
"""Parts that are raised, with the type that each gets; None is float32."""


@dataclass(frozen=True)
class Budget:
    """What a repaired network has to hold.

    Attributes:
        headroom: How often the largest value of every tensor fits into its type, at least.
        max_error: Largest distance of the logits from the float32 network's, relative to their
            norm; None for any.
        max_top1_drop: Most top-1 accuracy that may be lost, as a share; one image always may.
        max_share: Largest share of the products that may be raised: beyond it, the whole network
            is better built in a wider type.

    Raises:
        InputError: A limit makes no sense.
    """

    headroom: float = 4.0
    max_error: float | None = 5e-3
    max_top1_drop: float = 0.003
    max_share: float = 0.5

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("headroom", self.headroom, 1.0, 1e6),
            ("max_error", self.max_error if self.max_error is not None else 1.0, 0.0, 1e6),
            ("max_top1_drop", self.max_top1_drop, 0.0, 1.0),
            ("max_share", self.max_share, 0.0, 1.0),
        ):
            if not least <= value <= most:
                raise InputError(f"{name} lies between {least:g} and {most:g}, not at {value:g}")


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
        types: What was raised.
        raised: The same for people, in the order of the graph.
        share: Share of the products that are raised.
        before: The graph with nothing raised.
        after: The repaired graph.
        beyond: Where the float32 network itself has values that the type cannot hold; "" if nowhere.
        images: Images that the graphs were judged on.
        evaluations: Graphs that were judged.
        facts: What the conversion did.
    """

    model: onnx.ModelProto
    types: Types
    raised: tuple[Raised, ...]
    share: float
    before: Judged
    after: Judged
    beyond: str
    images: int
    evaluations: int
    facts: HalfFacts


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
        self.raised_opset = self._for_bfloat16()
        self.parts = Parts(self.source)
        self.why: dict[str, str] = {}
        self.seen: dict[str, Judged] = {}
        self.exact = self._look(images)
        chosen = _spread(len(images.images), request.images)
        self.images = images.images[chosen]
        self.reference = self._reference()
        labels = images.labels[chosen]
        # Without a label the float32 network's answer stands for the right one.
        self.labels = np.where(labels < 0, self.reference.argmax(1), labels)
        correct = top_k(self.reference, self.labels)
        self.baseline = Outcome(correct / len(self.images), 1.0, 0.0)
        self.limits = Limits(
            max_top1_drop=max(self.budget.max_top1_drop, 1 / len(self.images)),
            max_error=self.budget.max_error and self.budget.max_error / MARGIN,
        )

    def run(self) -> Repaired:
        """Decide what is raised, and make the graph."""
        before = self.judge({}) if self._representable({}) else _LOST
        beyond = self._beyond()
        types: Types = {}
        if not self._holds(before):
            types = self._raised()
        after = self.judge(types)
        if not self._holds(after):
            raise GateFailedError(self._how_near(types, after, beyond))
        model, facts = self.build(types)
        return Repaired(
            model,
            types,
            tuple(self._told(name, types[name]) for name in self.parts.in_order(types)),
            self.parts.share(types),
            before,
            after,
            beyond,
            len(self.images),
            len(self.seen),
            facts,
        )

    # Looking at the float32 network.

    def _look(self, images: CalibrationSet) -> dict[str, TensorRange]:
        """Ranges of all tensors in float32, by name."""
        some = images.images[_spread(len(images.images), RANGE_IMAGES)]
        if not len(some):
            raise InputError("there are no images to choose precisions on: give some")
        with freed_memory_kept():
            executor = OnnxExecutor(self.source, moved=True)
            logits = executor.run_all(some)
        report = {entry.tensor: entry for entry in executor.overflow_report()}
        if not np.isfinite(logits).all():
            first = first_failure(report.values())
            where = f", first at {place(first)}" if first else ""
            raise InputError(
                f"the network itself gives no finite answer in float32{where}: no precision mends "
                "that; check its weights and its images"
            )
        return report

    def _reference(self) -> Logits:
        with freed_memory_kept():
            return OnnxExecutor(self.source).run_all(self.images)

    def _beyond(self) -> str:
        """Where the float32 network leaves the base type."""
        beyond = [e for e in self.exact.values() if e.largest > self.base.largest]
        if not beyond:
            return ""
        worst = max(beyond, key=lambda entry: entry.largest)
        return (
            f"the network itself leaves the range of {self.base.name}: {worst.largest:.2g} at "
            f"{place(worst)}, first at {place(beyond[0])} (float32)"
        )

    # Making and judging graphs.

    def _for_bfloat16(self) -> onnx.ModelProto | None:
        wanted = (self.base, *self.request.raise_to)
        return raise_opset(self.source, BFLOAT16_OPSET) if BFLOAT16 in wanted else None

    def build(self, types: Types) -> tuple[onnx.ModelProto, HalfFacts]:
        """The graph with some parts raised."""
        used = {self.base, *types.values()} - {None}
        source = self.source if BFLOAT16 not in used else self.raised_opset
        assert source is not None

        def choose(node: onnx.NodeProto) -> HalfType | None:
            return types.get(self.parts.of(node.output[0]), self.base)

        return to_types(source, choose, [half for half in used if half])

    def judge(self, types: Types) -> Judged:
        """How the graph with some parts raised does."""
        key = digest_of({name: _name(half) for name, half in types.items()})
        if key not in self.seen:
            self.seen[key] = self._judge(types)
            told = f"{len(types)} of {len(self.parts.all)} parts raised"
            share = self.parts.share(types)
            self.log(f"{told} ({share:.1%} of the products): {self.seen[key].words}")
        return self.seen[key]

    def _judge(self, types: Types) -> Judged:
        model, _ = self.build(types)
        with freed_memory_kept():
            executor = OnnxExecutor(model, record=True)
            logits = executor.run_all(self.images)
        entries = self._suspects(model, executor.overflow_report())
        compared = compare(logits, self.reference)
        error = compared.relative_error if compared.finite else math.nan
        top1 = top_k(logits, self.labels) / len(self.images)
        lost = next((entry for entry in entries if _lost(entry)), None)
        weakest = lost or min(entries, key=lambda entry: entry.headroom, default=None)
        headroom = weakest.headroom if weakest else math.inf
        return Judged(Outcome(top1, compared.agreement, error), headroom, weakest)

    def _suspects(self, model: onnx.ModelProto, report: list[TensorRange]) -> list[TensorRange]:
        """What can tell of lost range, under the tensors' names in the float32 graph.

        What is infinite in float32 too, such as a mask, is so on purpose.
        """
        casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast"}
        entries = []
        for entry in report:
            name = entry.tensor
            while name not in self.exact and name in casts:
                name = casts[name]
            known = self.exact.get(name)
            if entry.op_type == "Initializer" or (known and not known.finite):
                continue
            module = known.module if known else entry.module
            entries.append(replace(entry, tensor=name, module=module))
        return entries

    def _representable(self, types: Types) -> bool:
        """Whether no constant lies beyond the type of a part that reads it."""
        return not (self._large_constants() - set(types))

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
        roomy = judged.headroom >= self.budget.headroom * (1 if self.base is BFLOAT16 else MARGIN)
        return roomy and self.limits.hold(judged.outcome, self.baseline)

    # Raising.

    def _raised(self) -> Types:
        """The parts that are raised for the budget to hold."""
        needed = self._out_of_range()
        best: Types = {}
        for wide in self.request.raise_to:
            if wide is self.base:
                continue
            best = self._closed(dict.fromkeys(needed, wide))
            if self.parts.share(best) > self.budget.max_share:
                return best
            if self._holds(self.judge(best)):
                return self._lowered(best, needed)
        best = self._for_error(best)
        return self._lowered(best, needed) if self._holds(self.judge(best)) else best

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

    def _closed(self, types: Types) -> Types:
        """With all raised that still lacks headroom."""
        wide = next(iter(types.values()), self.request.raise_to[-1])
        for _ in range(MOST_ROUNDS):
            judged = self.judge(types)
            weakest = judged.weakest
            if weakest is None or judged.headroom >= self.budget.headroom * MARGIN:
                break
            more = self._blame(weakest.tensor, _what(weakest)) - set(types)
            # What is wide already has been lost before.
            more = more or self.parts.before(weakest.tensor) - set(types)
            if not more or self.parts.share(types) > self.budget.max_share:
                break
            for name in more:
                self.why.setdefault(name, f"{weakest.tensor} {_what(weakest)}")
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
            model = self.build(raised)[0].SerializeToString(deterministic=True)
            key = digest_of([model.hex(), self.budget.headroom])
            return self.kept.outcome(key, lambda: self._outcome(raised))

        worth = {b: max(1e-4, self.parts.share(self.parts.of_block(b))) for b in blocks}
        found = search(
            blocks,
            evaluate,
            baseline=self.baseline,
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
        if judged.headroom >= self.budget.headroom * MARGIN:
            return judged.outcome
        return replace(judged.outcome, logit_error=math.inf)

    def _lowered(self, types: Types, needed: Collection[str]) -> Types:
        """With all lowered again that the budget does not need, the most products first."""
        order = sorted(types, key=lambda name: -self.parts.all[name].products)
        tried = 0
        for name in order:
            for narrower in self._narrower(types[name], needed=name in needed):
                if tried == MOST_LOWERED:
                    return types
                tried += 1
                lower = {other: half for other, half in types.items() if other != name}
                if narrower is not self.base:
                    lower[name] = narrower
                if self._holds(self.judge(lower)):
                    types = lower
                    break
        return types

    def _narrower(self, wide: HalfType | None, *, needed: bool) -> Iterable[HalfType | None]:
        """Types below one, the narrowest first; the base type cannot hold what is needed."""
        if not needed:
            yield self.base
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
        allowed += f" and {budget.max_share:.0%} of the products raised"
        remedy = "fp32" if self.base is BFLOAT16 else "bf16 or fp32"
        lines = [
            f"no choice of parts holds the budget ({allowed}, each with a margin of {MARGIN:g} for "
            f"other images): with {len(types)} of {len(self.parts.all)} parts raised, {share:.1%} of "
            f"the products, {judged.words}",
            f"build {remedy}, or allow more",
        ]
        return "; ".join([beyond, *lines] if beyond else lines)


_LOST = Judged(Outcome(0.0, 0.0, math.nan), 0.0, None)
"""Of a graph that cannot even be made: a constant lies beyond the type."""


def _spread(total: int, most: int) -> list[int]:
    """Places of at most so many images, spread evenly over all."""
    count = min(total, most)
    return sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)})


def _name(half: HalfType | None) -> str:
    return half.name if half else "float32"


def _lost(entry: TensorRange) -> bool:
    return not entry.finite


def _what(entry: TensorRange) -> str:
    if entry.finite:
        return f"holds {entry.largest:.3g}, too near to the limit of {entry.dtype}"
    if entry.overflowed:
        return f"overflows {entry.dtype}: {entry.largest:.3g}"
    return f"becomes infinite or no number in {entry.dtype}"
