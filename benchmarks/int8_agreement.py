"""How often the int8 graph for ONNX Runtime answers as float32, on images that it has not seen.

    python benchmarks/int8_agreement.py
    python benchmarks/int8_agreement.py --kind pictures --model care_s2 --images 512

Weights come from a formula: no training has spread the logits, so that the best classes lie close
together and a small error changes the answer. Images are white noise, or "pictures": noise of
several sizes, each with a color and contrast of its own, which spread the answers over more
classes. The number of these classes is printed, for with one class agreement means nothing, and so
is the size of the error beside the distance of the two best classes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from networks import NETWORKS, SHAPE, fused, published_form, write_graph

from calibration.sample import CalibrationSet
from pipeline.core.figures import compare, wilson
from pipeline.core.network import Network
from pipeline.targets.forms import FormJob
from pipeline.targets.ort.quantize import Int8Ort

KINDS = ("noise", "pictures")
Images = npt.NDArray[np.float32]


def make_images(kind: str, count: int, seed: int) -> Images:
    """Images of one of the `KINDS`, (count, 3, 224, 224)."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.standard_normal((count, *SHAPE)).astype(np.float32)
    channels, side, _ = SHAPE
    made = np.zeros((count, *SHAPE), np.float32)
    for cells in (7, 28, 112):
        coarse = rng.standard_normal((count, channels, cells, cells))
        made += np.kron(coarse, np.ones((1, 1, side // cells, side // cells))).astype(np.float32)
    made *= rng.uniform(0.2, 1.2, (count, 1, 1, 1)).astype(np.float32)
    return made + rng.standard_normal((count, channels, 1, 1)).astype(np.float32)


def run(path: Path, images: Images) -> Images:
    """Logits by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate(
        [session.run(None, {name: images[i : i + 16]})[0] for i in range(0, len(images), 16)]
    )


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--model", default="care_s0", show_default=True, type=click.Choice(NETWORKS))
@click.option("--kind", default="noise", show_default=True, type=click.Choice(KINDS))
@click.option("--calibration", default=64, show_default=True, type=click.IntRange(8))
@click.option("--images", "count", default=256, show_default=True, type=click.IntRange(16))
def main(model: str, kind: str, calibration: int, count: int) -> None:
    with tempfile.TemporaryDirectory(prefix="int8-agreement-") as name:
        source, quantized = Path(name) / "float32.onnx", Path(name) / "int8.onnx"
        write_graph(fused(published_form(model, "formula")), source)
        seen = make_images(kind, calibration, seed=1)
        # The labels are float32's own answers: what may be lost is agreement with it.
        labels = run(source, seen).argmax(1)
        sample = CalibrationSet(seen, labels, ("",) * len(seen))
        network = Network(model, (), SHAPE, {})
        facts = Int8Ort().convert(
            FormJob(source, network, {}, lambda: sample, lambda line: None), quantized
        )
        unseen = make_images(kind, count, seed=2)
        expected = run(source, unseen)
        answers = run(quantized, unseen)
    found = compare(answers, expected)
    second, first = np.sort(expected, axis=1)[:, -2:].T
    error = float(np.sqrt(np.mean((answers - expected) ** 2)))
    margin = float(np.median(first - second))
    low, high = wilson(round(found.agreement * count), count)
    classes = len(np.unique(expected.argmax(1)))
    left = facts["sensitivity"]["excluded"] + facts["left_for_latency"]
    click.echo(
        f"{model}: int8 answers as float32 on {found.agreement:.1%} ({low:.1%} to {high:.1%}) of "
        f"{count} images ({kind}) with {classes} classes; error of a logit {error:.3f}, median "
        f"distance of the two best {margin:.3f}; in float32: {', '.join(left) or 'nothing'}"
    )
    click.echo(
        json.dumps(
            {
                "model": model,
                "kind": kind,
                "agreement": found.agreement,
                "interval": [low, high],
                "images": count,
                "classes": classes,
                "relative_error": found.relative_error,
                "logit_error": error,
                "median_margin": margin,
                "float32_blocks": left,
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
