"""The stage that exports the network as an ONNX graph."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.described import QUANTIZED
from pipeline.core.errors import BuildError, ConfigError
from pipeline.core.garbage import only_new
from pipeline.core.words import in_short
from pipeline.graphs.compare import (
    DYNAMIC_IMAGES,
    TOLERANCE,
    images_for,
    random_images,
    relative_difference,
    run_graph,
)
from pipeline.stages.context import RunContext, StageStep
from pipeline.stages.names import GRAPH, PHOTO
from pipeline.steps.facts.graphs import ExportFacts
from pipeline.steps.keys import versions

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from pipeline.core.described import Quantized
    from pipeline.core.network import Images, Network

KEPT_METADATA = "pkg.torch.onnx.name_scopes"
"""Names of the modules around a node: what reports need. The exporter's other notes hold file paths
of the machine and would make the graph depend on where it was exported."""


class ExportStep(StageStep):
    """The fused module as an ONNX graph, with labels and preprocessing in its metadata."""

    stage = "export"
    from_source = True

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, "export")

    def inputs(self) -> Mapping[str, Any]:
        """Network, and how it is exported."""
        settings = self.context.config.export.model_dump(include={"opset", "batch"})
        if self._takes_photos:
            settings["preprocessing"] = "graph"
        return {**self.source.network_inputs(), "settings export": settings}

    def made_from(self) -> dict[str, str]:
        """The checkpoint."""
        return {"checkpoint": self.source.checkpoint_hash}

    def tools(self) -> dict[str, str]:
        """The exporter's packages."""
        # What is put before the graph resizes as the Pillow does that is here.
        before = versions("pillow", "onnxruntime") if self._takes_photos else {}
        return {**self.source.tools(), **versions("onnx", "onnxscript"), **before}

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Export, strip, describe and check the graph."""
        source = self.source
        self.context.progress(0, 3, "loading the network")
        network = source.network
        if source.graph is None:
            form = source.inference_form()
            how = form.how
            model, difference = self._export(form.module, network, folder / GRAPH)
            if source.described.quantized is not None:
                _say_quantized(model, source.described.quantized, folder / GRAPH)
        else:
            how = "the graph as given"
            model, difference = self._take(source.graph, network, folder / GRAPH)
        if self._takes_photos:
            self._write_photo(model, folder / PHOTO)
        self.beside["checkpoint"] = str(source.checkpoint() or "")
        cost = source.cost()
        return ExportFacts(
            parameters=cost.parameters,
            macs=cost.macs,
            inference_form=how,
            nodes=len(model.graph.node),
            opset=opset_of(model),
            difference_to_pytorch=difference,
            network=network,
        ).to_facts()

    @property
    def _takes_photos(self) -> bool:
        return self.context.config.export.preprocessing == "graph"

    def _write_photo(self, model: onnx.ModelProto, path: Path) -> None:
        """Write the graph with preprocessing inside.

        Raises:
            ConfigError: The network's preprocessing cannot be said in this graph.
            BuildError: ONNX Runtime resizes otherwise than Pillow.
        """
        import onnx

        from pipeline.graphs import photo

        preprocess = self.source.preprocess
        if problem := photo.why_not(preprocess, opset_of(model)):
            raise ConfigError(f"export.preprocessing: {problem}; leave it out")
        photo.require_pillows(preprocess)
        onnx.save(photo.with_photo_input(model, preprocess), path)

    def _take(
        self, model: onnx.ModelProto, network: Network, path: Path
    ) -> tuple[onnx.ModelProto, float]:
        """Write the graph that was given; returns it, and its difference to the file's.

        Raises:
            BuildError: It is too large for one file, or computes something else.
        """
        import onnx

        _strip(model)
        _describe(model, network)
        try:
            onnx.save(model, path)
        except ValueError as error:  # protobuf's limit
            raise BuildError(
                f"{self.context.config.model.title} is larger than the 2 GB that one file holds"
            ) from error
        self.context.progress(2, 3, "comparing with what was given")
        images = images_for(path, network.input_shape)
        with self.source.reference() as runner:
            difference = relative_difference(run_graph(path, images), runner(images))
        _require_equal(difference, "the graph", "what was given")
        return model, difference

    def _export(
        self, module: nn.Module, network: Network, path: Path
    ) -> tuple[onnx.ModelProto, float]:
        """Write the graph; returns it, and its difference to PyTorch.

        It takes any batch even where `export.batch` fixes that of the models: calibration runs it
        with many images, and TensorRT-RTX fails on some graphs of one image. A module that gives no
        such graph is traced with the fixed batch alone.

        Raises:
            BuildError: The module cannot be traced, or its graph computes something else.
        """
        try:
            return self._export_one(module, network, path, dynamic=True)
        except BuildError as error:
            fixed = self.context.config.export.fixed_batch
            if fixed is None:
                raise
            refusal = error
        self.context.log(f"export: {refusal}; trying a graph for batches of {fixed} alone")
        try:
            return self._export_one(module, network, path, dynamic=False)
        except BuildError:
            raise refusal from None

    def _export_one(
        self, module: nn.Module, network: Network, path: Path, *, dynamic: bool
    ) -> tuple[onnx.ModelProto, float]:
        import onnx

        settings = self.context.config.export
        images = random_images(settings.fixed_batch or DYNAMIC_IMAGES, network.input_shape)
        # A dynamic batch cannot be traced with a single image.
        traced = np.repeat(images, DYNAMIC_IMAGES, 0) if dynamic and len(images) == 1 else images
        self.context.progress(1, 3, "tracing")
        try:
            model = trace(module, traced, opset=settings.opset, dynamic=dynamic)
        except Exception as error:  # the exporter raises whatever the network's code raises
            raise BuildError(
                f"{self.context.config.model.title} does not export to ONNX: {reason(error)}"
            ) from error
        _describe(model, network)
        onnx.save(model, path)
        self.context.progress(2, 3, "comparing with PyTorch")
        return model, _compare(path, module, images)


def _describe(model: onnx.ModelProto, network: Network) -> None:
    """Labels, preprocessing and description go into the graph's metadata."""
    import onnx

    about = {
        "labels": json.dumps(network.labels, ensure_ascii=False),
        "preprocess": json.dumps(dict(network.preprocess)),
        "name": network.name,
        **network.description,
    }
    onnx.helper.set_model_props(model, about)


def _say_quantized(model: onnx.ModelProto, quantized: Quantized, path: Path) -> None:
    """The precision in which the network was trained goes into the metadata."""
    import onnx

    text = json.dumps(quantized.to_dict())
    model.metadata_props.append(onnx.StringStringEntryProto(key=QUANTIZED, value=text))
    onnx.save(model, path)


def _compare(path: Path, module: nn.Module, images: Images) -> float:
    """Difference of a graph to PyTorch.

    Raises:
        BuildError: It is too large.
    """
    import torch

    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    difference = relative_difference(run_graph(path, images), expected)
    _require_equal(difference, "the exported graph", "PyTorch")
    return difference


def _require_equal(difference: float, what: str, other: str) -> None:
    if not difference <= TOLERANCE:
        raise BuildError(
            f"{what} differs from {other} by {difference:.1e} of the largest logit, more than "
            f"{TOLERANCE:.0e}: the network was mistaken on the way"
        )


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard operator set that a graph is of."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def reason(error: Exception) -> str:
    """The exporter's reason, in a line: its own messages fill pages."""
    # What is raised around the first cause begins with advice for who calls the exporter.
    branches = [line for line in map(_of_branches, _causes(error)) if line]
    if branches:
        return (
            f"what it does depends on the values of its images ({branches[-1]}): write it "
            "without branches on values, for instance with torch.where"
        )
    return in_short(list(_causes(error))[-1])


def _of_branches(error: BaseException) -> str:
    """What an error says of branches that depend on values, in a line of bounded length."""
    lines = (line for line in str(error).splitlines() if "data-dependent" in line.lower())
    return next(lines, "").strip()[:200]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, the first cause last."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def trace(
    module: nn.Module, images: Images, *, opset: int = 20, dynamic: bool = True
) -> onnx.ModelProto:
    """Export a module in evaluation mode as an ONNX graph from `image` to `logits`.

    Args:
        module: A classifier.
        images: (batch, channels, height, width): the shape that is traced. A dynamic batch must be
            traced with more than one image.
        opset: Version of the operator set.
        dynamic: The graph takes any batch, not only that of `images`.
    """
    import torch

    from care.traceable import FOR_ALL_TARGETS, Replaced
    from pipeline.stages.attention import attention

    own = torch.nn.functional.scaled_dot_product_attention
    with only_new(), _without_gradients(module), Replaced({**FOR_ALL_TARGETS, own: attention}):
        program = torch.onnx.export(
            module,
            (torch.from_numpy(images),),
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic else None,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _strip(model)
    return model


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """Let no parameter want a gradient meanwhile.

    torch takes another kernel for an attention whose mask, or bias, wants one; the exporter traces
    the network with and without, and its passes disagree on how the result lies in memory.
    """
    wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _strip(model: onnx.ModelProto) -> None:
    """Drop what depends on the machine or only serves the exporter's debugging."""
    for node in model.graph.node:
        node.doc_string = ""
        kept = [prop for prop in node.metadata_props if prop.key == KEPT_METADATA]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    del model.graph.metadata_props[:]
