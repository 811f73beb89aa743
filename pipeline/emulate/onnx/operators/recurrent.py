"""Recurrent layers."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate import kernels, rounding
from pipeline.emulate.onnx.operators.table import Call, operator

_ACTIVATIONS = ["Sigmoid", "Tanh", "Tanh"]


@operator(
    "LSTM",
    refuses={
        "clip": (None, "clip the values in the network"),
        "input_forget": (0, "give both gates weights of their own"),
    },
)
def _lstm(
    call: Call,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The state is rounded after each step, as a loop of a runtime stores it."""
    rows_first = bool(call.attribute("layout", 0))
    if rows_first:
        x = x.transpose(0, 1)
        hidden, cell = (None if each is None else each.transpose(0, 1) for each in (hidden, cell))
    _check(call, lengths is None or bool((lengths == len(x)).all()))
    directions, _, size = recurrence.shape
    kind = call.attribute("direction", "forward")
    none = x.new_zeros(directions, x.shape[1], size)
    states = [none if hidden is None else hidden, none if cell is None else cell]
    found = []
    for i in range(directions):
        backwards = kind == "reverse" or i == 1
        of_bias, of_peepholes = (None if each is None else each[i] for each in (bias, peepholes))
        steps = x.flip(0) if backwards else x
        made, *last = _direction(
            call,
            steps,
            (weight[i], recurrence[i], of_bias, of_peepholes),
            (states[0][i], states[1][i]),
        )
        found.append((made.flip(0) if backwards else made, *last))
    results = [torch.stack(each, -3) for each in zip(*found, strict=True)]
    if rows_first:
        results = [results[0].permute(2, 0, 1, 3), *(each.transpose(0, 1) for each in results[1:])]
    return tuple(results)


def _check(call: Call, whole: bool) -> None:
    """Refuse what is not computed.

    Args:
        call: The call.
        whole: All sequences are as long as the longest.
    """
    activations = call.attribute("activations", _ACTIVATIONS)
    usual = activations == _ACTIVATIONS * (len(activations) // len(_ACTIVATIONS))
    if whole and usual:
        return
    what = "other activations" if whole else "shorter sequences among others"
    raise UnsupportedOperatorError(
        f"node {call.node.name!r}: operator LSTM of the domain 'ai.onnx' with {what} is not "
        "computed; write it without, or build the target ort"
    )


def _direction(
    call: Call,
    steps: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    state: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of an LSTM.

    Args:
        call: The call.
        steps: (steps, batch, channels), in the order in which they are read.
        weights: Of the input, of the state, biases of both, and of the peepholes; gates lie in the
            order input, output, forget, cell.
        state: Output and cell before the first step, (batch, size).

    Returns:
        The outputs (steps, batch, size), the last output, the last cell.
    """
    weight, recurrence, bias, peepholes = weights
    output, cell = state
    size = recurrence.shape[-1]
    gates = kernels.matmul(steps, weight.T, partial=call.partial)
    if bias is not None:
        gates = gates + bias[: 4 * size] + bias[4 * size :]
    none = steps.new_zeros(size)
    of_input, of_output, of_forget = (
        (none, none, none) if peepholes is None else peepholes.split(size)
    )
    outputs = []
    for given in gates:
        given = given + kernels.matmul(output, recurrence.T, partial=call.partial)
        enters, leaves, stays, new = given.split(size, -1)
        stays = torch.sigmoid(stays + of_forget * cell)
        enters = torch.sigmoid(enters + of_input * cell)
        cell = rounding.round_to(stays * cell + enters * torch.tanh(new), call.dtype)
        leaves = torch.sigmoid(leaves + of_output * cell)
        output = rounding.round_to(leaves * torch.tanh(cell), call.dtype)
        outputs.append(output)
    return torch.stack(outputs), output, cell
