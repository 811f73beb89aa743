"""The graph of a precision, for the network to be fine-tuned in; see `care.quantization`.

The network goes the way that a run's goes: exported, simplified, prepared for its target, with the
same pairs of quantize and dequantize nodes. Training needs the way back, too, from the constants of
that graph to the weights of the network.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import ModelError
from pipeline.graphs.compare import DYNAMIC_IMAGES, random_images
from pipeline.stages.export import reason, trace
from pipeline.stages.simplify import simplify_apart

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

    from pipeline.core.described import Quantized
    from pipeline.core.network import Images
    from pipeline.graphs.trainable import Codes, TrainableGraph

SIMPLIFY_SECONDS = 600.0
"""How long onnxsim may take."""


class TrainableForm:
    """A network's deployed form in a precision, as a function of its weights.

    Attributes:
        quantized: The precision and its ranges, as a checkpoint states them.
        graph: Computes.
    """

    def __init__(self, quantized: Quantized, graph: TrainableGraph) -> None:
        self.quantized, self.graph = quantized, graph

    def __call__(self, weights: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits, see `TrainableGraph`."""
        return self.graph(weights, images)


def trainable(
    module: nn.Module, images: Images, precision: str, learning: Collection[str]
) -> TrainableForm:
    """Make the form in which ONNX Runtime's target builds a network.

    Args:
        module: The form of the network that is deployed, in evaluation mode, on the CPU.
        images: Preprocessed training images, which choose the ranges.
        precision: "ort/int8" or "ort/int7".
        learning: Names of the weights that learn.

    Raises:
        ModelError, BuildError: The network has no such form.
    """
    from pipeline.graphs.trainable import Codes, TrainableGraph
    from pipeline.targets.ort.quantize import chosen_ranges
    from pipeline.targets.ort.trained import insert_trained

    with tempfile.TemporaryDirectory(prefix="quantized-") as name:
        folder = Path(name)
        state = module.state_dict()
        codes = Codes({name: state[name].numpy() for name in learning})
        source = _simplified(_coded(module, codes, learning), images.shape[1:], folder)
        copies = codes.copies(_prepared(source, folder))
        prepared = _prepared(codes.decoded(source), folder)
    quantized = chosen_ranges(prepared, images, precision)
    return TrainableForm(quantized, TrainableGraph(insert_trained(prepared, quantized), copies))


class CompressedForm:
    """A network's deployed form with weights as a Core ML package stores them.

    Attributes:
        quantized: The precision, as a checkpoint states it.
    """

    def __init__(self, module: nn.Module, precision: str) -> None:
        from pipeline.core.described import Quantized
        from pipeline.targets.coreml.trained import schemes_of

        self.quantized = Quantized(precision, {})
        self._module, self._schemes = module.requires_grad_(False), schemes_of(precision)

    def __call__(self, weights: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits, (batch, classes)."""
        from torch.func import functional_call

        from pipeline.targets.coreml.trained import compressed

        stored = compressed(weights, self._schemes)
        logits: Tensor = functional_call(self._module.to(images.device), stored, (images,))
        return logits


def compressed_form(
    module: nn.Module, images: Images, precision: str, learning: Collection[str]
) -> CompressedForm:
    """Make the form with weights in fewer bits that Core ML's target builds.

    Args:
        module: The form of the network that is deployed, in evaluation mode.
        images: Not needed: there are no ranges.
        precision: Such as "coreml/palette4".
        learning: Not needed: the weights are given at each call.
    """
    del images, learning
    return CompressedForm(module, precision)


def _coded(module: nn.Module, codes: Codes, learning: Collection[str]) -> nn.Module:
    """The module with codes in the places of its weights."""
    import torch

    coded = copy.deepcopy(module)
    coded.load_state_dict({n: torch.from_numpy(codes.of(n)) for n in learning}, strict=False)
    return coded


def _simplified(module: nn.Module, shape: tuple[int, ...], folder: Path) -> onnx.ModelProto:
    """The graph as `stages.export` and `stages.simplify` make it."""
    import onnx

    try:
        exported = trace(module, random_images(DYNAMIC_IMAGES, (shape[0], shape[1], shape[2])))
    except Exception as error:  # the exporter raises whatever the network's code raises
        raise ModelError(f"the network does not export to ONNX: {reason(error)}") from error
    onnx.save(exported, folder / "exported.onnx")
    path = folder / "simplified.onnx"
    refusal = simplify_apart(folder / "exported.onnx", path, SIMPLIFY_SECONDS)
    return exported if refusal else onnx.load(path)


def _prepared(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    import onnx

    from pipeline.targets.ort.quantize import prepare_graph

    path = folder / "source.onnx"
    onnx.save(model, path)
    return prepare_graph(path)
