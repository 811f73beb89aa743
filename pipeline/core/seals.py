"""JSON that carries its own seal: whatever byte of it changes later, reading it says so.

The seal is the SHA-256 of the text without it, and stands in the last line:

     "format": 2,
     …
     "seal": "9f86d081…"
    }

It finds damage and edits, not forgery: who writes a new seal as well is found by what other files
state of the old one (see `pipeline.steps.library`), and who rewrites all of them is not found.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import ArtifactError
from pipeline.core.plain import parse_json

SEAL = "seal"
_TAIL = re.compile(rb',\n "seal": "([0-9a-f]{64})"\n}\n\Z')
_END = b"\n}\n"
_LONGEST_TAIL = 100
"""Bytes within which the seal stands at the end of a text."""


def sealed(values: Mapping[str, Any]) -> str:
    """JSON with its seal.

    Args:
        values: Plain values, at least one, none of them called "seal".
    """
    assert values
    assert SEAL not in values
    text = json.dumps(values, indent=1) + "\n"
    return text.removesuffix("\n}\n") + f',\n "{SEAL}": "{_digest(text.encode())}"\n}}\n'


def unsealed(data: bytes, where: str) -> tuple[dict[str, Any], str]:
    """The inverse of `sealed`.

    Args:
        data: What was read.
        where: The file, for messages.

    Returns:
        The values, and their seal; "" if there is none at all.

    Raises:
        ArtifactError: It does not fit its seal, or is no JSON object.
    """
    tail = _TAIL.search(data, max(0, len(data) - _LONGEST_TAIL))
    body = data[: tail.start()] + _END if tail else data
    seal = tail[1].decode() if tail else ""
    if seal and _digest(body) != seal:
        raise ArtifactError(f"{where} has changed since it was written")
    try:
        values = parse_json(body, "it")
    except ArtifactError as error:
        raise ArtifactError(f"{where} is damaged: {error}") from error
    if not isinstance(values, dict) or SEAL in values:
        raise ArtifactError(f"{where} is damaged")
    return values, seal


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
