"""`repair`: raise the fewest parts of an ONNX graph with which a narrow type holds."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import inliner
from rich.table import Table

from calibration.budget import Budget
from calibration.observe import fixed_batch
from calibration.sample import CalibrationSet
from pipeline.core.errors import DataError, GateFailedError, InputError, PipelineError, about
from pipeline.core.files import write_atomically
from pipeline.core.inputs import read_array
from pipeline.core.listing import images_below
from pipeline.core.network import Images, Network
from pipeline.core.plain import parse_json
from pipeline.core.preprocess import Preprocess, decode
from pipeline.graphs import float16
from pipeline.graphs.compare import random_images, relative_difference
from pipeline.graphs.repair import Verified, by_float32, refuse_unfit, verify
from pipeline.report.terminal import render
from pipeline.steps.facts.graphs import RepairFacts
from pipeline.targets.forms import Form, FormJob
from pipeline.targets.registry import TARGETS, able, form_named
from pipeline.targets.repaired import FLOAT16_ERROR

EIGHT_BITS = ("int8", "fp8")

MOST_BYTES = 2**31
"""Of a file of images."""

SAME_NETWORK = 1e-2
"""Largest difference to a reference, relative to the largest logit, for it to be the same network.
Rewrites of one network differ by less than 1e-4; other weights by far more."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Wanted:
    """What a user asks of `repair`.

    Attributes:
        model: The float32 graph.
        output: Where the repaired graph goes; nothing may be there.
        precision: fp16, bf16, int8 or fp8.
        target: For which runtime.
        images: A folder of images, or an array of preprocessed ones (.npy); None for noise.
        noise: Images of seeded noise to choose on, as many again to verify on.
        limit: Most images of a folder.
        size: Height and width of images where the graph leaves them open.
        reference: A float32 graph of the same network that its answers are held against first.
        bfloat16: Parts may be raised to bfloat16.
        limits: Limits of the budget that were stated, by name.
    """

    model: Path
    output: Path
    precision: str
    target: str
    images: Path | None
    noise: int | None
    limit: int
    size: int | None
    reference: Path | None
    bfloat16: bool
    limits: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """What `repair` found, for people and for programs."""

    text: str
    plain: Mapping[str, Any]


def repair(wanted: Wanted) -> Report:
    """Write the repaired graph, verified on images that had no say in it.

    Raises:
        GateFailedError: Nothing holds the budget, or it does not hold on the other images; nothing
            is written then.
        InputError: The graph, an image or an option is of no use.
    """
    _refuse_output(wanted.output)
    form, budget = _form(wanted), _budget(wanted)
    model = _inlined(_read(wanted.model))
    with about(str(wanted.model)):
        refuse_unfit(model)
        shape = _input_shape(model, wanted.size)
    images, how = _images(wanted, model, shape)
    if wanted.reference is not None:
        _refuse_another(model, wanted.reference, images)
    chosen, others = _halves(images)
    with tempfile.TemporaryDirectory(prefix="repair-") as name:
        source, made = Path(name, "source.onnx"), Path(name, "made.onnx")
        float16.write_graph(model, source)
        lines: list[str] = []
        job = FormJob(
            source=source,
            network=Network(wanted.model.name, (), shape, {}),
            options=wanted.limits,
            calibration=lambda: chosen,
            log=lines.append,
            batch=fixed_batch(model),
        )
        with about(str(wanted.model)):
            facts = form.convert(job, made)
        verified = verify(model, float16.read_graph(made), others, budget)
        if not verified.holds:
            raise GateFailedError(
                f"{wanted.model}: the repair holds on the {len(chosen.images)} images that chose "
                f"it, but not on {verified.images} others: {verified.judged.words}; give more "
                "images, or allow more"
            )
        write_atomically(wanted.output, made.read_bytes(), lambda path: False)
    return _report(wanted, facts, verified, how, mends_first=form.mends_first)


def _refuse_output(path: Path) -> None:
    if os.path.lexists(path):
        raise InputError(f"--output: {path} is there already: name a new file")
    if not path.parent.is_dir():
        raise InputError(f"--output: there is no folder {path.parent}: make it first")


def _form(wanted: Wanted) -> Form:
    """The form of the graph that is asked for.

    Raises:
        InputError: There is none for this runtime, or an option does not go with it.
    """
    target, others = TARGETS[wanted.target], able("repaired")
    with about(f"--target {wanted.target}"):
        if wanted.target not in others:
            raise InputError(
                f"{target.title} has no repaired form of an ONNX graph; give {' or '.join(others)}"
            )
        return form_named(target, target.repaired(wanted.precision, bfloat16=wanted.bfloat16))


def _budget(wanted: Wanted) -> Budget:
    """What the result has to hold; 8 bits are judged by accuracy alone."""
    if wanted.precision in EIGHT_BITS and "max_error" in wanted.limits:
        raise InputError(
            f"--max-error: {wanted.precision} is judged by accuracy: use --max-top1-drop"
        )
    return Budget.of(wanted.limits, FLOAT16_ERROR if wanted.precision == "fp16" else None)


def _read(path: Path) -> onnx.ModelProto:
    try:
        return float16.read_graph(path)
    except PipelineError as error:
        raise InputError(
            str(error).replace("run the export stage again", "give another")
        ) from error


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    return inliner.inline_local_functions(model) if model.functions else model


def _input_shape(model: onnx.ModelProto, size: int | None) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a graph takes.

    Raises:
        InputError: It takes something else, or leaves open what `--size` does not state.
    """
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in held]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise InputError(
            f"the graph has {len(inputs)} inputs and {len(model.graph.output)} outputs: repair "
            "takes a classifier, with one input and one output"
        )
    sides = inputs[0].type.tensor_type.shape.dim
    if len(sides) != 4:
        raise InputError(
            f"the graph's input {inputs[0].name!r} has {len(sides)} axes: repair takes images of "
            "(batch, channels, height, width)"
        )
    fixed = [side.dim_value or None for side in sides[1:]]
    channels, height, width = fixed[0] or 3, fixed[1] or size, fixed[2] or size
    if height is None or width is None:
        raise InputError("the graph leaves the size of its images open: state it with --size")
    if size is not None and (height, width) != (size, size):
        raise InputError(f"--size {size}: the graph takes images of {height} x {width} pixels")
    return channels, height, width


def _images(
    wanted: Wanted, model: onnx.ModelProto, shape: tuple[int, int, int]
) -> tuple[Images, str]:
    """Images to choose and to verify on, and how they were prepared."""
    if (wanted.images is None) == (wanted.noise is None):
        raise InputError("give images with --images, or their number with --noise: one of the two")
    if wanted.images is None:
        assert wanted.noise is not None
        return random_images(2 * wanted.noise, shape), "seeded noise"
    if wanted.images.suffix == ".npy":
        return _array(wanted.images, shape), "as in the array"
    return folder_of_images(wanted.images, wanted.limit, model, shape)


def folder_of_images(
    folder: Path, limit: int, model: onnx.ModelProto, shape: tuple[int, int, int]
) -> tuple[Images, str]:
    """Images of a folder, prepared for a graph, and how they were prepared.

    Args:
        folder: With images in it, or in folders of it.
        limit: Most images: they are spread evenly over all.
        model: May state its preprocessing.
        shape: (channels, height, width) of what it takes.

    Raises:
        DataError: There are no images, one cannot be read, or they cannot be made to fit.
    """
    files = list(images_below(folder)) if folder.is_dir() else []
    if not files:
        raise DataError(f"--images: {folder} is no folder with images, and no .npy file")
    preprocess, how = _preprocess(model, shape)
    places = np.unique(np.linspace(0, len(files) - 1, limit).round().astype(int))
    decoded = [
        preprocess(decode(files[i].read_bytes(), str(files[i]), preprocess.exif)) for i in places
    ]
    return np.stack(decoded), how


def _array(path: Path, shape: tuple[int, int, int]) -> Images:
    """Preprocessed images of a NumPy file."""
    with about("--images"):
        array = read_array(path, MOST_BYTES, "array that can be read")
    fits = array.ndim == 4 and array.shape[1:] == shape
    if not fits or array.dtype != np.float32 or not len(array):
        raise DataError(
            f"--images: {path} holds {array.dtype} {array.shape}, and the graph takes float32 "
            f"(images, {', '.join(map(str, shape))})"
        )
    if not np.isfinite(array).all():
        raise DataError(f"--images: {path} holds values that are not finite")
    return np.ascontiguousarray(array)


def _preprocess(model: onnx.ModelProto, shape: tuple[int, int, int]) -> tuple[Preprocess, str]:
    """As the graph states it, or as is usual for ImageNet."""
    channels, height, width = shape
    stated = next((p.value for p in model.metadata_props if p.key == "preprocess"), None)
    if stated is not None:
        preprocess = Preprocess.from_dict(
            parse_json(stated, "the graph's preprocessing", DataError)
        )
        if (preprocess.depth, preprocess.size, preprocess.size) != shape:
            raise DataError(
                f"the graph states images of {preprocess.size} pixels and {preprocess.depth} "
                f"channels, and takes {channels} x {height} x {width}: export it again"
            )
        return preprocess, "as the graph states"
    if channels != 3 or height != width:
        raise DataError(
            f"the graph states no preprocessing, and takes {channels} x {height} x {width}: give "
            "preprocessed images as a .npy file"
        )
    usual = Preprocess(height, 0.875, "bicubic", IMAGENET_MEAN, IMAGENET_STD)
    return usual, "with ImageNet's mean and spread, since the graph states nothing"


def _refuse_another(model: onnx.ModelProto, reference: Path, images: Images) -> None:
    """Refuse a reference that answers otherwise: its answers would be no measure.

    Raises:
        InputError: It is another network.
    """
    some = images[:4]
    own, other = by_float32(model, some), by_float32(_inlined(_read(reference)), some)
    if own.shape != other.shape:
        raise InputError(
            f"--reference: {reference} is another network: it has {other.shape[1]} classes, and "
            f"the graph has {own.shape[1]}"
        )
    difference = relative_difference(own, other)
    if not difference <= SAME_NETWORK:
        raise InputError(
            f"--reference: {reference} is another network: in float32 its logits differ by "
            f"{difference:.2g} of the largest"
        )


def _halves(images: Images) -> tuple[CalibrationSet, CalibrationSet]:
    """Every second image chooses, the others verify; a single one does both."""
    chosen, others = images[::2], images[1::2]
    return _unlabelled(chosen), _unlabelled(others if len(others) else chosen)


def _unlabelled(images: Images) -> CalibrationSet:
    return CalibrationSet(images, np.full(len(images), -1, np.int64), ())


def _report(
    wanted: Wanted, facts: Mapping[str, Any], verified: Verified, how: str, *, mends_first: bool
) -> Report:
    """What to say of a repaired graph.

    Args:
        wanted: What was asked for.
        facts: Of the form.
        verified: How the graph did on other images.
        how: How images were prepared.
        mends_first: See `Form`.
    """
    repair = RepairFacts.from_dict(facts["repair"], "the repair")
    lines = [f"{wanted.model} in {wanted.precision}; images: {how}"]
    if repair.beyond:
        lines.append(repair.beyond)
    if repair.broke:
        lines.append(f"before: {repair.broke}")
    lines.append(repair.counts)
    # What a search leaves out of 8 bits after a repair is beside it; without one, it is the repair.
    kept = facts.get("sensitivity", {}).get("excluded", []) if mends_first else []
    if kept:
        lines.append(f"not in 8 bits, since too much would be lost: {', '.join(kept)}")
    table = Table("part", "type", "share of products", "why", box=None)
    for part in repair.raised:
        table.add_row(part.part, part.type, f"{part.share:.3%}", part.why)
    judged = f"on {verified.images} other images: {verified.judged.words}"
    ends = [
        f"{'before it is quantized' if mends_first else 'now'}: {repair.result}",
        f"verified {judged}",
        f"wrote {wanted.output}",
    ]
    plain = {
        "output": str(wanted.output),
        "precision": wanted.precision,
        "repair": repair.to_dict(),
        "left_in_float16": kept,
        "verified": {
            "images": verified.images,
            "error": verified.judged.outcome.logit_error,
            "agreement": verified.judged.outcome.agreement,
            "headroom": min(verified.judged.headroom, 1e30),
        },
    }
    parts = [table] if repair.raised else []
    return Report(render(*lines, *parts, *ends), plain)
