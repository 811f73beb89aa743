"""Creates networks by their timm name, with errors that say what to do."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

import care  # noqa: F401  registers our networks with timm
from pipeline.core.errors import ModelError
from pipeline.core.words import nearest


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """Create a network by its timm name, ours or any other.

    Args:
        name: Such as "care_s0" or "regnety_160.deit_in1k".
        **kwargs: Handed to the network, such as `num_classes` or `drop_path_rate`.

    Raises:
        ModelError: The name is unknown (the nearest one is suggested), or the network does not take
            one of the arguments.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models())
        raise ModelError(
            f"unknown model {name!r}{hint or '; timm.list_models() lists the known names'}"
        )
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise ModelError(f"model {architecture} has no weights {tag!r}{nearest(name, tags)}")
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except TypeError as error:
        raise ModelError(f"{name} does not take these arguments: {error}") from error
    return model
