from __future__ import annotations

import io

import pytest
from rich.progress import TextColumn
from rich.table import Table

from pipeline.core.screen import Screen, styled

ODD = "conv[red]1[/] [/x] :smile: \x1b[2J\x07\udcff"
SHOWN = r"conv[red]1[/] [/x] :smile: \x1b[2J\x07\udcff"


def printed(*parts: object, terminal: bool = False) -> str:
    buffer = io.StringIO()
    Screen(file=buffer, width=200, force_terminal=terminal, color_system=None).print(*parts)
    return buffer.getvalue()


def test_text_is_only_text_wherever_it_stands() -> None:
    table = Table(ODD, title=ODD, caption=ODD)
    table.add_row(ODD)
    text = printed(ODD, table)
    assert text.count(SHOWN) == 5
    assert all(line.isprintable() for line in text.splitlines())


def test_a_style_is_no_text() -> None:
    assert printed(styled(ODD, "red")) == f"{SHOWN}\n"
    buffer = io.StringIO()
    Screen(file=buffer, force_terminal=True, color_system="standard").print(styled("x", "red"))
    assert buffer.getvalue() == "\x1b[31mx\x1b[0m\n"


def test_of_rich_itself_this_is_not_so() -> None:
    """Why `Screen` is used everywhere: `test_architecture` holds that."""
    from rich.console import Console
    from rich.errors import MarkupError

    with pytest.raises(MarkupError):
        Console(file=io.StringIO()).print(ODD)
    assert TextColumn("").markup
