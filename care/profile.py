"""Count what a network costs: `python -m care.profile [MODEL …]`.

Parameters, multiply-accumulates (MACs) and activations of one image, of the whole network and of
each stage, with the published values beside ours. Counted are convolutions and matrix products, as
the papers do; norms, activation functions and additions are left out. Activations are the elements
that these operations write, a better predictor of latency than MACs (Dollár et al., 2021).
"""

from __future__ import annotations

from pipeline.core import signals

if __name__ == "__main__":
    signals.leave_while_loading()

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from care.cost import Cost
from care.factory import create_model
from pipeline.core import published
from pipeline.core.commandline import Command
from pipeline.core.preprocess import Preprocess
from pipeline.core.screen import Screen

PUBLISHED = {row.model: row for row in published.PUBLISHED}
DEFAULT_MODELS = (*PUBLISHED, "care_tiny")


@dataclass(frozen=True)
class Profile:
    """The cost of a network and of each of its stages.

    Attributes:
        input_size: Channels, height and width of the image.
        total: Of the whole network.
        stages: In the order of the computation; they add up to the total.
    """

    input_size: tuple[int, int, int]
    total: Cost
    stages: list[Cost]


class _Counter(TorchDispatchMode):
    """Adds the cost of every operation to the stage that is being computed."""

    def __init__(self, outside: Cost) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = outside

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            # torch counts a multiplication and an addition as two.
            self.current.macs += formula(*args, **(kwargs or {}), out_val=result) // 2
            # Fused attention also returns what its backward pass needs.
            self.current.activations += (result[0] if isinstance(result, tuple) else result).numel()
        return result


def profile(model: nn.Module, name: str, size: int | None = None) -> Profile:
    """Count the cost of one image.

    Args:
        model: A timm model; set to evaluation mode.
        name: What to call it.
        size: Height and width of the image; by default what the model states.

    Raises:
        PreprocessError: The model does not state its input.
        ModelError: The network does not take images of this size.
    """
    spec = Preprocess.from_model(model, size)
    input_size = (spec.depth, spec.size, spec.size)
    parts = dict(_stages(model))
    rest = Cost("rest", parameters=_parameters(model))
    costs = {part: Cost(part, _parameters(module)) for part, module in parts.items()}
    rest.parameters -= sum(cost.parameters for cost in costs.values())
    with torch.no_grad(), _Counter(rest) as counter, contextlib.ExitStack() as hooks:
        for part, module in parts.items():
            hooks.enter_context(_counted(module, counter, costs[part]))
        model.eval()(torch.zeros(1, *input_size))
    stages = [*costs.values()]
    if rest.parameters or rest.macs:
        stages.append(rest)
    total = Cost(
        name,
        sum(cost.parameters for cost in stages),
        sum(cost.macs for cost in stages),
        sum(cost.activations for cost in stages),
    )
    return Profile(input_size, total, stages)


def count(model: nn.Module, shape: tuple[int, int, int]) -> Cost:
    """Count what a network costs for one image, as a whole.

    Args:
        model: In evaluation mode.
        shape: (channels, height, width).
    """
    total = Cost("total", parameters=_parameters(model))
    with torch.no_grad(), _Counter(total):
        model(torch.zeros(1, *shape))
    return total


def _stages(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The network's parts by name; sequences of stages are opened."""
    for name, child in model.named_children():
        if name in ("stages", "layers", "blocks"):
            for number, stage in child.named_children():
                yield f"{name}.{number}", stage
        elif _parameters(child):
            yield name, child


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@contextlib.contextmanager
def _counted(module: nn.Module, counter: _Counter, cost: Cost) -> Iterator[None]:
    """While this is open, what `module` computes is added to `cost`."""
    before: list[Cost] = []

    def enter(*_: Any) -> None:
        before.append(counter.current)
        counter.current = cost

    def leave(*_: Any) -> None:
        counter.current = before.pop()

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@click.command(cls=Command)
@click.argument("models", nargs=-1, metavar="[MODEL]…")
@click.option("--image-size", type=click.IntRange(32), help="By default what the model states.")
@click.option("--num-classes", type=click.IntRange(1), help="By default what the model states.")
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
def main(
    models: tuple[str, ...], image_size: int | None, num_classes: int | None, as_json: bool
) -> None:
    """Print parameters, MACs and activations of networks and of their stages.

    MODEL is any timm name; by default the published networks and care_tiny, which is ours.
    """
    kwargs = {"num_classes": num_classes} if num_classes else {}
    profiles = [
        profile(create_model(name, **kwargs), name, image_size) for name in models or DEFAULT_MODELS
    ]
    # Wide enough for every column where there is no terminal to ask.
    console = Screen()
    if not console.is_terminal:
        console.width = 120
    console.print(_summary(profiles))
    for each in profiles:
        console.print(_details(each))
    if as_json:
        click.echo(json.dumps([asdict(each) for each in profiles]))


def _summary(profiles: list[Profile]) -> Table:
    table = Table(title="Cost of one image (published values at 224 x 224, 1000 classes)")
    for column in ("Model", "Input", "Parameters", "published", "GMACs", "published",
                   "M activations", "published top-1"):  # fmt: skip
        table.add_column(column, justify="left" if column == "Model" else "right")
    for each in profiles:
        known = PUBLISHED.get(each.total.name)
        table.add_row(
            each.total.name,
            "x".join(map(str, each.input_size)),
            f"{each.total.parameters:,}",
            f"{known.parameters:.1f} M" if known else "-",
            f"{each.total.macs / 1e9:.3f}",
            f"{known.gmacs:.1f}" if known else "-",
            f"{each.total.activations / 1e6:.2f}",
            f"{known.top1:.1f} %" if known else "-",
        )
    return table


def _details(each: Profile) -> Table:
    table = Table(title=f"{each.total.name} by stage")
    table.add_column("Stage")
    for column in ("Parameters", "MMACs", "share", "M activations", "share"):
        table.add_column(column, justify="right")
    for cost in each.stages:
        table.add_row(
            cost.name,
            f"{cost.parameters:,}",
            f"{cost.macs / 1e6:.2f}",
            f"{cost.macs / each.total.macs:.1%}",
            f"{cost.activations / 1e6:.3f}",
            f"{cost.activations / each.total.activations:.1%}",
        )
    return table


if __name__ == "__main__":
    main()
