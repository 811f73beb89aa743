"""The networks that the benchmarks run, and their graphs: shared by the scripts beside it.

Latency and what can be built do not depend on weights: there, the networks' own initialization
serves. Where half precision ends does depend on them: for that there is a formula with the spread
that trained networks have, the same everywhere.
"""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import nn

NETWORKS = ("care_s0", "care_s1", "care_s2", "mlla_t")
SHAPE = (3, 224, 224)


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter that depends on its name and shape alone."""
    rng = np.random.default_rng([7, zlib.crc32(name.encode())])
    if name.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif name.endswith(("running_mean", "bias")):
        value = 0.1 * rng.standard_normal(shape)
    elif name.endswith("gamma"):
        value = rng.uniform(0.1, 0.5, shape)
    elif len(shape) == 1:
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32)


def published_form(name: str, weights: Path | Literal["initial", "formula"]) -> nn.Module:
    """A network as it was published, in evaluation mode.

    Args:
        name: Its name in timm.
        weights: A checkpoint, the network's own initialization, or the formula.
    """
    import timm
    import torch

    import care.networks  # noqa: F401  registers the networks

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name).eval()
    if weights == "initial":
        return model
    if weights != "formula":
        from care.checkpoint import load

        load(weights, model)
        return model
    return with_formula(model)


def with_formula(model: nn.Module) -> nn.Module:
    """Give a network the weights of the formula; returns the network."""
    import torch

    state = model.state_dict()
    for key, value in state.items():
        if not key.endswith(("num_batches_tracked", "rotations")):
            state[key] = torch.from_numpy(parameter(key, tuple(value.shape)))
    model.load_state_dict(state)
    return model


def inference_form(name: str) -> nn.Module:
    """The form that the pipeline builds from, with its own initialization."""
    return fused(published_form(name, "initial"))


def fused(model: nn.Module) -> nn.Module:
    """A network in the form that is deployed."""
    from care.inference import inference_form

    return inference_form(model, SHAPE).module


def write_graph(module: nn.Module, path: Path, size: int = SHAPE[-1]) -> None:
    """Write a module as the pipeline does: exported with a dynamic batch, and simplified.

    Args:
        module: A classifier in evaluation mode.
        path: The ONNX file.
        size: Height and width of the images.
    """
    # Not above: half_hardware.py runs where only torch and timm are.
    from pipeline.graphs import float16
    from pipeline.graphs.compare import random_images
    from pipeline.stages.export import trace
    from pipeline.stages.simplify import simplify_apart

    shape = (SHAPE[0], size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.onnx reads deprecated attributes of its own
        model = trace(module, random_images(2, shape))
    exported = path.with_suffix(".exported.onnx")
    float16.write_graph(model, exported)
    if why_not := simplify_apart(exported, path, timeout_s=300):
        print(f"{path.name} is not simplified: {why_not}")
        exported.replace(path)
    exported.unlink(missing_ok=True)
