"""Tables in documents, between markers."""

from __future__ import annotations

from pathlib import Path

from documents import fill

BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def test_a_part_is_replaced_between_its_markers(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    fill(document, "table", r"new \1")
    assert document.read_text() == f"before\n{BEGIN}\nnew \\1\n{END}\nafter\n"


def test_without_markers_the_part_goes_to_the_end(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    fill(document, "table", "first")
    assert document.read_text() == f"{BEGIN}\nfirst\n{END}\n"
    document.write_text("no markers\n")
    fill(document, "table", "new")
    assert document.read_text() == f"no markers\n\n{BEGIN}\nnew\n{END}\n"
