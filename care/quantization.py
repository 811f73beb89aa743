"""Fine-tuning in the precision of a target: the network computes in 8 bits while it learns.

    network = QuantizedNetwork(model, begin("ort/int7", model, images))
    network(images)         # logits by the graph that the target is given
    network.state_dict()    # the weights of the model, as ever

A forward pass makes the deployed form's weights out of the network's own, norms folded with the
statistics that they have, and runs the target's graph on them. That graph is the pipeline's own,
whose floors lie above this one: so it is found by its name, as targets are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from care.data import Dataset
from care.inference import deployed_weights, has_deployed_weights, inference_form
from pipeline.core.described import Quantized
from pipeline.core.errors import ConfigError, ModelError, about
from pipeline.core.network import Images
from pipeline.core.preprocess import Preprocess
from pipeline.core.words import nearest

_PLACES = {
    "ort/int8": "pipeline.stages.training:trainable",
    "ort/int7": "pipeline.stages.training:trainable",
    "coreml/int8": "pipeline.stages.training:compressed_form",
    "coreml/palette6": "pipeline.stages.training:compressed_form",
    "coreml/palette4": "pipeline.stages.training:compressed_form",
    "coreml/pruned50": "pipeline.stages.training:compressed_form",
    "coreml/pruned75": "pipeline.stages.training:compressed_form",
}
"""What makes the form of a precision: module and callable."""


class Form(Protocol):
    """A network's deployed form in a precision, as a function of its weights."""

    @property
    def quantized(self) -> Quantized:
        """The precision and its ranges, as a checkpoint states them."""

    def __call__(self, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Logits, (batch, classes), of normalized images, (batch, channels, height, width)."""


def problem_with_precision(name: str) -> str | None:
    """Why no network can be fine-tuned in a precision, as a line; None if it can."""
    if name in _PLACES:
        return None
    return f"there is {', '.join(_PLACES)}{nearest(name, _PLACES)}"


def calibration_images(dataset: Dataset, spec: Preprocess, count: int, seed: int) -> Images:
    """Images of the training split, as the network sees them when it is deployed.

    Args:
        dataset: The training split.
        spec: How images are preprocessed.
        count: Most images.
        seed: Chooses them.

    Raises:
        DataError: An image cannot be read.
    """
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:count]
    return np.stack([spec(dataset.image(index)) for index in chosen.tolist()])


def begin(precision: str, model: nn.Module, images: Images) -> Form:
    """The form of a precision.

    Args:
        precision: Its name.
        model: The network as it is trained in float32; it is left in evaluation mode.
        images: See `calibration_images`.

    Raises:
        ConfigError: There is no such precision.
        ModelError, BuildError: The network has no form that learns in it.
    """
    if problem := problem_with_precision(precision):
        raise ConfigError(f"unknown precision {precision!r}: {problem}")
    if not has_deployed_weights(model):
        raise ModelError(
            f"--quantize {precision}: {type(model).__name__} is rewritten when it is deployed, and "
            "gradients do not find back through that: fine-tune a network of care"
        )
    module, _, name = _PLACES[precision].partition(":")
    make: Callable[..., Form] = getattr(importlib.import_module(module), name)
    form = inference_form(model.eval(), (images.shape[1], images.shape[2], images.shape[3]))
    weights = deployed_weights(model)
    learning = [name for name, value in weights.items() if value.requires_grad]
    with about(f"--quantize {precision}"):
        return make(form.module, images, precision, learning)


class QuantizedNetwork(nn.Module):
    """A network that computes in the precision of a target.

    Norms keep their statistics, and nothing is dropped: it computes the same in training as in
    evaluation, which is what will be deployed. Its state is that of the network alone.

    Args:
        network: What learns.
        form: How it computes.
    """

    def __init__(self, network: nn.Module, form: Form) -> None:
        super().__init__()
        self.network, self.form = network.eval(), form

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (batch, classes)."""
        return self.form(deployed_weights(self.network), images.contiguous())

    def train(self, mode: bool = True) -> QuantizedNetwork:
        """Gradients are all that training mode changes."""
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own."""
        return self.network.load_state_dict(*args, **kwargs)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone."""
        undecayed: set[str] = getattr(self.network, "no_weight_decay", set)()
        return {f"network.{name}" for name in undecayed}
