from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import Tensor, nn

from care.layouts import fitting
from pipeline.core.errors import CheckpointError

State = dict[str, Tensor]


def network(name: str = "test_resnet") -> tuple[nn.Module, State]:
    """A network and weights for it, under its names."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=4)
    return model, {k: v.clone() for k, v in model.state_dict().items()}


def below(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "model._orig_mod.", "a.b."])
def test_a_prefix_of_every_name(prefix: str) -> None:
    model, state = network()
    assert_same(fitting(below(prefix, state), model), state)


def test_what_lies_beside_the_network_is_left() -> None:
    model, state = network()
    beside = {"criterion.weight": torch.zeros(3), "metric": torch.zeros(())}
    assert_same(fitting({**below("model.", state), **beside}, model), state)


def test_a_head_beside_a_backbone() -> None:
    model, state = network()
    written = {n if n.startswith("fc.") else f"backbone.{n}": v for n, v in state.items()}
    assert_same(fitting(written, model), state)


def test_a_moving_average_beside_the_network_is_left() -> None:
    model, state = network()
    average = {name: value + 1 for name, value in state.items()}
    both = {**below("ema_model.", average), **below("model.", state)}
    assert_same(fitting(both, model), state)
    assert_same(fitting(below("ema_model.", average), model), average)


@pytest.mark.parametrize("prefixes", [("student.", "teacher."), ("", "model.")])
def test_a_network_twice_is_refused(prefixes: tuple[str, str]) -> None:
    model, state = network()
    both = {**below(prefixes[0], state), **below(prefixes[1], state)}
    with pytest.raises(CheckpointError, match="holds this network several times, also under"):
        fitting(both, model)


@pytest.mark.parametrize("change", ["missing", "misshapen", "renamed"])
def test_nothing_is_guessed_by_halves(change: str) -> None:
    model, state = network()
    written = below("model.", state)
    value = written.pop("model.fc.weight")
    if change == "misshapen":
        written["model.fc.weight"] = value[:2]
    if change == "renamed":
        written["model.fc.wait"] = value
    assert fitting(written, model) is written


def old_convnext(state: State) -> State:
    """Names and shapes as its authors published them."""
    old = {}
    for name, value in state.items():
        name = re.sub(r"^stem\.(\d)", r"downsample_layers.0.\1", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.(\d+)", r"stages.\1.\2", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1")
        name = name.replace("mlp.fc2", "pwconv2").replace("head.norm", "norm")
        name = name.replace("head.fc", "head")
        old[name] = value.flatten(1) if "pwconv" in name and value.ndim == 4 else value
    return old


@pytest.mark.parametrize("prefix", ["", "model."])
def test_layouts_that_timm_reads(prefix: str) -> None:
    model, state = network("convnext_atto")
    assert_same(fitting(below(prefix, old_convnext(state)), model), state)


def test_buffers_that_timm_no_longer_keeps() -> None:
    model, state = network("swin_tiny_patch4_window7_224")
    index = "layers.0.blocks.0.attn.relative_position_index"
    old = {**state, index: torch.zeros(49, 49), "layers.0.blocks.1.attn_mask": torch.zeros(64, 49)}
    assert_same(fitting(old, model), state)


def test_a_filter_that_fails_fits_nothing() -> None:
    model, state = network("convnext_atto")
    odd = {"head.weight": state["head.fc.weight"], "stages.x": torch.zeros(3, 3)}
    assert fitting(odd, model) is odd


def test_what_is_far_larger_is_not_filtered() -> None:
    model, state = network("convnext_atto")
    huge = {**old_convnext(state), "projectors.0": torch.zeros(1).expand(10**9)}
    assert fitting(huge, model) is huge
