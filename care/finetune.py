"""Fine-tuning: weights to start from, a head made anew, a body that learns slowly or not at all.

    start = begin(settings.init, model, create)
    start.remade                      # ("head.fc.weight", "head.fc.bias")
    freeze_body(model)

The weights are read into a network of their own number of classes, strictly and in every layout
that is known; from there all but a head of another size is taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from care import checkpoint
from care.factory import create_hub
from care.pretrained import fetch_hub
from pipeline.core.checkpoints import HUB
from pipeline.core.errors import CheckpointError, ConfigError, ModelError, about
from pipeline.core.words import in_short

EMBEDDED, PRETRAINED = "embedded", "pretrained"

_MOST_CLASSES = 50_000
"""A file may state any number, and a network of so many classes is made to compare."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Start:
    """What a network started from.

    Attributes:
        origin: Where its weights come from, for people.
        remade: Names of the head's tensors that were made anew, as the number of classes differs.
    """

    origin: str
    remade: tuple[str, ...]

    def words(self, classes: int) -> str:
        """A line for people.

        Args:
            classes: Of the network.
        """
        if not self.remade:
            return f"starting from {self.origin}"
        names = ", ".join(self.remade)
        return f"starting from {self.origin}; made anew for {classes} classes: {names}"


def begin(
    init: str,
    name: str,
    model: nn.Module,
    create: Callable[[int], nn.Module],
    pretrained: Callable[[], nn.Module],
) -> Start:
    """Give a network the weights to start from, in place; all of them or none.

    Args:
        init: A checkpoint file, "embedded", "pretrained", or "hub:organization/repository".
        name: The network's name.
        model: The network.
        create: Makes the same network for another number of classes.
        pretrained: Makes it with the weights that timm has of it.

    Raises:
        CheckpointError: The weights cannot be read, or more than the head does not fit.
        ModelError: There are none.
    """
    with torch.random.fork_rng(devices=[]):  # training draws the same numbers as without
        if init == PRETRAINED:
            donor = _downloaded(name, pretrained)
            return Start(_origin(donor, name), _take_over(donor, model, name))
        if init.startswith(HUB):
            with about(f"--init {init}"):
                donor, origin = _of_hub(init.removeprefix(HUB), name)
            return Start(origin, _take_over(donor, model, origin))
        path = _embedded(name) if init == EMBEDDED else Path(init)
        state = checkpoint.read(path)
        stated = checkpoint.read_metadata(path).get("num_classes")
        donor = _donor(state, stated, model, create, str(path))
        return Start(str(path), _take_over(donor, model, str(path)))


def head_classes(state: State, model: nn.Module) -> int | None:
    """How many classes the head of a checkpoint has, if it has one under the network's names.

    Args:
        state: The checkpoint's weights.
        model: The same network, of any number of classes.
    """
    for name in _head_names(model):
        found = [value for key, value in state.items() if _is_called(key, name)]
        if name.endswith("weight") and found and found[0].ndim > 1:
            return int(found[0].shape[0])
    return None


def freeze_body(model: nn.Module) -> None:
    """Let nothing but the head learn.

    Raises:
        ConfigError: The network does not say which its head is.
    """
    head = _head_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)


def set_training(model: nn.Module) -> None:
    """Set training mode; parts in which nothing learns stay as they are deployed.

    BatchNorm's statistics are theirs, too: a frozen body computes the same at every step.
    """
    model.train()
    if all(parameter.requires_grad for parameter in model.parameters()):
        return
    for module in model.children():
        _set_evaluation_where_frozen(module)


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None, body_lr_factor: float
) -> list[dict[str, Any]]:
    """Timm's parameter groups, in each of which body and head are kept apart.

    Args:
        model: The network.
        weight_decay: See `care.settings`.
        layer_decay: See `care.settings`.
        body_lr_factor: Learning rate of the body relative to the head's.

    Raises:
        ConfigError: The network does not say which its head is.
    """
    undecayed: set[str] = getattr(model, "no_weight_decay", set)()
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=undecayed)
    else:
        groups = param_groups_layer_decay(
            model, weight_decay, no_weight_decay_list=undecayed, layer_decay=layer_decay
        )
    head = {id(p) for name, p in model.named_parameters() if name in _head_of(model)}
    return [part for group in groups for part in _apart(group, head, body_lr_factor)]


def _apart(group: dict[str, Any], head: set[int], factor: float) -> Iterator[dict[str, Any]]:
    """The head's parameters of a group, and the body's, which learn more slowly."""
    own = [parameter for parameter in group["params"] if id(parameter) in head]
    body = [parameter for parameter in group["params"] if id(parameter) not in head]
    if own:
        yield {**group, "params": own}
    if body:
        scale = float(group.get("lr_scale", 1.0))
        yield {**group, "params": body, "lr_scale": scale * factor}


def _head_of(model: nn.Module) -> set[str]:
    names = set(_head_names(model)) & {name for name, _ in model.named_parameters()}
    if not names:
        raise ConfigError(
            f"{type(model).__name__} does not say which its head is: leave --freeze and "
            "--body-lr-factor out"
        )
    return names


def _head_names(model: nn.Module) -> list[str]:
    """Names of the tensors of the classifiers, as timm's networks say which these are."""
    ask = getattr(model, "get_classifier", None)
    found = ask() if callable(ask) else ()
    heads = found if isinstance(found, tuple | list) else (found,)
    prefixes = [
        name
        for name, module in model.named_modules()
        if name and any(module is head for head in heads)
    ]
    return [n for n in model.state_dict() if any(n.startswith(f"{p}.") for p in prefixes)]


def _is_called(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _set_evaluation_where_frozen(module: nn.Module) -> None:
    learns = [parameter.requires_grad for parameter in module.parameters()]
    if not any(learns):
        module.eval()
        return
    for child in module.children():
        _set_evaluation_where_frozen(child)


def _embedded(name: str) -> Path:
    path = checkpoint.embedded(name)
    if path is None:
        raise ModelError(
            f"--init {EMBEDDED}: the package carries no weights of {name}: name a checkpoint file, "
            f"or give --model care_tiny"
        )
    return path


def _downloaded(name: str, pretrained: Callable[[], nn.Module]) -> nn.Module:
    try:
        with about(f"--init {PRETRAINED}"):
            return pretrained()
    except ModelError:
        raise
    except Exception as error:  # timm, the hub and the network fail in their own ways
        raise ModelError(
            f"--init {PRETRAINED}: timm's weights of {name} cannot be had ({in_short(error)}): "
            "name a checkpoint file"
        ) from error


def _of_hub(repository: str, name: str) -> tuple[nn.Module, str]:
    """A network of the Hub's with its weights, and where these are from, for people.

    Raises:
        CheckpointError: Its weights cannot be read, or do not fit it.
        ModelError: It cannot be had, or is another network.
    """
    found = fetch_hub(repository)
    wanted = name.partition(".")[0]
    if found.architecture.partition(".")[0] != wanted:
        raise ModelError(
            f"it holds a {found.architecture}, and a {wanted} is trained: give --model "
            f"{found.architecture}, or weights of {wanted}"
        )
    donor = create_hub(found)
    checkpoint.load(found.weights.path, donor)
    licence = f" ({found.weights.licence})" if found.weights.licence else ""
    return donor, f"{found.weights.name}{licence}"


def _origin(donor: nn.Module, name: str) -> str:
    stated = getattr(donor, "pretrained_cfg", None) or {}
    tag = f".{stated['tag']}" if stated.get("tag") and "." not in name else ""
    licence = f" ({stated['license']})" if stated.get("license") else ""
    return f"timm's weights {name}{tag}{licence}"


def _donor(
    state: State,
    stated: object,
    model: nn.Module,
    create: Callable[[int], nn.Module],
    where: str,
) -> nn.Module:
    """The network of the checkpoint's own number of classes, with its weights.

    Raises:
        CheckpointError: They fit none.
    """
    refusal: CheckpointError | None = None
    for classes in _numbers_of_classes(state, stated, model):
        donor = create(classes)
        try:
            checkpoint.place(dict(state), donor, where)
        except CheckpointError as error:
            refusal = refusal or error
        else:
            return donor
    assert refusal is not None
    raise refusal


def _numbers_of_classes(state: State, stated: object, model: nn.Module) -> list[int]:
    """How many classes a checkpoint may be of, the likeliest first.

    By the head under the network's own names, by what the file says, and, where other programs gave
    other names, by the last matrix, which is the classifier in nearly all networks; last as many as
    the network has, and none, for bodies that are published alone.
    """
    matrices = [value.shape[0] for value in state.values() if value.ndim in (2, 4)]
    own = getattr(model, "num_classes", None)
    candidates = (head_classes(state, model), stated, own, *matrices[-1:], 0)
    numbers = [n for n in candidates if type(n) is int and 0 <= n <= _MOST_CLASSES]
    return list(dict.fromkeys(numbers))


def _take_over(donor: nn.Module, model: nn.Module, where: str) -> tuple[str, ...]:
    """Copy all that has the same shape; the rest has to be of the head."""
    given, own = donor.state_dict(), model.state_dict()
    other = [n for n in own if n not in given or given[n].shape != own[n].shape]
    with about(where):
        if strange := [name for name in other if name not in _head_names(model)]:
            raise CheckpointError(
                f"{', '.join(strange[:10])} would have another shape, and is no part of the head: "
                "take a checkpoint of this very network"
            )
    fitting = {name: value for name, value in given.items() if name in own and name not in other}
    model.load_state_dict({**own, **fitting})
    return tuple(other)
