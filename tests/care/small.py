"""A network of two blocks, of both kinds: for what is the same for each of many tensors."""

from __future__ import annotations

import json
from typing import Any

STRUCTURE: dict[str, Any] = {
    "depths": (1, 1),
    "feature_dims": (24, 48),
    "mem_dims": (8, 16),
    "ratios": ((2, 2), (2, 3)),
    "head_dims": (None, 16),
}
"""Of a `care_tiny`."""


def as_options() -> list[str]:
    """The same on a command line."""
    said = (f"{name}={json.dumps(value)}" for name, value in STRUCTURE.items())
    return [word for pair in said for word in ("--model-kwargs", pair)]
