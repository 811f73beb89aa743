"""int8 for ONNX Runtime on a CPU, as far as it pays and is accurate enough.

Everything is decided by evidence, on the machine that builds and on images of the training split:

- which kinds of nodes are quantized, and which parts of the network: by their latency, interleaved;
- whether channels are equalized and biases corrected: by the error of the logits;
- which blocks stay in float32: by the top-1 accuracy that may be lost.

At the end the graph is measured against our own fastest float32 build. The facts say whether it was
worth it, and why not. All kinds and parts are the default, and only a difference beyond doubt
changes it, so that two builds give the same graph unless the machine's answer changes.

The network is prepared like the float32 build of this runtime, but with depthwise convolutions of
parts merged up to 32 channels: the 8-bit depthwise kernel takes as long for 8 channels as for 32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from calibration.sample import CalibrationSet
from pipeline.core.described import Quantized
from pipeline.core.errors import BuildError
from pipeline.core.network import in_batches, whole_batches
from pipeline.steps.keys import versions
from pipeline.targets.forms import Form, FormJob, Look, look
from pipeline.targets.ort.trained import ranges_of, stated_precision, weights_scheme

if TYPE_CHECKING:
    import onnx

    from calibration.histogram import Histogram
    from calibration.judge import Graph
    from calibration.ranges import Method
    from calibration.sensitivity import Outcome, Search
    from calibration.table import Table
    from pipeline.core.network import Images, Logits
    from pipeline.graphs.bias import Means
    from pipeline.graphs.gelu_int8 import GeluFit
    from pipeline.graphs.qdq_ort import Candidate, Kind, StoredWeights
    from pipeline.targets.ort.certificate import Certificate
    from pipeline.targets.ort.tune import Choice

DECISION_IMAGES = 256
"""Most images on which accuracy is judged."""

BATCH = 16
"""Images at a time, where the graph leaves that open."""

MEASURE_SECONDS = 3.0
"""How long each comparison of latency takes at most, see `tune.MOST_CALLS`."""

MARGIN = 0.05
"""By how much other kinds or parts must be faster than all of them, so that builds repeat."""

TRAINING_METHOD = "mse"
"""How the ranges of fine-tuning are chosen: as a build does by default."""

GELU_SHARES = (1.0, 0.75, 0.5, 0.25)
"""Shares of the GELUs that are tried in 8 bits, one after the other."""

CHANCE = 0.05
"""Share by which the error of the logits differs by chance: with 4, 8, 12 and 16 of the GELUs in
8 bits, care_tiny had 0.0458, 0.0467, 0.0482 and 0.0467; with all exact, 0.0447 to 0.0459. What is
right by its nature is taken unless it errs more than that."""

MOST_OF_GELUS = 1.15
"""How many times the error of the logits with exact GELUs those in 8 bits may make of it: they save
a tenth to a third of the time."""

MOST_OF_SUMS = 2.0
"""How many times the error of the logits with layers alone sums and joins may make of it."""

WIDTHS = (16, 32)
"""Channels up to which depthwise convolutions of parts are merged, one after the other."""


class Int8Ort(Form):
    """uint8 activations and int8 weights, for ONNX Runtime."""

    name = "int8-ort"
    calibrated = True
    timed = True
    observes = True

    def versions(self) -> dict[str, str]:
        """See `Form.versions`."""
        return versions("onnx", "onnxruntime", "onnx-ir")

    def convert(self, job: FormJob, destination: Path) -> dict[str, Any]:
        """See `Form.convert`.

        Options: `method`, how ranges are chosen; `max_top1_drop`, the share of calibration images
        that may be lost before blocks are left in float32; one image is always allowed; `cpus`,
        whether the answers are to be the same on all CPUs or need VNNI; `gelu`, whether GELUs may
        be computed in 8 bits.
        """
        import onnx

        from calibration.show import rows
        from pipeline.core.files import write_atomically

        images = job.calibration()
        work = _Work(job, images, prepare_graph(job.source))
        trained = stated_precision(job.source)
        chosen, kinds, measured_kinds, slow, measured_parts = (
            work.decide() if trained is None else work.as_trained(trained)
        )
        found = work.search(chosen, kinds, slow)
        told = self.told(job, found, chosen.shares(), work.judge.count)
        excluded = found.excluded | slow
        model = chosen.build(kinds, excluded)
        onnx.checker.check_model(model, full_check=True)
        write_atomically(destination, model.SerializeToString(deterministic=True))
        timed = work.compare_latency(model)
        ratio = timed.ratios["int8"]
        kept = len(chosen.blocks) - len(excluded)
        return {
            "method": str(work.method),
            "calibration_images": len(images.images),
            "decision_images": work.judge.count,
            "kinds": [str(kind) for kind in kinds],
            "kinds_measured": measured_kinds,
            "trained": "" if trained is None else trained.precision,
            "parts_measured": measured_parts,
            "left_for_latency": sorted(slow),
            "equalized": chosen.equalized,
            "biases_corrected": bool(chosen.errors),
            "cpus": work.cpus,
            "gelu": f"sigmoid: {len(chosen.gelus)}" if chosen.gelus else "exact",
            "gelus": {name: each.to_dict() for name, each in chosen.gelus.items()},
            "certificate": work.certificate(model).to_dict(),
            "variants": work.log_of_variants,
            "quantized_blocks": kept,
            "sensitivity": found.to_dict(),
            "ratio_to_float32": {"value": ratio.value, "interval": list(ratio.interval)},
            "warnings": [*chosen.table.warnings, *_busy(timed)],
            "ranges": [row.to_dict() for row in rows(chosen.table)],
            **_verdict(found, timed, kept),
            **told,
        }

    def observed(self, source: Path) -> tuple[Path | onnx.ModelProto, Sequence[str]]:
        """See `Form.observed`: the graph whose channels are not equalized."""
        prepared = prepare_graph(source)
        return prepared, quantizable(prepared)

    def told(
        self, job: FormJob, found: Search, shares: Mapping[str, float], images: int
    ) -> dict[str, Any]:
        """Further facts about the search for blocks that stay in float32.

        Args:
            job: What is made.
            found: What the search found.
            shares: Share of the network's products in each block.
            images: How many images decided.
        """
        return {}


def _busy(timed: Choice) -> list[str]:
    """That a comparison with float32 says nothing, if so."""
    return [f"not compared with float32: {timed.doubt}"] if timed.doubt else []


def _verdict(found: Search, timed: Choice, kept: int) -> dict[str, Any]:
    """Whether int8 is worth it here, and why not; time in doubt speaks neither for nor against.

    Time stands alone: `bench` measures the artifacts that are made of the graphs, as they are used.
    """
    reasons, slow, ratio = [], "", timed.ratios["int8"]
    low, high = ratio.interval
    if not ratio.faster and not timed.doubt:
        slow = f"it takes {ratio.value:.2f} (95 %: {low:.2f} to {high:.2f}) of the time of float32"
    if not kept:
        reasons.append("no block can be quantized within the limit: this is the float32 graph")
    if not found.holds:
        drop = 100 * (found.baseline.top1 - found.outcome.top1)
        reasons.append(f"it loses {drop:.2f} points of top-1 on the calibration images")
    worth_it = not (reasons or slow)
    return {"worth_it": worth_it, "why_not": "; ".join(reasons), "why_slow": slow}


def _surely_faster(choice: Choice, name: str) -> bool:
    """Whether a graph is faster than the first one, beyond doubt and by `MARGIN`."""
    return not choice.doubt and choice.ratios[name].interval[1] < 1 - MARGIN


def _part_of(block: str) -> str:
    """The stage of a block: "stages.0" of "stages.0.blocks.1"; "head" is its own."""
    return ".".join(block.split(".")[:2])


def prepare_graph(source: Path) -> onnx.ModelProto:
    """The float32 graph with the passes that help 8-bit kernels too."""
    import onnx_ir as ir

    from pipeline.graphs.passes import finish_portable, for_ort, optimize
    from pipeline.graphs.passes.linear import LinearAsGemm
    from pipeline.graphs.passes.narrow import WidenNarrowMixers
    from pipeline.targets.ort.build import read_graph

    model = read_graph(source)
    widen = [WidenNarrowMixers(width) for width in WIDTHS[1:]]
    first, *others = for_ort(WIDTHS[0])
    optimize(model, [first, others[0], *widen, *others[1:], *finish_portable(), LinearAsGemm()])
    return ir.to_proto(model)


def quantizable(model: onnx.ModelProto) -> list[str]:
    """The tensors of a prepared graph that may be quantized.

    Raises:
        BuildError: There is nothing to quantize.
    """
    from pipeline.graphs.qdq_ort import activations

    tensors = activations(model)
    if not tensors:
        raise BuildError("the graph has no convolution or linear layer to quantize")
    return tensors


def observed_ranges(
    model: onnx.ModelProto, images: Images, method: Method, look: Look = look
) -> tuple[Table, dict[str, Histogram]]:
    """The ranges of all tensors that may be quantized, and what was seen of them.

    Args:
        model: What `prepare_graph` gave.
        images: Calibration images.
        method: How ranges are chosen.
        look: Observes the tensors, see `FormJob`.

    Raises:
        BuildError: There is nothing to quantize.
    """
    from calibration.ranges import ACTIVATIONS_UINT8
    from calibration.table import make_table
    from pipeline.graphs.gelu_int8 import input_ranges

    statistics = look(model, images, quantizable(model))
    table = make_table(statistics, method, ACTIVATIONS_UINT8, images=len(images))
    histograms = {name: each.histogram for name, each in statistics.items()}
    return table.with_ranges(input_ranges(model, histograms)), histograms


def chosen_ranges(prepared: onnx.ModelProto, images: Images, precision: str) -> Quantized:
    """Choose the ranges in which a network is to be fine-tuned.

    Args:
        prepared: What `prepare_graph` gave.
        images: Preprocessed training images.
        precision: Its name.

    Raises:
        BuildError: There is nothing to quantize.
        ConfigError: There is no such precision.
    """
    from calibration.ranges import method_named

    weights_scheme(precision)
    table, _ = observed_ranges(prepared, images, method_named(TRAINING_METHOD))
    ranges = {name: (found.low, found.high) for name, found in table.ranges.items()}
    return Quantized(precision, ranges)


@dataclass(frozen=True)
class _Variant:
    """A float32 graph with its ranges, ready to be quantized.

    Attributes:
        model: The graph.
        table: Ranges of its activations.
        equalized: Channels were equalized between layers.
        weights: Those that are stored in 8 bits already, for all variants.
        errors: What is subtracted from the biases of quantized layers, by output of the layer.
        histograms: What calibration saw of every tensor.
        gelus: How GELUs are computed in 8 bits, by output; the others stay exact.
        safe: Outputs of layers whose weights no activations make saturate.
    """

    model: onnx.ModelProto
    table: Table
    equalized: bool
    weights: StoredWeights
    errors: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    gelus: Mapping[str, GeluFit] = field(default_factory=dict)
    safe: frozenset[str] = frozenset()

    @cached_property
    def candidates(self) -> list[Candidate]:
        """What can be quantized."""
        from pipeline.graphs.qdq_ort import candidates_of

        return candidates_of(self.model)

    @property
    def blocks(self) -> list[str]:
        """The blocks that hold something to quantize, in the order of the graph."""
        return list(dict.fromkeys(candidate.block for candidate in self.candidates))

    def shares(self) -> dict[str, float]:
        """Share of the network's products in what can be quantized of each block."""
        from pipeline.graphs.products import count_products

        products = count_products(self.model)
        total, shares = max(1, sum(products.values())), dict.fromkeys(self.blocks, 0.0)
        for candidate in self.candidates:
            node = self.model.graph.node[candidate.index]
            shares[candidate.block] += products.get(node.output[0], 0) / total
        return shares

    def build(
        self, kinds: Collection[Kind], excluded: Collection[str] = frozenset()
    ) -> onnx.ModelProto:
        """Quantize these kinds of nodes, but for those in excluded blocks."""
        from pipeline.graphs.bias import fold
        from pipeline.graphs.gelu_int8 import replace_gelus
        from pipeline.graphs.qdq_ort import insert_pairs

        chosen = [c for c in self.candidates if c.kind in kinds and c.block not in excluded]
        # A layer that stays in float32 keeps its bias.
        outputs = {name for c in chosen for name in self.model.graph.node[c.index].output}
        errors = {name: error for name, error in self.errors.items() if name in outputs}
        model = fold(self.model, errors) if errors else self.model
        made = insert_pairs(model, self.table.ranges, chosen, self.safe, self.weights)
        return replace_gelus(made, self.gelus) if self.gelus else made


_Decided = tuple[_Variant, tuple["Kind", ...], dict[str, Any], frozenset[str], dict[str, Any]]
"""A variant; kinds of nodes, and what was measured of them; the same of blocks left for speed."""


def _by_onnxruntime(model: Graph, images: Images) -> Logits:
    """Logits of a graph by the runtime that it is made for."""
    import onnx

    from calibration.observe import fixed_batch, open_session

    graph = onnx.load(model) if isinstance(model, Path) else model
    name = graph.graph.output[0].name
    run = open_session(graph, [name])
    fixed = fixed_batch(graph)
    return in_batches(lambda part: run(part)[name], images, fixed or BATCH, fixed or 1)


class _Work:
    """The decisions of one conversion, in order."""

    def __init__(self, job: FormJob, images: CalibrationSet, prepared: onnx.ModelProto) -> None:
        from calibration.judge import Judge
        from calibration.kept import Kept
        from calibration.ranges import method_named
        from pipeline.graphs.qdq_ort import StoredWeights

        self.job, self.images, self.prepared = job, images, prepared
        self.method = method_named(str(job.options.get("method", "mse")))
        self.cpus = str(job.options.get("cpus", "any"))
        self.gelu = str(job.options.get("gelu", "auto"))
        self.kept = Kept(job.evaluations)
        self.judge = Judge(prepared, images, DECISION_IMAGES, _by_onnxruntime, self.kept)
        self.weights = StoredWeights()
        self._means: tuple[onnx.ModelProto, list[Means]] | None = None
        self.log_of_variants: dict[str, dict[str, float]] = {}

    def decide(self) -> _Decided:
        """By evidence: see the module's description."""
        chosen = self.best_variant()
        kinds, measured_kinds = self.choose_kinds(chosen)
        chosen = self.with_corrected_biases(chosen, kinds)
        chosen = self.with_gelus(chosen, kinds)
        # Behind GELU: what is slower in 8 bits with GELU in float32 may be faster without.
        slow, measured_parts = self.choose_parts(chosen, kinds)
        return chosen, kinds, measured_kinds.to_dict(), slow, measured_parts

    def as_trained(self, trained: Quantized) -> _Decided:
        """The graph that the network was fine-tuned in: there is nothing left to choose.

        Raises:
            BuildError: It was fine-tuned in another graph.
        """
        from pipeline.graphs.qdq_ort import Kind, StoredWeights

        seen = self._variant(self.prepared, equalized=False)
        chosen = replace(
            seen,
            table=seen.table.with_ranges(ranges_of(trained, self.prepared)),
            weights=StoredWeights(weights_scheme(trained.precision)),
            safe=frozenset(name for node in self.prepared.graph.node for name in node.output),
        )
        self.job.log(f"quantized as the network was fine-tuned: {trained.precision}")
        return chosen, tuple(Kind), {}, frozenset(), {}

    def best_variant(self) -> _Variant:
        """The graph as it is, or with channels equalized between layers: what errs less."""
        from calibration.observe import magnitudes
        from pipeline.graphs.equalize import equalize, tensors

        plain = self._variant(self.prepared, equalized=False)
        error = self._error("plain", plain)
        images = self.images.images[:DECISION_IMAGES]
        even = equalize(self.prepared, magnitudes(self.prepared, images, tensors(self.prepared)))
        if not even.scales:
            return plain
        other = self._variant(even.model, equalized=True)
        return other if self._error("equalized", other) < error else plain

    def _variant(self, model: onnx.ModelProto, *, equalized: bool) -> _Variant:
        count = len(self.images.images)
        self.job.log(f"observing the network over {count} images")
        table, histograms = observed_ranges(model, self.images.images, self.method, self.job.look)
        safe = frozenset(name for node in model.graph.node for name in node.output)
        return _Variant(
            model,
            table,
            equalized,
            self.weights,
            histograms=histograms,
            safe=safe if self.cpus == "any" else frozenset(),
        )

    def _error(self, name: str, variant: _Variant, kinds: tuple[Kind, ...] | None = None) -> float:
        from pipeline.graphs.qdq_ort import Kind

        return self._error_of(name, variant.build(kinds or tuple(Kind)))

    def _error_of(self, name: str, graph: onnx.ModelProto) -> float:
        outcome = self.judge(graph)
        self.log_of_variants[name] = {
            "top1": outcome.top1,
            "agreement": outcome.agreement,
            "logit_error": outcome.logit_error,
        }
        self.job.log(
            f"{name}: top-1 {outcome.top1:.2%}, agreement {outcome.agreement:.2%}, "
            f"error of the logits {outcome.logit_error:.4f}"
        )
        return outcome.logit_error

    def choose_kinds(self, variant: _Variant) -> tuple[tuple[Kind, ...], Choice]:
        """The kinds of nodes with which the graph is fastest.

        Sums and joins are none of them where they make the most of the error: a transformer's class
        token is lost in the steps of the tokens that it is joined with and added to.
        """
        from pipeline.graphs.qdq_ort import Kind

        layers = (Kind.CONVOLUTION, Kind.DEPTHWISE, Kind.LINEAR)
        sets = {
            "all": tuple(Kind),
            "layers": layers,
            "layers but depthwise": (Kind.CONVOLUTION, Kind.LINEAR),
        }
        graphs = {name: variant.build(kinds) for name, kinds in sets.items()}
        errors = {name: self._error_of(name, graphs[name]) for name in ("all", "layers")}
        if errors["all"] > MOST_OF_SUMS * errors["layers"]:
            del graphs["all"]
            self.job.log(
                "sums, splits and joins stay in float32, where most of the error is theirs"
            )
        choice = self._measure(graphs)
        self.job.log(f"quantized kinds: {choice.name}")
        return sets[choice.name], choice

    def choose_parts(
        self, variant: _Variant, kinds: tuple[Kind, ...]
    ) -> tuple[frozenset[str], dict[str, Any]]:
        """Blocks that stay in float32 because the graph is faster so, and what was measured.

        A part is a stage, or what stands beside the stages: what one of its blocks gains is less
        than a short measurement can tell. Each is tried alone; those that are slow are then tried
        together, in sessions of their own: two sessions of one graph have differed by 6 %.
        """
        parts: dict[str, set[str]] = {}
        for block in variant.blocks:
            parts.setdefault(_part_of(block), set()).add(block)
        if len(parts) < 2:
            return frozenset(), {}
        graphs = {"all": variant.build(kinds)} | {
            f"all but {part}": variant.build(kinds, blocks) for part, blocks in parts.items()
        }
        choice = self._measure(graphs)
        slow = [part for part in parts if _surely_faster(choice, f"all but {part}")]
        if len(slow) == len(parts):
            # Nothing would be left; that float32 is faster is for the final comparison to say.
            slow = []
        blocks = frozenset(block for part in slow for block in parts[part])
        measured = choice.to_dict()
        if slow:
            name = f"all but {', '.join(slow)}"
            again = self._measure({"all": graphs["all"], name: variant.build(kinds, blocks)})
            measured["together"] = again.to_dict()
            if not _surely_faster(again, name):
                self.job.log(f"together no faster in float32: {', '.join(slow)}")
                return frozenset(), measured
            self.job.log(f"in float32, since that is faster: {', '.join(slow)}")
        return blocks, measured

    def with_corrected_biases(self, variant: _Variant, kinds: tuple[Kind, ...]) -> _Variant:
        """The variant with biases corrected, unless that errs more than chance makes of it."""
        from pipeline.graphs.bias import correct_biases

        quantized, images = variant.build(kinds), self.images.images
        wanted = self._float_means(variant.model)
        errors = correct_biases(variant.model, quantized, images, wanted=wanted).errors
        other = replace(variant, errors=errors)
        before = self._error("chosen kinds", variant, kinds)
        after = self._error("biases corrected", other, kinds)
        return other if after <= before * (1 + CHANCE) else variant

    def _float_means(self, model: onnx.ModelProto) -> list[Means]:
        """What corrections of biases aim at: the same for all forms of one graph."""
        from pipeline.graphs.bias import float_means

        if self._means is None or self._means[0] is not model:
            self._means = model, float_means(model, self.images.images)
        return self._means[1]

    def with_gelus(self, variant: _Variant, kinds: tuple[Kind, ...]) -> _Variant:
        """The variant with as many GELUs in 8 bits as cost nothing, biases corrected anew.

        All are tried, then those that lie nearest to the exact function: three in four, half, one
        in four. One image more or less is chance; logits must not err more, but for a margin.
        """
        from pipeline.graphs.gelu_int8 import fit_gelus

        fits = fit_gelus(variant.build(kinds), variant.histograms)
        if self.gelu == "exact" or not fits:
            return variant
        before = self._error("GELU exact", variant, kinds)
        order = sorted(fits, key=lambda name: fits[name].excess)
        for share in GELU_SHARES:
            some = {name: fits[name] for name in order[: max(1, round(share * len(order)))]}
            plain = replace(variant, errors={}, gelus=some)
            other = self.with_corrected_biases(plain, kinds)
            name = f"{len(some)} GELUs in 8 bits"
            holds = self._error(name, other, kinds) <= before * MOST_OF_GELUS
            exact, tried = self.log_of_variants["GELU exact"], self.log_of_variants[name]
            lost = exact["top1"] - tried["top1"]
            if self.gelu == "sigmoid" or (holds and lost <= 1 / self.judge.count + 1e-9):
                return other
        return variant

    def certificate(self, model: onnx.ModelProto) -> Certificate:
        """On which CPUs the graph gives the answers that were judged here."""
        from pipeline.targets.ort.certificate import certify

        return certify(model, self.judge)

    def search(self, variant: _Variant, kinds: tuple[Kind, ...], slow: frozenset[str]) -> Search:
        """The blocks that must stay in float32 for accuracy, beside those that do already."""
        from calibration.sensitivity import Groups, Limits, search

        def evaluate(excluded: Groups) -> Outcome:
            outcome = self.judge(variant.build(kinds, excluded | slow))
            kept = ", ".join(sorted(excluded)) or "nothing"
            self.job.log(f"top-1 {outcome.top1:.2%} with {kept} in float32")
            return outcome

        # A single image is less than so few of them can tell.
        allowed = max(float(self.job.options.get("max_top1_drop", 0.003)), 1 / self.judge.count)
        limits = Limits(max_top1_drop=allowed)
        blocks = [block for block in variant.blocks if block not in slow]
        return search(blocks, evaluate, baseline=self.judge.baseline, limits=limits)

    def compare_latency(self, model: onnx.ModelProto) -> Choice:
        """Time of the graph, "int8", relative to that of our own float32 build."""
        return self._measure({"float32": None, "int8": model})

    def _measure(self, graphs: Mapping[str, onnx.ModelProto | None]) -> Choice:
        """Compare latencies, with all threads; None stands for our float32 build.

        At the batch that the model is built for, or at batch 1 where that is dynamic.
        """
        import onnx

        from pipeline.core.machine import granted
        from pipeline.targets.ort.session import Settings
        from pipeline.targets.ort.tune import Candidate as Way
        from pipeline.targets.ort.tune import Trial, choose

        batch = self.job.batch or 1
        with tempfile.TemporaryDirectory(prefix="int8-") as name:
            folder = Path(name)
            candidates = {}
            for label, graph in graphs.items():
                file = f"{label}.onnx"
                if graph is None:
                    file = _write_float32(self.job.source, folder, self.job.log)
                else:
                    onnx.save(graph, folder / file)
                candidates[label] = Way(file, Settings())
            images = whole_batches(self.images.images[:batch], batch)
            trial = Trial(folder, candidates, granted(), images, MEASURE_SECONDS)
            return choose(trial, MARGIN, self.kept)


def _write_float32(source: Path, folder: Path, log: Callable[[str], None]) -> str:
    """Write our own float32 build, in the blocked layout where there is one."""
    import onnx_ir as ir

    from pipeline.graphs.passes import finish_blocked, finish_portable, for_ort, optimize
    from pipeline.targets.ort.build import read_graph
    from pipeline.targets.ort.layout import PROBE, block_size, write_probe

    write_probe(folder / PROBE)
    block = block_size(folder / PROBE)
    model = read_graph(source)
    finish = finish_portable() if block is None else finish_blocked(block)
    optimize(model, [*for_ort(block), *finish])
    ir.save(model, folder / "float32.onnx")
    log(f"float32 for comparison: blocks of {block} channels")
    return "float32.onnx"
