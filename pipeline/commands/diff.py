"""`diff`: where does an artifact leave the reference, layer by layer?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from pipeline.api.files import GRAPH, NormalizesItselfError, Stated, open_file
from pipeline.api.model import Answering
from pipeline.commands.artifacts import one_artifact
from pipeline.commands.engine import is_engine, open_engine
from pipeline.commands.inspect import pixels_of
from pipeline.config import Config
from pipeline.core.errors import ArtifactError, InputError, UnsupportedOperatorError, about
from pipeline.core.figures import compare
from pipeline.core.preprocess import Pictures, Preprocess
from pipeline.core.screen import styled
from pipeline.report.terminal import render
from pipeline.stages.build import BuildStep
from pipeline.targets.registry import TARGETS, able

_LONGEST_MODULE = 48


@dataclass(frozen=True)
class Difference:
    """An artifact beside PyTorch.

    Attributes:
        text: A table of its modules, and where the error jumps.
        plain: The same for JSON: target, precision, `jump`, the row of the module at fault or null,
            and `layers`, all rows; null where a value is not finite.
    """

    text: str
    plain: Mapping[str, Any]


def diff(config: Config, target: str | None, *, precision: str | None, images: int) -> Difference:
    """Error of a built artifact against PyTorch, layer by layer, and where it jumps.

    Raises:
        InputError: The artifact is not built, or the target cannot compare layer by layer.
        ArtifactError: What it was made from is damaged, or of another network.
    """
    target = target or _first_able(config)
    with one_artifact(config, target, precision, images) as (context, step, chosen):
        _verify(step)
        module = context.source.fused()
        rows = TARGETS[target].diff(step.artifact(), module, chosen, *step.graphs())
        chosen_precision = step.precision
    if rows is None:
        raise InputError(f"{target} has no comparison by layer; {', '.join(able('diff'))} can tell")
    at_fault = next((row for row in rows if row["jump"]), None)
    plain = {
        "target": target,
        "precision": chosen_precision,
        "jump": _finite(at_fault) if at_fault else None,
        "layers": [_finite(row) for row in rows],
    }
    return Difference(_text(rows, at_fault), plain)


def diff_files(
    path: Path, reference: Path, stated: Stated, *, images: Path | None, limit: int
) -> Difference:
    """Answers of a model's file beside those of another, on the same images.

    Two ONNX graphs are compared layer by layer, too, as far as names of tensors are shared.

    Args:
        path: An ONNX graph, a Core ML package, or an engine of TensorRT in its artifact's folder.
        reference: What is right: one of these, too.
        stated: What the files do not say of their images.
        images: A folder of images; None for seeded noise.
        limit: Most images.

    Raises:
        InputError: A file is no model, they do not belong together, or something has to be stated.
    """
    with _opened(path, stated) as model, _opened(reference, stated) as right:
        if model.network.input_shape != right.network.input_shape:
            raise InputError(
                f"{path} takes images of {model.network.input_shape} (channels, height, width), "
                f"{reference} of {right.network.input_shape}: these are two networks"
            )
        if len(model.labels) != len(right.labels):
            raise InputError(
                f"{path} has {len(model.labels)} classes, {reference} {len(right.labels)}: these "
                "are two networks"
            )
        preprocess = Preprocess.from_dict(right.network.preprocess)
        pixels, how = pixels_of(right.pixels, preprocess, images, limit, "--photos")
        compared = compare(model(pixels), right(pixels))
    rows = _rows_of_graphs(path, reference, Pictures(pixels, preprocess))
    at_fault = next((row for row in rows if row["jump"]), None)
    plain = {
        "file": str(path),
        "reference": str(reference),
        "images": len(pixels),
        "same_class": len(pixels) - compared.flips,
        "relative_error": _number(compared.relative_error),
        "max_difference": _number(compared.max_difference),
        "cosine": _number(compared.cosine),
        "finite": compared.finite,
        "jump": _finite(at_fault) if at_fault else None,
        "layers": [_finite(row) for row in rows],
    }
    words = (
        f"{path} beside {reference}, on {how}: {plain['same_class']} of {len(pixels)} have the "
        f"same class, relative error of the logits {compared.relative_error:.2g}, largest "
        f"difference {compared.max_difference:.2g}"
    )
    finite = "" if compared.finite else "; some of its logits are not finite"
    layers = [_text(rows, at_fault)] if rows else []
    return Difference("\n".join([*layers, words + finite]), plain)


def _opened(path: Path, stated: Stated) -> Answering:
    """The model's file; what it says itself, or does itself, it is not told."""
    if is_engine(path):
        return open_engine(path)
    with about(str(path)):
        try:
            return open_file(path, stated)
        except NormalizesItselfError:
            return open_file(path, replace(stated, mean=None, std=None))


def _rows_of_graphs(path: Path, reference: Path, pictures: Pictures) -> list[dict[str, Any]]:
    """Errors by module of two graphs; none where that cannot be told."""
    from pipeline.emulate.layers import rows
    from pipeline.emulate.onnx import layers

    if {path.suffix.lower(), reference.suffix.lower()} != {GRAPH}:
        return []
    try:
        return rows(layers.compare(path, reference, pictures.images))
    except (ArtifactError, UnsupportedOperatorError):
        return []  # other names of tensors, or an operation that the executor does not know


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _first_able(config: Config) -> str:
    known = able("diff")
    return next((name for name in known if config.target(name) is not None), known[0])


def _verify(step: BuildStep) -> None:
    """Read what the artifact was made from as it was made."""
    if step.graph is not None:
        for needed in (step.graph, step.graph.simplify, step.graph.simplify.export):
            needed.verified()


def _text(rows: Sequence[Mapping[str, Any]], at_fault: Mapping[str, Any] | None) -> str:
    # A table is cut at the width of the screen: what is cut must not be the names.
    longest = max(len(row["module"]) for row in rows)
    module = Column("module", min_width=min(longest, _LONGEST_MODULE), overflow="fold")
    own = any(row["own"] is not None for row in rows)
    told = ("type", "line", "relative", "its own", "") if own else ("line", "relative", "")
    table = Table(module, "operation", *told, box=None)
    for row in rows:
        cells = [row["module"], row["operation"], str(row["line"]), f"{row['relative']:.1e}"]
        if own:
            cells.insert(2, row["dtype"])
            cells.append(f"{row['own']:.1e}")
        table.add_row(*cells, styled("jumps here", "red") if row["jump"] else "")
    return render(table, _verdict(at_fault))


def _verdict(at_fault: Mapping[str, Any] | None) -> str:
    if at_fault is None:
        return "the error grows slowly: it jumps nowhere"
    place = at_fault["module"] or "the network itself"
    return f"the error jumps at {place} ({at_fault['operation']} {at_fault['tensor']})"


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row that JSON can hold."""
    plain = dict(row)
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            plain[key] = None
    return plain
