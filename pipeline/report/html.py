"""The report as one HTML file that needs nothing else: no network, no font, one script of its own.

The script only serves the buttons that copy; a policy in the page lets the browser run no other.

The words come from `pipeline.report.view`, the plots from `pipeline.report.charts`, the layout from
templates/report.html.j2. The same results give the same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import plots
from pipeline.core.figures import RangeRow, State
from pipeline.core.plain import plain
from pipeline.core.published import DEVICES
from pipeline.report import charts, cpu_classes, facts, overview, provenance, resizes, view
from pipeline.report.gallery import Flipped
from pipeline.report.model import Part, Run
from pipeline.steps.facts.bench import Measured

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def page(run: Run, flipped: Sequence[Flipped] = ()) -> str:
    """The whole report; parts that a failed run lacks are left out.

    Args:
        run: What it tells of.
        flipped: Images that artifacts answer otherwise than PyTorch.
    """
    return template("report.html.j2").render(_content(run), flipped=flipped)


@functools.cache
def template(name: str) -> jinja2.Template:
    """A page's layout, by the name of its file: all text in it is escaped.

    Compiled once a process: that takes longer than to fill it.
    """
    import jinja2  # here, so that the command line answers without it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"inlined": _inlined, "policy": policy}
    return environment.get_template(name)


def _inlined(name: str) -> Markup:
    """A file of the templates as it stands, for an element whose content is not escaped."""
    from markupsafe import Markup

    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def policy(style: str, script: str = "") -> str:
    """What a browser may do for a page: show images inside of it, and what is named by its hash.

    Names in a page are anybody's. All are escaped; should one get through, it runs and loads
    nothing.

    Args:
        style: The whole content of the page's `<style>`.
        script: The same of its `<script>`; "" for none.
    """
    allowed = [
        "default-src 'none'",
        f"style-src {_hash_source(style)}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    if script:
        allowed.append(f"script-src {_hash_source(script)}")
    return "; ".join(allowed)


def _hash_source(text: str) -> str:
    """How a policy names an inline element by its content (W3C, Content Security Policy 3)."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _content(run: Run) -> dict[str, Any]:
    """What the template lays out."""
    cards = [view.card(run, artifact) for artifact in run.artifacts]
    return {
        "name": run.name,
        "date": run.date,
        "config": run.config,
        "machine": run.machine,
        "verdict": overview.verdict(run),
        "alerts": list(overview.alerts(run, cards)),
        "cards": cards,
        "batch": view.first_batch(run),
        "pytorch": {
            "top1": view.figure(view.TOP1, run.pytorch.top1),
            "latency": view.figure(
                view.LATENCY, view.baseline(run), doubt=view.baseline_doubt(run)
            ),
        },
        "uses": list(overview.uses(run, cards)),
        "choices": [
            *overview.referee(run),
            *overview.choices(run),
            *cpu_classes.lines(run),
            *overview.worst_class(run),
        ],
        "cost": view.cost(run),
        "not_measured": overview.missing(run, State.NOT_MEASURED),
        "emulated": overview.missing(run, State.EMULATED),
        "plots": charts.all_plots(run),
        "benches": list(_benches(run)),
        "graph": _graph(run),
        "calibration": _calibration(run),
        "ranges": list(_ranges(run)),
        "resizes": list(resizes.tables(run)),
        "published": run.published_of_it,
        "published_devices": DEVICES,
        "parts": list(provenance.parts(run)),
        "environment": facts.blocks("This machine", run.machine.to_facts()),
        "versions": run.versions,
        "steps": run.steps,
        "commands": list(_commands(run)),
    }


@dataclass(frozen=True)
class Bench:
    """What was measured of a target.

    Attributes:
        target: The target.
        devices: What ran each runner.
        timings: Of all runners.
        comparisons: Of each runner with others.
        elsewhere: What was told beside this machine's measurement, such as of other devices.
        facts: The circumstances.
    """

    target: str
    devices: Mapping[str, str]
    timings: Sequence[view.Timing]
    comparisons: Sequence[tuple[str, view.Comparison]]
    elsewhere: Sequence[facts.Block]
    facts: Sequence[facts.Block]


def _benches(run: Run) -> Iterator[Bench]:
    """What was measured, by target: the baseline's timings, and the circumstances."""
    for target, bench in run.bench.items():
        told = {key: value for key, value in bench.facts.more.items() if value} if bench else {}
        elsewhere = facts.blocks("", told)
        measured = run.measured(target)
        if measured:
            yield _bench(target, measured, elsewhere)
        elif elsewhere:
            yield Bench(target, {}, (), (), elsewhere, ())


def _trust(measured: Measured) -> dict[str, str]:
    """By runner, what was found of its answers, the audit and its memory."""
    told = {}
    for name in measured.devices:
        parts = (measured.answers, measured.repeated, measured.memory)
        found = [part[name].words for part in parts if name in part]
        if found:
            told[view.shown(name)] = "; ".join(found)
    return told


def _bench(target: str, measured: Measured, elsewhere: Sequence[facts.Block]) -> Bench:
    circumstances = {
        "protocol": plain(measured.protocol),
        "machine": measured.machine.to_facts(),
        "load_before": measured.load_before,
        "load_during": measured.load_during,
        "date": measured.date,
        "distinct_images": measured.distinct,
    }
    judged = {**measured.answers, **measured.repeated, **measured.memory}
    if judged:
        circumstances["what speaks for it"] = _trust(measured)
    if measured.throughput:
        circumstances["throughput"] = plain(measured.throughput)
    for runner, state in measured.device_state.items():
        circumstances[f"device of {runner}"] = state.to_facts()
    return Bench(
        target,
        {view.shown(name): device for name, device in measured.devices.items()},
        [timing for runner in measured.devices for timing in view.timings(measured, runner)],
        [
            (view.shown(runner), comparison)
            for runner in measured.devices
            for comparison in view.comparisons(measured, runner)
        ],
        elsewhere,
        facts.blocks("", circumstances),
    )


def _graph(run: Run) -> list[facts.Block]:
    """Export and simplification: nodes before and after, and how close to PyTorch."""
    rows: dict[str, Any] = {}
    if run.export:
        export = run.export.facts
        rows |= {
            "opset": export.opset,
            "nodes as exported": export.nodes,
            "largest difference to PyTorch, of the largest logit": export.difference_to_pytorch,
            "input shape": " x ".join(map(str, export.network.input_shape)),
            "classes": export.network.labels,
        }
    if run.simplified:
        simplified = run.simplified.facts
        rows |= {
            "simplified": simplified.simplified,
            "nodes before simplification": simplified.nodes_before,
            "nodes after simplification": simplified.nodes,
        }
        if simplified.why_not:
            rows["why not simplified"] = simplified.why_not
    found = facts.blocks("", rows) if rows else []
    if run.network and run.network.preprocess:
        # Elsewhere a size is in bytes.
        named = {
            "side in pixels" if key == "size" else key: value
            for key, value in run.network.preprocess.items()
        }
        found += facts.blocks("Preprocessing", named)
    for name, form in run.forms.items():
        told = {**form.facts.more}
        if form.facts.why_not:
            told["why_not"] = form.facts.why_not
        if form.facts.why_slow:
            told["why_slow"] = form.facts.why_slow
        if form.facts.repair:
            told["repair"] = form.facts.repair.to_dict()
        found += facts.blocks(f"Form {name}", told | _seconds(form))
    return found


def _seconds(part: Part[Any]) -> dict[str, float]:
    return {} if part.build_seconds is None else {"build_seconds": part.build_seconds}


def _calibration(run: Run) -> list[facts.Block]:
    if run.calibration is None:
        return []
    return facts.blocks("", run.calibration.facts.to_facts() | _seconds(run.calibration))


@dataclass(frozen=True)
class RangeView:
    """A quantized tensor's range in words, with its histogram as an `<svg>`."""

    tensor: str
    seen: str
    chosen: str
    clipped: str
    svg: str


@dataclass(frozen=True)
class Ranges:
    """Ranges of one graph or artifact."""

    name: str
    rows: Sequence[RangeView]


def _ranges(run: Run) -> Iterator[Ranges]:
    """Ranges of quantized tensors with their histograms, wherever an artifact tells them."""
    for name, form in run.forms.items():
        if form.facts.ranges:
            yield _ranges_of(f"form {name}", form.facts.ranges)
    for artifact in run.artifacts:
        if artifact.built and artifact.built.facts.ranges:
            yield _ranges_of(artifact.name, artifact.built.facts.ranges)


def _ranges_of(name: str, rows: Sequence[RangeRow]) -> Ranges:
    shown = []
    for i, row in enumerate(rows):
        identity = f"{view.anchor(name)}-range-{i}"
        svg = plots.histogram(identity, row.histogram, row.seen, row.chosen)
        clipped = f"{100 * row.clipped:.0f} %"
        shown.append(RangeView(row.tensor, _pair(row.seen), _pair(row.chosen), clipped, svg))
    return Ranges(name, shown)


def _pair(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.4g} to {ends[1]:.4g}"


def _commands(run: Run) -> Iterator[tuple[str, str]]:
    """How to get the same again, and what is still missing."""
    config = shlex.quote(run.config)
    yield (
        "Build, validate and measure again; what is up to date does not run",
        (f"python -m pipeline run {config}"),
    )
    place = shlex.quote(str(Path(run.folder).parent))
    yield (
        "Hash every file again and open every model",
        (f"python -m pipeline check {shlex.quote(run.name)} --output {place}"),
    )
    for target in run.bench:
        there = run.measured(target) is not None
        yield (
            f"Measure {target} again" if there else f"Measure {target}, on a machine that runs it",
            f"python -m pipeline bench --config {config} --target {target}",
        )
    yield "See what each target needs and how to get it", "python -m pipeline doctor"
