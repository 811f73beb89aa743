"""Networks along a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate import kernels
from pipeline.emulate.onnx.operators.table import Call, operator
from pipeline.emulate.rounding import round_to

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}
_USUAL = ("Sigmoid", "Tanh", "Tanh")


@operator(
    "LSTM",
    refuses={
        "clip": (0.0, "clip what the layer is given instead"),
        "input_forget": (0, "let it learn its forget gate"),
    },
)
def _lstm(
    call: Call,
    x: Tensor,
    weights: Tensor,
    recurrent: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Both states are rounded at each step: runtimes keep them as tensors of the node's type."""
    batch_first = call.attribute("layout", 0) == 1
    x = x.transpose(0, 1) if batch_first else x
    steps, batch = x.shape[:2]
    directions, size = recurrent.shape[0], recurrent.shape[-1]
    if hidden is not None and cell is not None and batch_first:
        hidden, cell = hidden.transpose(0, 1), cell.transpose(0, 1)
    nothing = torch.zeros(directions, batch, size)
    counts = torch.full((batch,), steps) if lengths is None else lengths.long()
    sequences, hiddens, cells = [], [], []
    for i in range(directions):
        gates = _Gates(
            call,
            weights[i],
            recurrent[i],
            torch.zeros(4 * size) if bias is None else bias[i].unflatten(0, (2, -1)).sum(0),
            torch.zeros(3, size) if peepholes is None else peepholes[i].unflatten(0, (3, -1)),
            _functions(call, i),
        )
        backwards = i == 1 or call.attribute("direction", "forward") == "reverse"
        states = (nothing if hidden is None else hidden)[i], (nothing if cell is None else cell)[i]
        sequence, last = _walk(gates, x, states, counts, backwards=backwards)
        sequences.append(sequence)
        hiddens.append(last[0])
        cells.append(last[1])
    if batch_first:
        results = torch.stack(sequences, 2).transpose(0, 1), torch.stack(hiddens, 1)
        return *results, torch.stack(cells, 1)
    return torch.stack(sequences, 1), torch.stack(hiddens), torch.stack(cells)


def _functions(call: Call, direction: int) -> tuple[Callable[[Tensor], Tensor], ...]:
    """Of the gates, of what goes into the cell and of what comes out, in one direction."""
    names: Sequence[str] = call.attribute("activations", list(_USUAL) * 2)
    own = names[3 * direction : 3 * direction + 3]
    for name in own:
        if name not in _FUNCTIONS:
            raise UnsupportedOperatorError(
                f"node {call.node.name!r}: LSTM of the domain 'ai.onnx' with the activation {name} "
                f"is not computed; use {', '.join(_FUNCTIONS)}"
            )
    return tuple(_FUNCTIONS[name] for name in own)


@dataclass(frozen=True, slots=True)
class _Gates:
    """One direction of an LSTM; gates lie in the order input, output, forget, cell.

    Attributes:
        call: The node's attributes.
        weights: (4 size, channels).
        recurrent: (4 size, size).
        bias: (4 size,).
        peepholes: What input, output and forget gates see of the cell, (3, size).
        functions: See `_functions`.
    """

    call: Call
    weights: Tensor
    recurrent: Tensor
    bias: Tensor
    peepholes: Tensor
    functions: tuple[Callable[[Tensor], Tensor], ...]

    def step(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """The states after one more element, (batch, size) each."""
        gate, inward, outward = self.functions
        partial = self.call.partial
        sums = (
            kernels.matmul(x, self.weights.T, partial=partial)
            + kernels.matmul(hidden, self.recurrent.T, partial=partial)
            + self.bias
        )
        of_input, of_output, of_forget, candidate = sums.unflatten(-1, (4, -1)).unbind(-2)
        see_input, see_output, see_forget = self.peepholes
        kept = gate(of_forget + see_forget * cell) * cell
        new = kept + gate(of_input + see_input * cell) * inward(candidate)
        new = round_to(new, self.call.dtype)
        shown = gate(of_output + see_output * new) * outward(new)
        return round_to(shown, self.call.dtype), new


def _walk(
    gates: _Gates, x: Tensor, states: tuple[Tensor, Tensor], counts: Tensor, *, backwards: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The hidden state after each element, zero behind a sequence's end, and both at the last.

    Args:
        gates: What to do at each.
        x: (steps, batch, channels).
        states: Hidden and cell, (batch, size) each.
        counts: How many elements each sequence has, (batch,).
        backwards: Begin with the last element of each.
    """
    hidden, cell = states
    rows = [torch.zeros_like(hidden)] * len(x)
    for step in reversed(range(len(x))) if backwards else range(len(x)):
        new_hidden, new_cell = gates.step(x[step], hidden, cell)
        inside = (step < counts)[:, None]
        hidden = torch.where(inside, new_hidden, hidden)
        cell = torch.where(inside, new_cell, cell)
        rows[step] = torch.where(inside, new_hidden, torch.zeros(()))
    return torch.stack(rows), (hidden, cell)
