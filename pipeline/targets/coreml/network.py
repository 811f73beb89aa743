"""The exported torch program that a Core ML package is converted from.

A package takes 8-bit pixels. Core ML's image inputs know one scale for all channels and a bias for
each, so that they express `pixel / 255 - mean` exactly; the division by the standard deviation goes
into the weights of the first convolution, which is exact too, or becomes a multiplication where the
network does not begin with a plain convolution. The network gives logits and probabilities.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import BuildError, ConfigError, PreprocessError
from pipeline.core.network import Network
from pipeline.core.preprocess import Preprocess
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml.rewrites import rewrite

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


def preprocess_of(network: Network) -> Preprocess:
    """How a network's pixels are normalized, in a form that Core ML's image inputs express.

    Raises:
        ConfigError: The network has neither one nor three channels, or its preprocessing does not
            fit them.
    """
    channels = network.input_shape[0]
    if channels not in (1, 3):
        raise ConfigError(
            f"Core ML's image inputs have 1 or 3 channels, {network.name} takes {channels}: "
            "remove coreml from its targets"
        )
    try:
        preprocess = Preprocess.from_dict(network.preprocess)
    except PreprocessError as error:
        raise ConfigError(f"preprocess of {network.name}: {error}") from error
    if preprocess.depth != channels:
        raise ConfigError(
            f"{network.name} takes {channels} channels, its preprocessing gives "
            f"{preprocess.depth}: set preprocess.channels, mean and std to what the network takes"
        )
    return preprocess


@dataclass(frozen=True)
class Deployed:
    """A network as it is converted.

    Attributes:
        program: Takes `pixel / 255 - mean`, gives logits and probabilities.
        folded: The division by the standard deviation is in a convolution's weights.
    """

    program: ExportedProgram
    folded: bool


def deploy(module: nn.Module, network: Network) -> Deployed:
    """Export a network with its normalization's division and a softmax.

    Args:
        module: Takes preprocessed images, (batch, channels, height, width), gives logits. Stays as
            it is.
        network: Shape and preprocessing.

    Raises:
        BuildError: torch cannot export the network.
        ConfigError: See `preprocess_of`, or the labels do not fit the logits.
    """
    std = preprocess_of(network).std
    divisor = None if set(std) == {1.0} else std
    module = copy.deepcopy(module).eval().requires_grad_(False)
    program = _export(module, network, None)
    _check_logits(program, network)
    if divisor is None:
        return Deployed(program, True)
    if _fold(program, divisor):
        return Deployed(program, True)
    return Deployed(_export(module, network, divisor), False)


def _export(
    module: nn.Module, network: Network, divisor: tuple[float, ...] | None
) -> ExportedProgram:
    import torch

    from care.traceable import FOR_ALL_TARGETS, Replaced

    class Classifier(torch.nn.Module):
        """Logits and probabilities of images that were not divided by `divisor` yet."""

        factor: torch.Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.network = module
            factor = None if divisor is None else 1 / torch.tensor(divisor, dtype=torch.float64)
            self.register_buffer(
                "factor", None if factor is None else factor.float()[:, None, None]
            )

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.network(image if self.factor is None else image * self.factor)
            return logits, logits.softmax(-1)

    example = torch.zeros(1, *network.input_shape)
    try:
        with Replaced(FOR_ALL_TARGETS):
            program: ExportedProgram = torch.export.export(
                Classifier().eval(), (example,)
            ).run_decompositions({})
    # torch.export raises whatever the traced code or its compiler does.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise BuildError(f"torch.export cannot export {network.name}: {reason}") from error
    return rewrite(program)


def _check_logits(program: ExportedProgram, network: Network) -> None:
    (results,) = next(node for node in program.graph.nodes if node.op == "output").args
    shape = tuple(results[0].meta["val"].shape)
    if shape != (1, len(network.labels)):
        raise ConfigError(
            f"{network.name} has {len(network.labels)} labels, the network gives logits of shape "
            f"{shape}: give one label a class"
        )


def _fold(program: ExportedProgram, std: tuple[float, ...]) -> bool:
    """Divide the weights of the first convolution by `std`; False if there is no plain one."""
    import torch

    signature = program.graph_signature
    (image,) = (n for n in program.graph.nodes if n.name in signature.user_inputs)
    users = list(image.users)
    if len(users) != 1 or users[0].target != torch.ops.aten.conv2d.default:
        return False
    convolution: Any = users[0]
    weight = convolution.args[1]
    groups = convolution.args[6] if len(convolution.args) > 6 else 1
    name = signature.inputs_to_parameters.get(weight.name)
    if name is None or len(weight.users) != 1 or groups != 1:
        return False
    old = program.state_dict[name]
    divided = old.double() / torch.tensor(std, dtype=torch.float64).reshape(1, -1, 1, 1)
    program.state_dict[name] = torch.nn.Parameter(divided.to(old.dtype), requires_grad=False)
    return True


def results_of(program: ExportedProgram) -> dict[str, str]:
    """The values of what `deploy` exported, by the names that they have in a package.

    Args:
        program: Of `Deployed`.
    """
    logits, probabilities = next(n for n in program.graph.nodes if n.op == "output").args[0]
    return {saved.LOGITS: logits.name, saved.PROBABILITIES: probabilities.name}


def owners_of(program: ExportedProgram) -> dict[str, str]:
    """Modules of the values of what `deploy` exported, also under their names in a package.

    Args:
        program: Of `Deployed`.
    """
    from pipeline.emulate.mil.record import module_owners

    owners = module_owners(program)
    renamed = results_of(program).items()
    return owners | {name: owners[value] for name, value in renamed if value in owners}
