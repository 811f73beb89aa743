"""`reduce`: the smallest part of an ONNX graph with which a builder dies, or a layer jumps."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.errors import ArtifactError, DataError, InputError, UnavailableError
from pipeline.core.files import write_atomically
from pipeline.core.inputs import read_array, read_input
from pipeline.core.network import Images, Network, whole_batches
from pipeline.graphs.compare import random_images
from pipeline.targets.registry import TARGETS, able, form_of

if TYPE_CHECKING:
    import onnx

    from calibration.sample import CalibrationSet
    from pipeline.emulate.layers import LayerError
    from pipeline.emulate.onnx.executor import OnnxExecutor
    from pipeline.emulate.onnx.graph import Port
    from pipeline.graphs.parts import Part
    from pipeline.graphs.reduce import Reduced

MOST_BYTES = 2**31
"""Of a graph, which protobuf cannot make larger, and of a file of images."""

_NOISE_IMAGES = 32
_NARROW = ("float16", "bfloat16", "int8", "uint8", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Job:
    """What is to be reduced.

    Attributes:
        model: An ONNX graph with one input.
        target: Whose builder, or whose precision.
        precision: One of the target's.
        reference: The float32 graph where `model` is in a narrow type already.
        images: A .npy file of what the network takes, or a folder of images; None for seeded noise.
        batch: Images at a time: the part has fixed shapes.
        seconds: After how long no further part is tried.
        output: Where the part goes; its inputs go beside it as .npz.
    """

    model: Path
    target: str
    precision: str
    reference: Path | None
    images: Path | None
    batch: int
    seconds: float
    output: Path


def reduce(job: Job, say: Callable[[str], None]) -> str:
    """Write the smallest part that fails; returns what was found.

    Args:
        job: What is to be reduced.
        say: Takes lines on how far the search is.

    Raises:
        InputError, ArtifactError: What was given cannot be used, or nothing fails.
        BuildError: The graph has no form in this precision.
    """
    _check_places(job)
    source, executor = _read(job.model)
    images = _images(job, source, executor.input)
    with tempfile.TemporaryDirectory(prefix="reduce-") as folder:
        built, reference = _in_precision(job, source, executor, images, Path(folder))
        search = _Search(job, built, reference, images[: job.batch], Path(folder), say)
        found, why = search.run()
    write_atomically(job.output, found.part.model.SerializeToString(deterministic=True))
    write_atomically(_arrays_of(job.output), found.part.arrays())
    return _text(job, found, why)


def _check_places(job: Job) -> None:
    for path in (job.output, _arrays_of(job.output)):
        if os.path.lexists(path):
            raise InputError(f"{path} is there already: name another file, or remove it first")
    if job.output.suffix != ".onnx":
        raise InputError(f"{job.output} is no name of an ONNX graph: let it end in .onnx")
    precisions = TARGETS[job.target].precisions
    if job.precision not in precisions:
        raise InputError(
            f"{job.target} has no precision {job.precision!r}; it has {', '.join(precisions)}"
        )
    if form_of(TARGETS[job.target], job.precision) is None:
        raise InputError(
            f"{job.target} builds {job.precision} from the network, not from an ONNX graph: reduce "
            "for a target that does, such as trt"
        )


def _arrays_of(path: Path) -> Path:
    return path.with_suffix(".npz")


def _read(path: Path) -> tuple[onnx.ModelProto, OnnxExecutor]:
    """Read a graph with one input and finite weights, and what runs it.

    Raises:
        InputError: The file cannot be read.
        ArtifactError: It is no ONNX model, or one that cannot be run.
    """
    from pipeline.emulate.onnx.executor import OnnxExecutor
    from pipeline.emulate.onnx.graph import load_model, refuse_nan

    read_input(path, MOST_BYTES, InputError, "name an ONNX graph")
    model = load_model(path)
    refuse_nan(path)
    return model, OnnxExecutor(path)


def _images(job: Job, source: onnx.ModelProto, port: Port) -> Images:
    """At least a batch of what the network takes.

    Raises:
        DataError: The file holds no images that fit.
    """
    from pipeline.emulate.onnx.executor import check_images

    if port.shape and port.shape[0] not in (None, job.batch):
        raise InputError(
            f"{job.model} takes batches of {port.shape[0]}: give --batch {port.shape[0]}"
        )
    if job.images is None:
        if None in port.shape[1:]:
            raise InputError(
                f"{job.model} leaves the size of its images open: name some with --images"
            )
        shape = tuple(side or 1 for side in port.shape[1:])
        return random_images(max(_NOISE_IMAGES, job.batch), shape)
    given = _folder(job, source, port) if job.images.is_dir() else _load(job.images)
    filled = whole_batches(given, job.batch)
    check_images(filled[: job.batch], port)
    return filled


def _folder(job: Job, source: onnx.ModelProto, port: Port) -> Images:
    """Images of a folder as the network takes them, at least a batch where there are so many."""
    from pipeline.commands.repair import folder_of_images

    assert job.images is not None
    if len(port.shape) != 4 or None in port.shape[1:]:
        raise InputError(
            f"{job.model} leaves open what images it takes: prepare them, and give a .npy file"
        )
    channels, height, width = (side or 0 for side in port.shape[1:])
    most = max(_NOISE_IMAGES, job.batch)
    images, _ = folder_of_images(job.images, most, source, (channels, height, width))
    return images


def _load(path: Path) -> Images:
    images = read_array(path, MOST_BYTES, ".npy file of images")
    if images.ndim != 4 or not len(images):
        raise DataError(f"{path} holds no images of shape (images, channels, height, width)")
    if images.dtype != np.float32 or not np.isfinite(images).all():
        raise DataError(f"{path}: images must be finite float32, as the network takes them")
    return images


def _in_precision(
    job: Job, source: onnx.ModelProto, executor: OnnxExecutor, images: Images, folder: Path
) -> tuple[onnx.ModelProto, Path | None]:
    """The graph in its precision, and the float32 graph that it was made from, if there is one.

    Raises:
        InputError: A graph in a narrow type is called float32, or the other way round.
        BuildError: It has no such form.
    """
    from pipeline.emulate.onnx.graph import load_model
    from pipeline.targets.forms import FormJob

    if _is_narrow(executor):
        return source, _reference(job)
    if job.reference is not None:
        raise InputError(
            f"{job.model} is in float32 itself: leave --reference out, which is for graphs in "
            "another precision"
        )
    form = form_of(TARGETS[job.target], job.precision)
    assert form is not None
    network = _network(job.model, executor)

    def calibration() -> CalibrationSet:
        return _calibration(executor, images)

    made = folder / "built.onnx"
    batch = None if executor.input.shape[0] is None else job.batch
    form.convert(FormJob(job.model, network, {}, calibration, lambda line: None, batch), made)
    return load_model(made), job.model


def _is_narrow(executor: OnnxExecutor) -> bool:
    from pipeline.emulate import rounding

    types = {executor.dtype(name) for node in executor.nodes() for name in node.outputs if name}
    return any(rounding.name(dtype) in _NARROW for dtype in types)


def _reference(job: Job) -> Path | None:
    if job.reference is not None:
        _read(job.reference)
    return job.reference


def _network(path: Path, executor: OnnxExecutor) -> Network:
    shape = executor.input.shape
    if len(shape) != 4:
        raise ArtifactError(f"{path} takes no images (batch, channels, height, width)")
    labels = executor.outputs[0].shape[-1] or 0
    channels, height, width = (side or 0 for side in shape[1:])
    names = tuple(f"class {i}" for i in range(labels))
    return Network(path.stem, names, (channels, height, width), {})


def _calibration(executor: OnnxExecutor, images: Images) -> CalibrationSet:
    from calibration.sample import CalibrationSet

    labels = executor.run_all(images).argmax(1).astype(np.int64)
    return CalibrationSet(images, labels, ("",) * len(images))


class _Search:
    """Looks for what fails, and then for the smallest part that does."""

    def __init__(
        self,
        job: Job,
        built: onnx.ModelProto,
        reference: Path | None,
        images: Images,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        self._job, self._say, self._folder = job, say, folder
        self._built, self._reference, self._images = built, reference, images
        self._feeds = {built.graph.input[0].name: images}

    def run(self) -> tuple[Reduced, str]:
        """The smallest part, and why it fails.

        Raises:
            InputError: Nothing fails.
        """
        jump = self._jump()  # before anything is built: it also sees what does not fit
        builds = self._job.target in able("refusal")
        found = self._by_builder() if builds else None
        if found is None and jump is not None:
            found = self._by_jump(jump)
        if found is None:
            took = f"{TARGETS[self._job.target].title} builds it with a batch of {self._job.batch}"
            told = "no layer jumps" if self._reference else "no --reference tells where it jumps"
            said = f"{took}, and {told}" if builds else told
            raise InputError(f"{self._job.model}: {said}: there is nothing to reduce")
        return found

    def _by_builder(self) -> tuple[Reduced, str] | None:
        """With a fixed batch; where the builder takes that, with an open one, if the graph has it.

        Only parts of fixed shapes are simplified: what else computes a shape is not told.
        """
        from pipeline.graphs.parts import Recording
        from pipeline.graphs.reduce import reduce, refused_alike

        target = TARGETS[self._job.target]
        for other in (None, *self._other_batch()):
            recorded = Recording(self._built, self._feeds, other=other)
            whole = recorded.part(range(len(recorded)))
            try:
                first = self._refusal(whole) if whole is not None else None
            except UnavailableError as error:
                self._say(f"not built: {error}")
                return None
            if first is None:
                continue
            self._say(first if other is None else f"with a dynamic batch: {first}")
            fails = refused_alike(self._refusal, partial(target.refused_alike, first))
            seconds, fixed = self._job.seconds, other is None
            found = reduce(recorded, fails, seconds=seconds, say=self._say, anyhow=fixed)
            return None if found is None else (found, self._refusal(found.part) or first)
        return None

    def _other_batch(self) -> Iterator[dict[str, Images]]:
        """Inputs with one image more, if the graph takes any number."""
        (port,) = self._built.graph.input
        if not port.type.tensor_type.shape.dim[0].HasField("dim_value"):
            yield {port.name: np.concatenate([self._images, self._images[:1]])}

    def _refusal(self, part: Part) -> str | None:
        path = self._folder / "part.onnx"
        path.write_bytes(part.model.SerializeToString(deterministic=True))
        target = TARGETS[self._job.target]
        message = target.refusal(path, self._job.precision, lambda line: None)
        return None if message is None else message.replace(str(path), self._job.output.name)

    def _jump(self) -> LayerError | None:
        from pipeline.emulate.layers import jump
        from pipeline.emulate.onnx.layers import compare

        if self._reference is None:
            return None
        tf32 = self._job.precision == "tf32"
        return jump(compare(self._built, self._reference, self._images, tf32=tf32))

    def _by_jump(self, layer: LayerError) -> tuple[Reduced, str] | None:
        from pipeline.emulate.onnx.layers import Comparison
        from pipeline.graphs.parts import Recording
        from pipeline.graphs.reduce import jumps, reduce

        assert self._reference is not None
        own = layer.own if layer.own is not None and np.isfinite(layer.own) else 1.0
        why = f"{layer.module} ({layer.operation} {layer.tensor}) errs by {layer.own:.2g} itself"
        self._say(why)
        comparison = Comparison(self._built, self._reference)
        recorded = Recording(self._built, self._feeds, comparison, layer.tensor)
        fails = jumps(layer.tensor, own / 2)
        found = reduce(recorded, fails, seconds=self._job.seconds, say=self._say)
        return None if found is None else (self._alone(found, layer.tensor), why)

    def _alone(self, found: Reduced, tensor: str) -> Reduced:
        """Only the tensor in question is expected of the part."""
        expected = {tensor: found.part.expected[tensor]}
        return dataclasses.replace(found, part=dataclasses.replace(found.part, expected=expected))


def _text(job: Job, found: Reduced, why: str) -> str:
    nodes = found.part.model.graph.node
    lines = [why, f"{len(nodes)} nodes fail, found in {found.tries} tries:"]
    lines += [f"  {node.op_type:<12} {node.name or node.output[0]}" for node in nodes]
    if not found.minimal:
        lines.append("time ran out: a longer --minutes may find fewer")
    return "\n".join([*lines, f"wrote {job.output}", f"wrote {_arrays_of(job.output)}"])
