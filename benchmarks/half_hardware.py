"""Does the emulation of half precision bracket a real GPU? Needs torch, torchvision and timm alone.

    python benchmarks/half_hardware.py [--networks care_s0 …] [--images 64]
    python benchmarks/half_hardware.py --emulate 8

On a CUDA GPU the published and the inference form of each network run in float16 over images of
seeded noise, with sums of products in reduced precision allowed and not. Their error is that of the
logits to the same form in float32 (TF32 off), relative, by Euclidean norm. Beside it stand the two
figures of the strict executor for the inference form, with sums in float32 and in half precision:
`--emulate` computes them anywhere, over the first images of the same noise, with all packages of
this project, and keeps them in `half_hardware.json` beside this file. Weights come from a formula,
in the spread that trained networks have. It takes less than five minutes on a GPU. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn

NETWORKS = ("care_s0", "care_s1", "care_s2", "mlla_t")
SHAPE = (3, 224, 224)
BATCH = 16
NO_GPU = "not measured: no GPU"
EMULATED = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Row:
    """One form of one network on the GPU.

    Attributes:
        network: Its name in timm.
        form: "published" or "inference".
        allowed: Error with sums of products in reduced precision allowed; NaN if not finite.
        not_allowed: Error without.
        first: Both errors over those images alone that were emulated.
    """

    network: str
    form: str
    allowed: float
    not_allowed: float
    first: tuple[float, float] | None


def noise(count: int) -> np.ndarray:
    """Images, (count, *SHAPE); a smaller count gives the first ones of a larger."""
    rng = np.random.default_rng(7)
    images = [rng.standard_normal(SHAPE, np.float32) for _ in range(count)]
    return np.stack(images)


def forms(name: str) -> Iterator[tuple[str, nn.Module]]:
    """Both forms of a network, in float32."""
    from networks import fused, published_form

    model = published_form(name, "formula")
    yield "published", model
    yield "inference", fused(model)


def error(logits: np.ndarray, expected: np.ndarray) -> float:
    """Relative distance of logits; NaN where they are not finite."""
    if not np.isfinite(logits).all():
        return math.nan
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))


@contextmanager
def reduced(allowed: bool) -> Iterator[None]:
    """Whether products of float16 matrices may be summed in reduced precision."""
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = allowed
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before


def run(module: nn.Module, images: np.ndarray, device: str, dtype: torch.dtype) -> np.ndarray:
    """Logits of all images in a type, computed on a device."""
    import torch

    module = copy.deepcopy(module).to(device, dtype).eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            part = torch.from_numpy(images[start : start + BATCH]).to(device, dtype)
            parts.append(module(part).float().cpu().numpy())
    return np.concatenate(parts)


def measure(
    name: str, form: str, module: nn.Module, images: np.ndarray, device: str, emulated: int
) -> Row:
    """Errors of one form in float16.

    Args:
        name: The network.
        form: Of which form.
        module: That form in float32.
        images: (images, *SHAPE).
        device: Where to compute.
        emulated: Of how many of the images there are figures of the executor.
    """
    import torch

    expected = run(module, images, device, torch.float32)
    found = []
    for allowed in (True, False):
        with reduced(allowed):
            found.append(run(module, images, device, torch.float16))
    wide, narrow = (error(logits, expected) for logits in reversed(found))
    if not emulated:
        return Row(name, form, narrow, wide, None)
    first = [error(logits[:emulated], expected[:emulated]) for logits in found]
    return Row(name, form, narrow, wide, (first[0], first[1]))


def emulate(names: Sequence[str], count: int) -> dict[str, Any]:
    """Errors of the strict executor in float16, by network: sums in float32 and half precision."""
    import torch
    from networks import write_graph

    from pipeline.emulate.onnx.executor import OnnxExecutor
    from pipeline.graphs import float16

    images, found = noise(count), {}
    for name in names:
        module = dict(forms(name))["inference"]
        expected = run(module, images, "cpu", torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write_graph(module, path)
            model, _ = float16.to_half(float16.read_graph(path), float16.FLOAT16)
        wide = error(OnnxExecutor(model).run_all(images), expected)
        narrow = error(OnnxExecutor(model, accumulate="output").run_all(images), expected)
        print(f"{name}: {_shown(wide)} with sums in float32, {_shown(narrow)} in half precision")
        found[name] = {"float32": _plain(wide), "half": _plain(narrow)}
    return {"images": count, "errors": found}


def verdict(row: Row, errors: Mapping[str, float | None] | None) -> str:
    """Where the GPU lies beside the executor's two figures."""
    if errors is None or row.first is None:
        return "not emulated"
    known = [value for value in errors.values() if value is not None]
    if len(known) < 2 or any(math.isnan(value) for value in row.first):
        return "no finite logits" if not known else "not comparable"
    low, high = min(known), max(known)
    if all(low <= value <= high for value in row.first):
        return "within"
    return "below" if max(row.first) <= high else "above"


def show(rows: Sequence[Row], emulated: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Print the table, and give it as plain values."""
    print("| network | form | reduced sums allowed | not allowed | executor: float32, half | GPU |")
    print("|---|---|---|---|---|---|")
    plain = []
    for row in rows:
        known = emulated["errors"].get(row.network) if row.form == "inference" else None
        both = ", ".join(_shown(value) for value in known.values()) if known else ""
        where = verdict(row, known)
        print(
            f"| {row.network} | {row.form} | {_shown(row.allowed)} | {_shown(row.not_allowed)} | "
            f"{both} | {where} |"
        )
        plain.append({**_row(row), "executor": known, "where": where})
    return plain


def _row(row: Row) -> dict[str, Any]:
    first = None if row.first is None else [_plain(value) for value in row.first]
    finite = {"allowed": _plain(row.allowed), "not_allowed": _plain(row.not_allowed)}
    return {"network": row.network, "form": row.form, **finite, "first": first}


def _shown(value: float | None) -> str:
    return "not finite" if value is None or math.isnan(value) else f"{value:.2e}"


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _stored() -> dict[str, Any]:
    """The executor's figures, none where there is no file."""
    if not EMULATED.is_file():
        return {"images": 0, "errors": {}}
    stored: dict[str, Any] = json.loads(EMULATED.read_text(encoding="utf-8"))
    return stored


def main() -> int:
    """Measure, or emulate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--emulate", type=int, metavar="IMAGES")
    arguments = parser.parse_args()
    if arguments.emulate:
        figures = emulate(arguments.networks, arguments.emulate)
        EMULATED.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        return 0
    import torch

    if not torch.cuda.is_available():
        print(NO_GPU)
        return 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    emulated, images = _stored(), noise(arguments.images)
    seen = min(int(emulated["images"]), len(images))
    rows = [
        measure(name, form, module, images, "cuda", seen)
        for name in arguments.networks
        for form, module in forms(name)
    ]
    card = torch.cuda.get_device_name()
    print(f"\n{card}, torch {torch.__version__}, {len(images)} images, executor: {seen} images\n")
    plain = show(rows, emulated)
    print(json.dumps({"card": card, "images": len(images), "rows": plain}, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
