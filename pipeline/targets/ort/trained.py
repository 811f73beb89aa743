"""int8 as a network was fine-tuned in it: what training and the build share.

    insert_trained(prepared, quantized)     # care.train --quantize ort/int7
    stated_precision(source)                # what the exported graph says

All that has an 8-bit kernel is quantized: GELUs stay exact, channels as they are, and weights are
such that every CPU adds up their products exactly, see `calibration.pairs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.described import QUANTIZED, Quantized, quantized_of
from pipeline.core.errors import ArtifactError, BuildError, ConfigError
from pipeline.core.plain import parse_json

if TYPE_CHECKING:
    import onnx

    from calibration.ranges import Range, Scheme
    from pipeline.graphs.qdq_ort import Inserted

PREFIX = "ort/"
"""Of the precisions of this target; a graph of another's is quantized as any."""


def weights_scheme(precision: str) -> Scheme:
    """How the weights of a precision are stored.

    Raises:
        ConfigError: It is none of this target.
    """
    from calibration.ranges import WEIGHTS_INT7, WEIGHTS_INT8

    schemes = {"ort/int8": WEIGHTS_INT8, "ort/int7": WEIGHTS_INT7}
    if precision not in schemes:
        raise ConfigError(f"no network is fine-tuned in {precision!r}: take {', '.join(schemes)}")
    return schemes[precision]


def insert_trained(prepared: onnx.ModelProto, quantized: Quantized) -> Inserted:
    """The graph with pairs that a network is fine-tuned in.

    Args:
        prepared: What `quantize.prepare_graph` gave.
        quantized: The precision, and its ranges.

    Raises:
        BuildError: The ranges are of another graph.
    """
    from pipeline.graphs.qdq_ort import StoredWeights, candidates_of, insert

    ranges = ranges_of(quantized, prepared)
    outputs = frozenset(name for node in prepared.graph.node for name in node.output)
    weights = StoredWeights(weights_scheme(quantized.precision))
    return insert(prepared, ranges, candidates_of(prepared), outputs, weights)


def ranges_of(quantized: Quantized, prepared: onnx.ModelProto) -> Mapping[str, Range]:
    """The ranges, all those that the graph needs.

    Raises:
        BuildError: They are of another graph.
    """
    from calibration.ranges import Range
    from pipeline.graphs.qdq_ort import activations

    ranges = {name: Range(low, high) for name, (low, high) in quantized.ranges.items()}
    missing = [name for name in activations(prepared) if name not in ranges]
    if missing:
        raise BuildError(
            f"the network was fine-tuned in {quantized.precision} in another graph: its checkpoint "
            f"has no range of {missing[0]} ({len(missing)} such tensors): fine-tune it with this "
            "version of the exporter"
        )
    return ranges


def stated_precision(source: Path) -> Quantized | None:
    """In which precision the network of an exported graph was fine-tuned; None if in none of ours.

    Raises:
        BuildError: What the graph says of that makes no sense.
    """
    import onnx

    model = onnx.load(source, load_external_data=False)
    text = next((p.value for p in model.metadata_props if p.key == QUANTIZED), None)
    if text is None:
        return None
    try:
        found = quantized_of(parse_json(text, QUANTIZED), QUANTIZED)
    except ArtifactError as error:
        raise BuildError(
            f"{source}: in its metadata, {error}: take a checkpoint that you trust"
        ) from error
    return found if found.precision.startswith(PREFIX) else None
