"""Creates networks by their timm name, with errors that say what to do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

import care  # noqa: F401  registers our networks with timm
from pipeline.core.arguments import first_reserved, first_unknown
from pipeline.core.errors import CheckpointError, ModelError
from pipeline.core.words import nearest

# How constructors refuse values that make no network, such as a depth of 0.
_NO_NETWORK = (ValueError, RuntimeError, AssertionError, LookupError, ArithmeticError)


def create_model(name: str, /, **kwargs: Any) -> nn.Module:
    """Create a network by its timm name, ours or any other.

    Args:
        name: Such as "care_s0" or "regnety_160.deit_in1k".
        **kwargs: Handed to the network, such as `num_classes` or `drop_path_rate`; none that make
            timm load weights or make something else (see `pipeline.arguments`).

    Raises:
        ModelError: The name is unknown (the nearest one is suggested), or the network does not take
            one of the arguments.
    """
    # What this version of timm takes itself may be more than what we know of.
    taken = [key for key in kwargs if key in inspect.signature(timm.create_model).parameters]
    if problem := first_reserved(kwargs):
        raise ModelError(problem)
    if taken:
        raise ModelError(f"{taken[0]} cannot be an argument of the network: timm takes it itself")
    _check_name(name)
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except (TypeError, AttributeError) as error:
        raise ModelError(f"{name} does not take these arguments: {error}") from error
    except _NO_NETWORK as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{name} cannot be made with these arguments: {reason}") from error
    return model


def create_pretrained(name: str) -> nn.Module:
    """Create a network with the weights that timm has of it, downloaded if need be.

    Raises:
        ModelError: The name is unknown.
        OSError: The download failed; other errors of timm's pass through, too.
    """
    _check_name(name)
    model: nn.Module = timm.create_model(name, pretrained=True)
    return model


def stated_arguments(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The constructor's arguments that a checkpoint states, as far as a file may state any.

    Args:
        metadata: What the checkpoint says about itself.
        path: The checkpoint, for messages.

    Raises:
        CheckpointError: It states something else than harmless arguments.
    """
    stated = metadata.get("model_kwargs", {})
    if not isinstance(stated, Mapping):
        raise CheckpointError(f"{path} was refused: its model_kwargs are no mapping")
    if problem := first_unknown(stated):
        raise CheckpointError(
            f"{path} was refused: in its metadata, {problem}; take a checkpoint that you trust"
        )
    return dict(stated)


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models())
        raise ModelError(
            f"unknown model {name!r}{hint or '; timm.list_models() lists the known names'}"
        )
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise ModelError(f"model {architecture} has no weights {tag!r}{nearest(name, tags)}")
