"""Creates networks by their timm name, with errors that say what to do."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import care.networks  # noqa: F401  registers our networks with timm
from care.pretrained import HubNetwork, fetch
from pipeline.core.arguments import first_excessive, first_reserved, first_unknown
from pipeline.core.errors import CheckpointError, ModelError
from pipeline.core.machine import memory
from pipeline.core.words import nearest, shown

# How Python says that a function takes no such argument.
_UNKNOWN = re.compile(r"(?P<owner>[\w.]+)\(\) got an unexpected keyword argument '(?P<name>\w+)'")


def create_model(name: str, /, **kwargs: Any) -> nn.Module:
    """Create a network by its timm name, ours or any other.

    Args:
        name: Such as "care_s0" or "regnety_160.deit_in1k".
        **kwargs: Handed to the network, such as `num_classes` or `drop_path_rate`; none that make
            timm load weights or make something else (see `pipeline.core.arguments`).

    Raises:
        ModelError: The name is unknown (the nearest one is suggested), or the network does not take
            one of the arguments.
    """
    # What this version of timm takes itself may be more than what we know of.
    taken = [key for key in kwargs if key in inspect.signature(timm.create_model).parameters]
    if problem := first_reserved(kwargs) or first_excessive(kwargs):
        raise ModelError(problem)
    if taken:
        raise ModelError(f"{taken[0]} cannot be an argument of the network: timm takes it itself")
    require_known(name)
    further = kwargs.keys() - {"num_classes"}
    if further:
        _check_size(name, kwargs)
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except Exception as error:  # constructors refuse odd values in whatever way they meet them
        raise ModelError(_why_none(name, kwargs, error)) from error
    return model


def check_input(model: nn.Module, shape: tuple[int, int, int], classes: int) -> None:
    """Check that a network takes one image of a shape, and gives a logit for each class.

    Args:
        model: In evaluation mode, on the CPU.
        shape: (channels, height, width).
        classes: How many logits it should give.

    Raises:
        ModelError: It does not.
    """
    size = " x ".join(map(str, shape))
    _require_one_input(model)
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, *shape))
    except Exception as error:  # layers refuse a shape in whatever way they meet it
        raise ModelError(
            f"the network does not take images of {size} (channels, height, width): "
            f"{_in_one_line(error)}: set preprocess to what it takes"
        ) from error
    found = getattr(logits, "shape", None)
    if found != (1, classes):
        if isinstance(logits, tuple | list | dict):
            raise ModelError(
                f"the network gives a {type(logits).__name__} of {len(logits)} for an image, not "
                f"one tensor of {classes} logits: wrap it in a module that returns the logits alone"
            )
        what = "no tensor" if found is None else "x".join(map(str, found))
        raise ModelError(
            f"the network gives {what} for an image, not {classes} logits: take a classifier"
        )


def _require_one_input(model: nn.Module) -> None:
    """Refuse a network that images alone do not suffice for.

    Raises:
        ModelError: It takes other than one argument.
    """
    try:
        asked = inspect.signature(model.forward)
        asked.bind(None)
    except ValueError:  # what is written in C states none
        return
    except TypeError as error:
        names = ", ".join(asked.parameters) or "nothing"
        raise ModelError(
            f"the network takes {names}, not one tensor of images ({error}): wrap it in a module "
            "whose forward takes images alone"
        ) from error


def _check_size(name: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that make a network larger than the memory, before it is filled."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **kwargs)
    except Exception as error:
        if "meta" in str(error):
            return  # Some networks compute with values while they are made.
        raise ModelError(_why_none(name, kwargs, error)) from error
    needed = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if needed > memory() / 2:
        raise ModelError(
            f"{name} with these arguments takes {needed / 1e9:.3g} GB, this process may use "
            f"{memory() / 1e9:.3g} GB: make it smaller"
        )


def _why_none(name: str, kwargs: Mapping[str, Any], error: Exception) -> str:
    reason = _in_one_line(error)
    unknown = _UNKNOWN.search(reason)
    if unknown is not None:
        hint = nearest(unknown["name"], _taken(name, str(unknown["owner"])))
        return f"{name} does not take the argument {unknown['name']!r}{hint}"
    if isinstance(error, TypeError | AttributeError):
        return f"{name} does not take these arguments: {reason}"
    return f"{name} cannot be made with these arguments: {reason}"


def _taken(name: str, owner: str) -> list[str]:
    """Arguments of the function or class of a network that refused one."""
    module = sys.modules[timm.models.model_entrypoint(name.partition(".")[0]).__module__]
    made = getattr(module, owner.partition(".")[0], None)
    return list(inspect.signature(made).parameters) if callable(made) else []


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def create_pretrained(name: str, **kwargs: Any) -> nn.Module:
    """Create a network with the weights that timm has of it, downloaded if need be.

    Args:
        name: Such as "resnet18" or "regnety_160.deit_in1k".
        **kwargs: Handed to the network, as for `create_model`.

    Raises:
        ModelError: The name is unknown, or the weights can be had in no way.
        OSError: timm's own download failed; other errors of timm's pass through, too.
    """
    require_known(name)
    stated = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if stated is not None and stated.hf_hub_id and not stated.custom_load:
        # timm asks the Hub even for what lies in the cache and, where there is no network, for
        # every form of the file as often as the Hub's client tries.
        kwargs["pretrained_cfg_overlay"] = {"file": str(fetch(name).path)}
    model: nn.Module = timm.create_model(name, pretrained=True, **kwargs)
    return model


def create_hub(found: HubNetwork, **kwargs: Any) -> nn.Module:
    """Create a network of the Hub's as it was saved, with random weights.

    Args:
        found: What its repository says.
        **kwargs: Handed to the network, and before what was saved with it.

    Raises:
        ModelError: timm has no such network, or it cannot be made with what was saved.
    """
    name, stated = found.architecture, dict(found.stated)
    require_known(name)
    arguments = {**found.arguments, **kwargs}
    if problem := first_reserved(kwargs) or first_excessive(arguments):
        raise ModelError(f"{found.repository} of the Hub: {problem}")
    _check_size(name, {**arguments, "pretrained_cfg": stated})
    try:
        model: nn.Module = timm.create_model(name, pretrained_cfg=stated, **arguments)
    except Exception as error:  # networks refuse arguments in whatever way they meet them
        raise ModelError(
            f"{found.repository} of the Hub cannot be made by timm {timm.__version__}: "
            f"{_in_one_line(error)}"
        ) from error
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


def require_known(name: str) -> None:
    """Refuse a name that timm and this project do not know.

    Args:
        name: Of a network, with or without the tag of its weights.

    Raises:
        ModelError: There is no such network, or it has no such weights.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models())
        raise ModelError(
            f"unknown model {shown(name)!r}{hint or '; timm.list_models() lists the known names'}"
        )
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise ModelError(f"model {architecture} has no weights {shown(tag)!r}{nearest(name, tags)}")
