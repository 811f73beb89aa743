"""Where a run begins with an ONNX graph: it is the network, and the reference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.described import NOTHING, Described, described_by
from pipeline.core.errors import (
    ArtifactError,
    BuildError,
    CheckpointError,
    ConfigError,
    ModelError,
    about,
)
from pipeline.core.files import file_hash
from pipeline.core.plain import parse_json
from pipeline.core.words import in_short
from pipeline.graphs import given
from pipeline.graphs.compare import DYNAMIC_IMAGES, TOLERANCE, random_images, relative_difference
from pipeline.source import IMAGENET, Source
from pipeline.steps.keys import versions

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from care.cost import Cost
    from care.inference import InferenceForm
    from pipeline.core.network import Images
    from pipeline.core.preprocess import Preprocess
    from pipeline.core.runner import Runner
    from pipeline.steps.facts.accuracy import ModuleRange

_STATED = ("labels", "preprocess")
"""What graphs of this project say of themselves, as JSON."""


class GraphSource(Source):
    """An ONNX graph and the images of a configuration."""

    def checkpoint(self) -> Path:
        """The graph, which holds the weights.

        Raises:
            ModelError: The file is missing.
        """
        path = Path(str(self.config.model.onnx))
        if not path.is_file():
            raise ModelError(f"model.onnx: {path} is no file: name an ONNX graph")
        return path

    @cached_property
    def checkpoint_hash(self) -> str:
        """SHA-256 of the graph and of the files of its weights; see `Source.checkpoint_hash`."""
        path = self.checkpoint()
        try:
            with about("model.onnx"):
                return given.graph_hash(path)
        except OSError as error:
            raise ModelError(
                f"model.onnx: cannot read {path}: {error.strerror or error}"
            ) from error

    @cached_property
    def given(self) -> given.Given:
        """What the graph takes and gives.

        Raises:
            ModelError: A run cannot begin with it.
        """
        path = self.checkpoint()
        with about("model.onnx"):
            found = given.look(path)
            fixed = self.config.export.fixed_batch
            if found.batch is not None and found.batch != fixed:
                raise ModelError(
                    f"the graph takes batches of {found.batch} alone: set export.batch and "
                    f"bench.batches to {found.batch}, or export it for any batch"
                )
        return found

    @cached_property
    def described(self) -> Described:
        """What the graph says of itself, as graphs of a run do; what others write says nothing."""
        try:
            return described_by(_stated(self.given), self.given.path)
        except CheckpointError:
            return NOTHING

    def look(self) -> None:
        """See `Source.look`; what the configuration says of images has to fit, too."""
        _ = self.described
        self._check_sides(self.preprocess)

    def weight_files(self) -> Iterator[tuple[str, Path, str]]:
        """See `Source.weight_files`."""
        path = self.checkpoint()
        yield path.name, path, file_hash(path)
        for name in self.given.external:
            beside = path.parent / name
            yield name, beside, file_hash(beside)

    def tools(self) -> dict[str, str]:
        """Versions of what runs the graph."""
        return versions("onnx", "onnxruntime")

    @cached_property
    def preprocess(self) -> Preprocess:
        """How an image becomes the graph's input.

        Raises:
            ConfigError: Nothing says so.
        """
        if self.config.preprocess is None and self.described.preprocess is None:
            raise ConfigError(
                "preprocess is missing, and the graph of model.onnx does not say how images "
                "become its input: state size, crop, mean and std"
            )
        return super().preprocess

    @cached_property
    def graph(self) -> onnx.ModelProto:
        """The graph from `image` to `logits`, in one piece.

        Raises:
            ModelError: It is no valid graph, or not that of the beginning of the run.
        """
        with about("model.onnx"):
            model = given.read(self.given)
            if given.graph_hash(self.given.path) != self.checkpoint_hash:
                raise ModelError(f"{self.given.path} was changed meanwhile: run again")
        return model

    @cached_property
    def module(self) -> nn.Module:
        """The graph as a torch module, for what is built from one.

        Raises:
            BuildError: It cannot be had, or computes something else than ONNX Runtime.
        """
        from pipeline.emulate.onnx.module import GraphModule

        name = self.config.model.title
        try:
            module = GraphModule(self.graph, self._input_shape)
            difference = self._difference_to_runtime(module)
        except ArtifactError as error:
            raise BuildError(f"{name} cannot be rebuilt in PyTorch: {error}") from error
        if not difference <= TOLERANCE:
            raise BuildError(
                f"{name}, rebuilt in PyTorch, differs from ONNX Runtime by {difference:.1e} of the "
                f"largest logit, more than {TOLERANCE:.0e}: nothing is built from that; its "
                "operators are mistaken in pipeline/emulate/onnx/operators"
            )
        return module

    def _difference_to_runtime(self, module: nn.Module) -> float:
        import torch

        images = self._noise()
        with torch.inference_mode():
            logits = module(torch.from_numpy(images)).numpy()
        with self.reference() as runner:
            return relative_difference(logits, runner(images))

    def _noise(self) -> Images:
        """A batch of seeded noise, as small as the graph takes."""
        return random_images(self.given.batch or 1, self._input_shape)

    def cost(self) -> Cost:
        """See `Source.cost`; of the graph, as far as its shapes can be inferred."""
        from care.cost import Cost
        from pipeline.graphs.products import count_products

        products = sum(count_products(self.graph).values())
        return Cost("total", given.parameters(self.graph), products // (self.given.batch or 1))

    @property
    def referee(self) -> str:
        """See `Source.referee`."""
        return f"ONNX Runtime {versions('onnxruntime')['onnxruntime']}, the graph in float32, CPU"

    def reference(self) -> Runner:
        """Runs the graph as it was given."""
        from pipeline.targets.given import exact_runner

        with about("model.onnx"):
            return exact_runner(self.given.path)

    def baseline(self, threads: int | None) -> Runner:
        """See `Source.baseline`: the graph as it was given, by ONNX Runtime."""
        from pipeline.targets.given import fast_runner

        with about("model.onnx"):
            return fast_runner(self.given.path, threads)

    def range_of(self, images: Images) -> ModuleRange | None:
        """See `Source.range_of`."""
        from pipeline.targets.given import range_of_graph

        return range_of_graph(self.graph, images)

    def inference_form(self) -> InferenceForm:
        """The module; nothing is done to it."""
        from care.inference import InferenceForm

        return InferenceForm(self.module, "as given")

    def _head_classes(self, count: int) -> int | None:
        return self.given.classes

    def _check_network(self) -> None:
        """Refuse a graph that does not take the images, or has other classes.

        Raises:
            ModelError: The message says what to state in their place.
        """
        from pipeline.targets.ort.session import errors

        self._check_sides(self.preprocess)
        images = random_images(self.given.batch or DYNAMIC_IMAGES, self._input_shape)
        try:
            with self.reference() as runner:
                shape = runner(images).shape
        except ArtifactError as error:
            raise ModelError(str(error)) from error
        except errors() as error:
            raise ModelError(
                f"model.onnx: the graph does not run on {len(images)} images, which its input "
                f"takes: {in_short(error)}; export it so that it takes any batch, or for a fixed "
                "one of 1"
            ) from error
        count = len(self.classes[1])
        if shape != (len(images), count):
            gives = " x ".join(map(str, shape[1:])) or "no"
            raise ModelError(
                f"model.onnx: the graph gives {gives} logits for an image, and {self._naming} "
                f"{count} classes: give the network's classes in its order as data.labels "
                f"('{IMAGENET}' for ImageNet's)"
            )

    def _check_sides(self, preprocess: Preprocess) -> None:
        stated = (preprocess.depth, preprocess.size, preprocess.size)
        for side, wanted in zip(stated, self.given.shape, strict=True):
            if wanted not in (None, side):
                takes = " x ".join(
                    "any" if each is None else str(each) for each in self.given.shape
                )
                raise ModelError(
                    f"model.onnx: the graph takes images of {takes} (channels, height, width), and "
                    f"preprocess gives {' x '.join(map(str, stated))}: set preprocess to what it "
                    "takes"
                )


def _stated(graph: given.Given) -> dict[str, Any]:
    """What a graph says of itself, as plain values."""
    found = {}
    for key in _STATED:
        if text := graph.metadata.get(key):
            found[key] = parse_json(text, f"{key} in its metadata", CheckpointError)
    return found
