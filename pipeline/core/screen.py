"""A terminal's screen, on which text is only text.

Names of files, tensors, layers, classes and devices are other people's. rich takes square brackets
in text for styles, and hands control characters on to the terminal. Here neither happens, whoever
prints: brackets are shown, what a terminal would obey is escaped, and a style is had by `styled`.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.core.words import printable


class Screen(Console):
    """A console of rich that shows text as it is.

    Args:
        options: See `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as rich shows it; all text comes by here, also that of tables and titles."""
        return super().render_str(printable(text), **options)


def styled(text: str, style: str) -> Text:
    """Text in a style, such as "red"."""
    return Text(printable(text), style)
