"""Batch norms folded into the convolutions before them while weights are still in float32.

The converter folds them too, but in the type that weights are stored in: of float16 norms and
float16 weights it makes weights that were rounded twice, with about twice the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_BATCH_NORM = "aten.batch_norm.default"
_CONVOLUTIONS = ("aten.conv2d.default", "aten.conv2d.padding")


def fold(module: nn.Module, example: Any) -> int:
    """Fold what can be folded, in place; the module computes the same.

    A folded norm stays where it is and adds its bias, no more: so nothing has to be known of the
    class that it is of.

    Args:
        module: In evaluation mode.
        example: What it takes.

    Returns:
        How many norms were folded.
    """
    import torch

    if not any(name.endswith("running_var") for name, _ in module.named_buffers()):
        return 0
    program = torch.export.export(module, (example,))
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = [_pair(node, names) for node in program.graph.nodes if str(node.target) == _BATCH_NORM]
    with torch.no_grad():
        return sum(_fold(module, pair) for pair in found if pair is not None)


@dataclass(frozen=True)
class _Pair:
    """Names of the tensors of a convolution and of the norm after it."""

    weight: str
    bias: str | None
    factor: str
    shift: str
    mean: str
    variance: str
    eps: float


def _pair(norm: Any, names: dict[str, str]) -> _Pair | None:
    """A norm and its convolution; None where what they share serves something else as well.

    Args:
        norm: A node of an exported graph.
        names: Of parameters and buffers, by their nodes' names.
    """
    convolution, *statistics, training, _, eps, _ = norm.args
    if training or str(getattr(convolution, "target", "")) not in _CONVOLUTIONS:
        return None
    weight, bias = (*convolution.args[1:3], None)[:2]
    tensors = [weight, *statistics] if bias is None else [weight, bias, *statistics]
    if any(len(getattr(node, "users", ())) != 1 for node in (convolution, *tensors)):
        return None
    if any(node.name not in names for node in tensors):
        return None
    factor, shift, mean, variance = (names[node.name] for node in statistics)
    own_bias = None if bias is None else names[bias.name]
    return _Pair(names[weight.name], own_bias, factor, shift, mean, variance, eps)


def _fold(module: nn.Module, pair: _Pair) -> bool:
    owner: Any = module.get_submodule(pair.variance.rpartition(".")[0])
    # What the norm does with another epsilon is not known.
    if getattr(owner, "eps", None) != pair.eps:
        return False
    known: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weight, factor, shift = known[pair.weight], known[pair.factor], known[pair.shift]
    mean, variance = known[pair.mean], known[pair.variance]
    scale = factor.double() / (variance.double() + pair.eps).sqrt()
    offset = -mean.double()
    if pair.bias is not None:
        offset = offset + known[pair.bias].double()
        known[pair.bias].zero_()
    weight.copy_(weight.double() * scale.reshape(-1, 1, 1, 1))
    shift.copy_(shift.double() + offset * scale)
    factor.fill_(1)
    mean.zero_()
    variance.fill_(1)
    owner.eps = 0.0
    return True
