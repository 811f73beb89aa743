"""Conversion of an exported network to a Core ML package."""

from __future__ import annotations

import json
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import BuildError
from pipeline.targets.base import Network
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml import siblings
from pipeline.targets.coreml.network import Deployed, Normalization

DEPLOYMENT_TARGETS = ("iOS16", "iOS17", "iOS18")
"""Oldest system on which a package runs; the macOS versions of the same year are 13, 14 and 15."""

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
        deployment_target: One of `DEPLOYMENT_TARGETS`.
        float32: Operations that compute in float32 while the rest is in float16, by their type in
            the MIL operation set; None for float32 throughout.

    Returns:
        A coremltools model, not loaded.

    Raises:
        BuildError: coremltools cannot convert the network.
    """
    import coremltools as ct
    import numpy as np

    mean = [-value for value in Normalization.of(network).mean]
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
    try:
        return ct.convert(
            deployed.program,
            convert_to="mlprogram",
            inputs=[image],
            outputs=outputs,
            minimum_deployment_target=getattr(ct.target, deployment_target),
            compute_precision=_precision(float32),
            pass_pipeline=siblings.pipeline(),
            skip_model_load=True,
        )
    # The converter raises whatever its passes do: ValueError, RuntimeError, NotImplementedError, …
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise BuildError(f"coremltools cannot convert {network.name}: {reason}") from error


def _precision(float32: Collection[str] | None) -> Any:
    import coremltools as ct

    if float32 is None:
        return ct.precision.FLOAT32
    if not float32:
        return ct.precision.FLOAT16
    kept = frozenset(float32)
    return ct.transform.FP16ComputePrecision(op_selector=lambda op: op.op_type not in kept)


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
