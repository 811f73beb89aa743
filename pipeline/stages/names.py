"""Names of the files that one stage writes and others read.

They lie apart so that reading a file does not make a step depend on the code that wrote it.
"""

from __future__ import annotations

OWN_GRAPH = "graph.onnx"
"""Graph of an artifact that was not built from the one of its precision."""

GRAPH = "model.onnx"

PHOTO = "photo.onnx"
"""The same with preprocessing inside: from a decoded photograph to logits."""

PIXELS = "pixels.npy"
LABELS = "labels.npy"
SOURCES = "sources.json"

LOGITS = "logits.npy"

GOLDEN_PIXELS = "pixels.u8"
GOLDEN_INPUT = "inputs.f32"
PYTORCH = "pytorch.f32"
CARD = "card.png"
CARD_PIXELS = "card.u8"
"""Of the golden kit: raw, little-endian, images along the first axis."""
