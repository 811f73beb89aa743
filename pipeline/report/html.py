"""The report as one HTML file that needs nothing else: no network, no script, no font.

The words come from `pipeline.report.view`, the plots from `pipeline.report.charts`, the layout from
templates/report.html.j2. The same results give the same bytes.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core import plots
from pipeline.core.figures import State
from pipeline.core.published import DEVICES
from pipeline.report import charts, facts, overview, provenance, view
from pipeline.report.results import Results

TEMPLATES = Path(__file__).parent / "templates"

_ON_DEVICES = ("on_devices", "agreement_by_compute_units", "outside_the_neural_engine")
"""Facts of measurements on other machines than this: tables of their own."""


def page(results: Results) -> str:
    """The whole report.

    Args:
        results: What results.json holds; parts that a failed run lacks are left out.
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
    return environment.get_template("report.html.j2").render(_content(results))


def _content(results: Results) -> dict[str, Any]:
    """What the template lays out."""
    cards = [view.card(results, artifact) for artifact in results["artifacts"]]
    return {
        "name": results["name"],
        "date": results["date"],
        "config": results["config"],
        "machine": results["machine"],
        "verdict": overview.verdict(results),
        "alerts": list(overview.alerts(results, cards)),
        "cards": cards,
        "batch": view.first_batch(results),
        "pytorch": {
            "top1": view.figure(view.reference(results).get("top1"), "top1"),
            "latency": view.figure(view.baseline(results).to_dict(), "latency"),
        },
        "choices": list(overview.choices(results)),
        "not_measured": overview.missing(results, State.NOT_MEASURED),
        "emulated": overview.missing(results, State.EMULATED),
        "plots": charts.all_plots(results),
        "benches": list(_benches(results)),
        "graph": _graph(results),
        "calibration": _calibration(results),
        "ranges": list(_ranges(results)),
        "published": results["published"],
        "published_devices": DEVICES,
        "classes": view.class_count(results),
        "imagenet": view.class_count(results) == view.IMAGENET_CLASSES,
        "parts": list(provenance.parts(results)),
        "environment": facts.blocks("This machine", results["machine"]),
        "versions": results["versions"],
        "steps": results["steps"],
        "commands": list(_commands(results)),
    }


def _benches(results: Results) -> Iterator[dict[str, Any]]:
    """What was measured, by target: the baseline's timings, and the circumstances."""
    for target in results["bench"]:
        measured = view.bench_facts(results, target)
        on_devices = {key: measured[key] for key in _ON_DEVICES if measured.get(key)}
        if "batches" not in measured and not on_devices:
            continue
        devices = measured.get("devices", {})
        shown = {"batches", "end_to_end", "cold_start_ms", "latency", "devices", "target"}
        shown |= set(_ON_DEVICES)
        rest = {key: value for key, value in measured.items() if key not in shown}
        yield {
            "target": target,
            "devices": {view.shown(name): device for name, device in devices.items()},
            "timings": [t for runner in devices for t in view.timings(measured, runner)],
            "comparisons": [
                (view.shown(runner), c)
                for runner in devices
                for c in view.comparisons(measured, runner)
            ],
            "on_devices": facts.blocks("", on_devices),
            "facts": facts.blocks("", rest),
        }


def _graph(results: Results) -> list[facts.Block]:
    """Export and simplification: nodes before and after, and how close to PyTorch."""
    export = (results.get("export") or {}).get("facts", {})
    simplified = (results.get("onnx") or {}).get("facts", {})
    rows: dict[str, Any] = {}
    if export:
        network = export.get("network", {})
        rows |= {
            "opset": export.get("opset"),
            "nodes as exported": export.get("nodes"),
            "largest difference to PyTorch, of the largest logit": export.get(
                "difference_to_pytorch"
            ),
            "input shape": " x ".join(map(str, network.get("input_shape", ()))),
            "classes": network.get("labels", ()),
        }
    if simplified:
        rows |= {
            "simplified": simplified.get("simplified"),
            "nodes before simplification": simplified.get("nodes_before"),
            "nodes after simplification": simplified.get("nodes"),
        }
        if simplified.get("why_not"):
            rows["why not simplified"] = simplified["why_not"]
    found = facts.blocks("", rows) if rows else []
    if preprocess := export.get("network", {}).get("preprocess"):
        # Elsewhere a size is in bytes.
        named = {"side in pixels" if k == "size" else k: v for k, v in preprocess.items()}
        found += facts.blocks("Preprocessing", named)
    for name, form in results.get("forms", {}).items():
        hidden = {"network", "ranges"}
        own = {k: v for k, v in form.get("facts", {}).items() if k not in hidden}
        found += facts.blocks(f"Form {name}", own)
    return found


def _calibration(results: Results) -> list[facts.Block]:
    own = (results.get("calibration") or {}).get("facts", {})
    return facts.blocks("", own) if own else []


def _ranges(results: Results) -> Iterator[dict[str, Any]]:
    """Ranges of quantized tensors with their histograms, wherever an artifact tells them."""
    forms = [(f"form {name}", form) for name, form in results.get("forms", {}).items()]
    built = [(view.full_name(artifact), artifact) for artifact in results["artifacts"]]
    for name, part in (*forms, *built):
        rows = part.get("facts", {}).get("ranges")
        if rows:
            yield {
                "name": name,
                "rows": [
                    {
                        "tensor": row["tensor"],
                        "seen": _pair(row["seen"]),
                        "chosen": _pair(row["chosen"]),
                        "clipped": f"{100 * row['clipped']:.0f} %",
                        "svg": plots.histogram(
                            f"{view.anchor(name)}-range-{i}",
                            row["histogram"],
                            (row["seen"][0], row["seen"][1]),
                            (row["chosen"][0], row["chosen"][1]),
                        ),
                    }
                    for i, row in enumerate(rows)
                ],
            }


def _pair(ends: Any) -> str:
    return f"{ends[0]:.4g} to {ends[1]:.4g}"


def _commands(results: Results) -> Iterator[tuple[str, str]]:
    """How to get the same again, and what is still missing."""
    config = shlex.quote(results["config"])
    yield (
        "Build, validate and measure again; what is up to date does not run",
        (f"python -m pipeline run {config}"),
    )
    folder = str(results.get("folder", ""))
    place = f" --output {shlex.quote(str(Path(folder).parent))}" if folder else ""
    yield (
        "Hash every file again and open every model",
        (f"python -m pipeline check {shlex.quote(results['name'])}{place}"),
    )
    for target in results["bench"]:
        there = "batches" in view.bench_facts(results, target)
        yield (
            f"Measure {target} again" if there else f"Measure {target}, on a machine that runs it",
            f"python -m pipeline bench --config {config} --target {target}",
        )
    yield "See what each target needs and how to get it", "python -m pipeline doctor"
