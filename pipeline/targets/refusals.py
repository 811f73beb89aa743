"""Whether a runtime refuses two graphs for the same reason."""

from __future__ import annotations

import re

_OF_THIS_PART = (
    (r"\{[^}]*\}|'[^']*'|\"[^\"]*\"", "…"),
    (r"\S*/\S*", "…"),
    (r"\d+", "#"),
)
"""What changes in a message from part to part: names of nodes, paths, numbers."""


def signature(message: str) -> str:
    """What of a builder's message tells one failure from another."""
    for pattern, text in _OF_THIS_PART:
        message = re.sub(pattern, text, message)
    return message
