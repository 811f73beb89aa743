"""The locked file is that of the constraints, and names hashes alone."""

from __future__ import annotations

import re
from typing import Any

import lock
import pytest


def test_the_lock_agrees_with_the_constraints() -> None:
    expected = lock.pinned(lock.CONSTRAINTS.read_text())
    lines = [line for line in lock.LOCK.read_text().splitlines() if not line.startswith("#")]
    found = dict(line.split(" ", 1)[0].split("==") for line in lines)
    assert len(found) == len(lines) > 100
    assert found == expected


def test_the_lock_names_hashes_and_no_addresses() -> None:
    text = lock.LOCK.read_text()
    assert text.startswith(lock.HEADER)
    for line in text.removeprefix(lock.HEADER).splitlines():
        assert re.fullmatch(r"[a-z0-9-]+==[\w.+]+ --hash=sha256:[0-9a-f]{64}", line), line
    assert "://" not in text
    assert "index" not in text.removeprefix(lock.HEADER)


def item(name: str, version: str, **hashes: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "version": version},
        "download_info": {"url": "https://x/y.whl", "archive_info": {"hashes": hashes}},
    }


def test_a_report_becomes_lines() -> None:
    report = {"install": [item("B_b.c", "2", sha256="f" * 64), item("a", "1.0", sha256="0" * 64)]}
    assert lock.lines_of(report) == [
        f"a==1.0 --hash=sha256:{'0' * 64}",
        f"b-b-c==2 --hash=sha256:{'f' * 64}",
    ]
    with pytest.raises(KeyError):
        lock.lines_of({"install": [item("a", "1", md5="0")]})


def test_constraints_are_read() -> None:
    assert lock.pinned("# x\nA_b==1.0  # why\n\nc==2+cpu\n") == {"a-b": "1.0", "c": "2+cpu"}
