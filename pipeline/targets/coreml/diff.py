"""Where a package departs from PyTorch: errors layer by layer, by the modules' names.

    errors = diff(artifact, module, pictures)
    first = jump(errors)            # see pipeline.emulate.layers

Values of the exported torch program and tensors of the saved package have the same names, up to
what converters append, so that both can be traced and compared one by one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.core.errors import ArtifactError
from pipeline.core.network import Images, Network
from pipeline.core.preprocess import Pictures
from pipeline.emulate.layers import LayerError
from pipeline.steps.artifact import Artifact
from pipeline.targets.coreml.network import deploy, preprocess_of, results_of

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


def diff(
    artifact: Artifact,
    module: nn.Module,
    pictures: Pictures,
    *,
    precision: Literal["float32", "half"] = "half",
) -> list[LayerError]:
    """Compare a built package with the module that it was made from, tensor by tensor.

    Args:
        artifact: What `CoreMLTarget` built.
        module: The fused float32 module.
        pictures: A few images: all tensors of all of them are in memory at once.
        precision: Round as the package's types say, or not at all.

    Returns:
        In the order of the program: every tensor that has a counterpart.

    Raises:
        ArtifactError: The package was not made from this module.
    """
    from pipeline.targets.coreml.package import MODEL

    network = artifact.network()
    return diff_package(artifact.folder / MODEL, network, module, pictures, precision)


def diff_package(
    package: Path,
    network: Network,
    module: nn.Module,
    pictures: Pictures,
    precision: Literal["float32", "half"] = "half",
) -> list[LayerError]:
    """Like `diff`, for a package's folder."""
    from pipeline.emulate.mil.executor import MilExecutor
    from pipeline.emulate.mil.record import module_owners, torch_name

    preprocess = preprocess_of(network)
    program = deploy(module, network).program
    owners = module_owners(program)
    # The exported program divides by the standard deviation itself, see `deploy`.
    undivided = replace(preprocess, std=(1.0,) * preprocess.depth)
    wanted = _values(program, undivided.normalize(pictures.pixels))
    renamed = results_of(program)
    executor = MilExecutor(package, precision=precision)
    made_by = {name: op for op in executor.program.operations for name, _ in op.outputs}
    errors, seen = [], set()
    for tensor, found in executor.trace(pictures.pixels).items():
        name = renamed.get(tensor, torch_name(tensor))
        expected = wanted.get(name)
        # The first of several tensors of a value is the value; what follows are casts of it.
        if expected is None or name in seen or expected.shape != found.shape:
            continue
        seen.add(name)
        operation = made_by[tensor]
        errors.append(
            LayerError(
                owners.get(name, "").removeprefix("network").removeprefix("."),
                tensor,
                operation.type,
                operation.line,
                *_error(found, expected),
            )
        )
    if not errors:
        raise ArtifactError(f"{package} has no tensor of {network.name}: it is of another network")
    return errors


def _error(found: Any, expected: Any) -> tuple[float, float]:
    difference = found.astype(np.float64) - expected
    if not np.isfinite(difference).all():
        return float("nan"), float("nan")
    norm = max(float(np.linalg.norm(expected)), float(np.finfo(np.float32).tiny))
    return float(np.linalg.norm(difference)) / norm, float(np.abs(difference).max())


def _values(program: ExportedProgram, images: Images) -> dict[str, Any]:
    """Every floating-point value of an exported program, (batch, …), by name."""
    import torch
    from torch.export.graph_signature import InputKind

    values: dict[str, list[Any]] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n.op == "call_function" and isinstance(result, torch.Tensor):
                values.setdefault(n.name, []).append(result.numpy())
            return result

    def argument(spec: Any, image: torch.Tensor) -> Any:
        if spec.kind is InputKind.USER_INPUT:
            return image
        stored = program.state_dict if spec.target in program.state_dict else program.constants
        return stored[spec.target]

    with torch.inference_mode():
        # The program was exported for a single image.
        for image in torch.from_numpy(np.ascontiguousarray(images)).split(1):
            arguments = [argument(spec, image) for spec in program.graph_signature.input_specs]
            Recorder(program.graph_module).run(*arguments)
    return {name: np.concatenate(parts) for name, parts in values.items() if parts[0].ndim}
