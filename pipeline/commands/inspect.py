"""`inspect`: what is in somebody's model, and does half precision hold its values?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.api.files import GRAPH, Stated, is_model_file, open_file
from pipeline.api.model import Answering
from pipeline.commands import engine
from pipeline.core.errors import DataError, InputError, UnsupportedOperatorError
from pipeline.core.listing import images_below
from pipeline.core.network import Pixels
from pipeline.core.preprocess import Pictures, Preprocess
from pipeline.core.screen import styled
from pipeline.report.terminal import render
from pipeline.report.text import size as in_megabytes
from pipeline.steps.facts.accuracy import FLOAT16_LIMIT

NOISE = 8
"""Images of seeded noise where no others are given."""


@dataclass(frozen=True)
class Inspected:
    """What was found, for people and for JSON."""

    text: str
    plain: Mapping[str, Any]


@dataclass(frozen=True)
class Value:
    """The range of a tensor.

    Attributes:
        tensor: Its name.
        operation: What makes it.
        module: Where that belongs; "" if nobody knows.
        largest: Its largest magnitude; None where it is not finite.
        headroom: How often that fits into float16; below 1 it does not.
    """

    tensor: str
    operation: str
    module: str
    largest: float | None
    headroom: float


@dataclass(frozen=True)
class _Seen:
    """What a file holds, whatever its format."""

    kind: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    operations: Counter[str]
    more: Mapping[str, Any]


def inspect(path: Path, stated: Stated, *, images: Path | None, limit: int, top: int) -> Inspected:
    """Operations, inputs and outputs of a model's file, and the ranges of its values.

    Args:
        path: An ONNX graph, the folder of a Core ML package, or an engine of TensorRT in its
            artifact's folder, of which no values are known.
        stated: What the file does not say of its images.
        images: A folder of images; None for seeded noise.
        limit: Most images.
        top: Tensors to show, those that fit into float16 least often.

    Raises:
        InputError: The file is no model, or something has to be stated.
        ArtifactError: It is damaged.
    """
    if engine.is_engine(path):
        return Inspected(*engine.look(path))
    if not is_model_file(path) or not path.exists():
        what = "is no model's file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: name an ONNX graph (.onnx) or a .mlpackage")
    is_graph = path.suffix.lower() == GRAPH
    seen = _of_graph(path) if is_graph else _of_package(path)
    lines = [f"{path}: {seen.kind}, {in_megabytes(_bytes(path))}"]
    lines += [f"takes {each}" for each in seen.inputs]
    lines += [f"gives {each}" for each in seen.outputs]
    lines += [f"{name}: {value}" for name, value in seen.more.items()]
    operations = Table("operation", "times", box=None)
    for name, count in seen.operations.most_common():
        operations.add_row(name, str(count))
    values, how = _ranges(path, stated, images, limit)
    parts: list[Any] = [*lines, operations]
    if values:
        parts.append(_table(values, top))
    parts.append(_verdict(values, how))
    plain = {
        "file": str(path),
        "kind": seen.kind,
        "inputs": list(seen.inputs),
        "outputs": list(seen.outputs),
        **seen.more,
        "operations": dict(seen.operations.most_common()),
        "images": how,
        "ranges": [{**asdict(v), "headroom": _finite(v.headroom)} for v in values],
    }
    return Inspected(render(*parts), plain)


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _of_graph(path: Path) -> _Seen:
    import onnx

    from pipeline.graphs.given import parameters, ports
    from pipeline.graphs.products import count_products

    inputs, outputs = ports(path)
    model = onnx.load(path, format="protobuf")
    versions = {e.domain or "ai.onnx": e.version for e in model.opset_import}
    return _Seen(
        kind="ONNX graph",
        inputs=[f"{p.name}: {p.dtype} ({', '.join(p.sides)})" for p in inputs],
        outputs=[f"{p.name}: {p.dtype} ({', '.join(p.sides)})" for p in outputs],
        operations=Counter(node.op_type for node in model.graph.node),
        more={
            "opset": ", ".join(f"{domain} {version}" for domain, version in versions.items()),
            "made by": f"{model.producer_name or 'unknown'} {model.producer_version}".strip(),
            "parameters": parameters(model),
            "products of an image": sum(count_products(model).values()),
        },
    )


def _of_package(path: Path) -> _Seen:
    from pipeline.emulate.mil.program import Feature, read_program

    program = read_program(path)

    def words(feature: Feature) -> str:
        kind = " ".join(filter(None, (feature.colour.lower(), feature.kind)))
        sides = f" ({', '.join(map(str, feature.shape))})" if feature.shape else ""
        return f"{feature.name}: {kind}{sides}"

    made = (op.type for op in program.operations if op.type != "const")
    more: dict[str, Any] = {"specification": program.specification}
    if program.labels:
        more["classes"] = len(program.labels)
    return _Seen(
        kind="Core ML package (ML Program)",
        inputs=[words(feature) for feature in program.inputs],
        outputs=[words(feature) for feature in program.outputs],
        operations=Counter(made),
        more=more,
    )


def _ranges(path: Path, stated: Stated, images: Path | None, limit: int) -> tuple[list[Value], str]:
    """Ranges in float32, in the order of the graph, and of which images; or why there are none."""
    try:
        with _opened(path, stated, noise=images is None) as model:
            preprocess = Preprocess.from_dict(model.network.preprocess)
            pixels, how = pixels_of(model.pixels, preprocess, images, limit)
        pictures = Pictures(pixels, preprocess)
        if path.suffix.lower() == GRAPH:
            return list(_of_tensors(path, pictures)), how
        return list(_of_program(path, pictures)), how
    except UnsupportedOperatorError as error:
        return [], f"no ranges: {error}"
    except InputError as error:
        if images is not None:
            raise
        return [], f"no ranges: {error}"


def _opened(path: Path, stated: Stated, *, noise: bool) -> Answering:
    """The model; noise may be normalized in any sensible way."""
    try:
        return open_file(path, stated)
    except InputError:
        if not noise or stated.mean or stated.std:
            raise
        return open_file(path, replace(stated, mean=(0.5,), std=(0.25,)))


def pixels_of(
    prepare: Any,
    preprocess: Preprocess,
    images: Path | None,
    limit: int,
    option: str = "--images",
) -> tuple[Pixels, str]:
    """Pixels of a folder of images, or seeded noise, and what they are.

    Args:
        prepare: Resizes and crops an image's file.
        preprocess: Size and channels of noise.
        images: The folder; None for noise.
        limit: Most images.
        option: Which option of the command names the folder.

    Raises:
        DataError: The folder holds none.
    """
    if images is None:
        shape = (NOISE, preprocess.size, preprocess.size, preprocess.depth)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return noise, f"{NOISE} images of seeded noise; give real ones with {option}"
    files = images_below(images) if images.is_dir() else []
    chosen = list(files)[:limit]
    if not chosen:
        raise DataError(f"{option}: {images} is no folder with images")
    return np.concatenate([prepare(file) for file in chosen]), f"{len(chosen)} images of {images}"


def _of_tensors(path: Path, pictures: Pictures) -> Iterable[Value]:
    from pipeline.emulate.onnx.executor import OnnxExecutor

    executor = OnnxExecutor(path, moved=True)
    executor.run_all(pictures.images)
    for entry in executor.overflow_report():
        finite = not (entry.infinite or entry.nan)
        yield _value(entry.tensor, entry.op_type, entry.module, entry.largest, finite=finite)


def _of_program(path: Path, pictures: Pictures) -> Iterable[Value]:
    from pipeline.emulate.mil.executor import MilExecutor

    executor = MilExecutor(path, precision="float32", record=True)
    is_image = executor.program.inputs[0].kind == "image"
    executor.predict(pictures.pixels if is_image else pictures.images)
    for entry in executor.ranges():
        finite = not entry.overflows or entry.largest > FLOAT16_LIMIT
        yield _value(entry.name, entry.operation, entry.module, entry.largest, finite=finite)


def _value(tensor: str, operation: str, module: str, largest: float, *, finite: bool) -> Value:
    if not finite:
        return Value(tensor, operation, module, None, 0.0)
    headroom = FLOAT16_LIMIT / largest if largest else math.inf
    return Value(tensor, operation, module, largest, headroom)


def _table(values: Sequence[Value], top: int) -> Table:
    table = Table("tensor", "operation", "module", "largest", "fits float16", "", box=None)
    for value in sorted(values, key=lambda each: each.headroom)[:top]:
        largest = "not finite" if value.largest is None else f"{value.largest:.3g}"
        beyond = styled("leaves it", "red") if value.headroom < 1 else ""
        table.add_row(
            value.tensor, value.operation, value.module, largest, _times(value.headroom), beyond
        )
    return table


def _times(headroom: float) -> str:
    return "any" if math.isinf(headroom) else f"{headroom:.3g} times"


def _verdict(values: Sequence[Value], how: str) -> str:
    if not values:
        return how
    first = next((value for value in values if value.headroom < 1), None)
    if first is not None:
        where = f"{first.tensor} ({first.operation})"
        return f"values leave the range of float16, first at {where}; on {how}"
    least = min(values, key=lambda value: value.headroom)
    times = _times(least.headroom)
    return f"float16 holds every value: least headroom {times}, at {least.tensor}; on {how}"


def _finite(headroom: float) -> float | None:
    return None if math.isinf(headroom) else headroom
