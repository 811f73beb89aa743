"""Conversion of an exported network to a Core ML package."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.core.errors import BuildError, ConfigError
from pipeline.core.garbage import only_new
from pipeline.core.network import Network
from pipeline.core.words import nearest
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml import refusals, siblings
from pipeline.targets.coreml.network import Deployed, owners_of, preprocess_of

COMPUTE_UNITS = {
    "all": "ALL",
    "cpu_only": "CPU_ONLY",
    "cpu_and_gpu": "CPU_AND_GPU",
    "cpu_and_neural_engine": "CPU_AND_NE",
}
"""Our names of compute units, and coremltools'."""


def convert(
    deployed: Deployed,
    network: Network,
    deployment_target: str,
    float32: Collection[str] | None,
) -> Any:
    """Convert an exported network to the core of a package (see `package`).

    Args:
        deployed: What `network.deploy` made.
        network: Shape and preprocessing.
        deployment_target: One of `options.DEPLOYMENT_TARGETS`.
        float32: Operations that compute in float32 while the rest is in float16, see `Selector`;
            None for float32 throughout.

    Returns:
        A coremltools model, not loaded.

    Raises:
        BuildError: coremltools cannot convert the network.
        ConfigError: An entry of `float32` names nothing.
    """
    import coremltools as ct
    import numpy as np

    from pipeline.emulate.mil.record import module_owners

    mean = [-value for value in preprocess_of(network).mean]
    gray = network.input_shape[0] == 1
    image = ct.ImageType(
        name=saved.IMAGE,
        shape=(1, *network.input_shape),
        scale=1 / 255,
        bias=mean[0] if gray else mean,
        color_layout=ct.colorlayout.GRAYSCALE if gray else ct.colorlayout.RGB,
    )
    outputs = [
        ct.TensorType(name=name, dtype=np.float32) for name in (saved.LOGITS, saved.PROBABILITIES)
    ]
    selector = Selector(deployed, float32 or ())
    refusals.check(deployed.program, network.name)
    try:
        with only_new(), seldom_checked():
            model = ct.convert(
                deployed.program,
                convert_to="mlprogram",
                inputs=[image],
                outputs=outputs,
                minimum_deployment_target=getattr(ct.target, deployment_target),
                compute_precision=_precision(float32, selector),
                pass_pipeline=siblings.pipeline(),
                skip_model_load=True,
            )
    # The converter raises whatever its passes do: ValueError, RuntimeError, NotImplementedError, …
    except Exception as error:
        reason = refusals.own_fault(error, deployed.program) or refusals.explain(
            str(error), module_owners(deployed.program)
        )
        raise BuildError(f"coremltools cannot convert {network.name}: {reason}") from error
    selector.check()
    return model


@contextlib.contextmanager
def seldom_checked() -> Iterator[None]:
    """Let coremltools check a program where dead code went and when it is written, no oftener.

    It checks all operations after each of its 112 passes, a third of the time of a conversion. The
    check that stays is the thorough one, and 16 times in a conversion: a pass that breaks a program
    is refused all the same, only further on.
    """
    from coremltools.converters.mil.mil import Program

    whole = Program.validate

    def thorough(program: Any, check_essential_scope: bool | None = False) -> None:
        if check_essential_scope:
            whole(program, check_essential_scope=True)

    Program.validate = thorough
    try:
        yield
    finally:
        Program.validate = whole


def _precision(float32: Collection[str] | None, selector: Selector) -> Any:
    import coremltools as ct

    if float32 is None:
        return ct.precision.FLOAT32
    if not float32:
        return ct.precision.FLOAT16
    return ct.transform.FP16ComputePrecision(op_selector=lambda op: not selector(op))


class Selector:
    """Chooses operations: by their type, or by the module that they compute.

    Args:
        deployed: What is converted.
        entries: Types of the MIL operation set, such as "softmax", and modules of the network, such
            as "stages.2.blocks.5.token_mixer"; with `*`, patterns of modules.
    """

    def __init__(self, deployed: Deployed, entries: Collection[str]) -> None:
        self._entries = frozenset(entries)
        self._owners = {
            value: module.removeprefix("network").removeprefix(".")
            for value, module in owners_of(deployed.program).items()
        }
        self._used: set[str] = set()

    def __call__(self, operation: Any) -> bool:
        """Whether an operation of a program in conversion is chosen."""
        module = self._module(operation)
        found = {
            entry
            for entry in self._entries
            if entry == operation.op_type or (module and fnmatchcase(module, entry))
        }
        self._used |= found
        return bool(found)

    def _module(self, operation: Any) -> str:
        """The module of an operation or, where the converter made it up, of its input.

        As `MilExecutor.ranges` has it: who raises what that names, raises it.
        """
        from pipeline.emulate.mil.record import torch_name

        while (name := torch_name(operation.outputs[0].name)) not in self._owners:
            operation = next(_computed(operation), None)
            if operation is None:
                return ""
        return self._owners[name]

    def check(self) -> None:
        """Refuse entries that chose nothing, after the conversion.

        Types of operations that there are may be missing from a network: the usual ones are named
        for all networks.

        Raises:
            ConfigError: An entry is no type of operation and no module of the network.
        """
        from pipeline.emulate.mil.operators.table import OPERATORS

        modules = sorted({module for module in self._owners.values() if module})
        for entry in sorted(self._entries - self._used - OPERATORS.keys()):
            hint = nearest(entry, [*OPERATORS, *modules])
            raise ConfigError(
                f"coreml: float32_operations names {entry}, which is no MIL operation and no "
                f"module of the network that computes something{hint}"
            )


def _computed(operation: Any) -> Iterator[Any]:
    """The operations that make what an operation of a program in conversion reads."""
    for given in operation.inputs.values():
        for value in given if isinstance(given, list | tuple) else [given]:
            if value.op is not None and value.op.op_type != "const":
                yield value.op


def finish(model: Any, network: Network, package: Path, precision: str) -> None:
    """Save a core package as a classifier with everything it should say of itself.

    Args:
        model: A coremltools model with the core's outputs.
        network: Labels, preprocessing and description.
        package: Where it shall lie.
        precision: Name of the precision.
    """
    saved.save(model, package)

    def dress(specification: Any) -> None:
        saved.as_classifier(specification, network.labels)
        about = network.description
        fields = {
            key: about[key]
            for key in ("author", "license", "version", "short_description")
            if key in about
        }
        fields.setdefault("short_description", f"{network.name}, {precision}: image classifier")
        user = {key: value for key, value in about.items() if key not in fields}
        user |= {
            "name": network.name,
            "precision": precision,
            "preprocessing": json.dumps(dict(network.preprocess), sort_keys=True),
            "labels": json.dumps(list(network.labels), ensure_ascii=False),
            "com.github.apple.coremltools.source": f"torch=={metadata.version('torch')}",
        }
        saved.describe(specification, fields, user)
        specification.description.input[
            0
        ].shortDescription = (
            "Resized and cropped as the entry 'preprocessing' says; normalization is inside."
        )

    saved.edit(package, dress)
