"""The Dockerfile copies what is there, and all that the package is built from."""

from __future__ import annotations

import re
from pathlib import Path

from tests.test_wheel import BUILT_FROM, PACKAGES

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "Dockerfile").read_text().splitlines()
COPIED = {name for line in LINES if line.startswith("COPY ") for name in line.split()[1:-1]}


def test_all_that_is_copied_is_there() -> None:
    assert len(COPIED) >= 8
    assert [name for name in sorted(COPIED) if not (ROOT / name).exists()] == []


def test_all_that_the_package_is_built_from_is_copied() -> None:
    assert {*PACKAGES, *BUILT_FROM} <= COPIED


def test_nothing_that_is_copied_is_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines  # what is not copied is not sent either
    assert {line[1:] for line in lines if line.startswith("!")} == COPIED


def test_the_base_is_the_users_choice_and_nobody_is_root() -> None:
    text = "\n".join(LINES)
    assert re.search(r"^ARG BASE=\S+\nFROM \$\{BASE\}$", text, re.MULTILINE)
    assert text.index("USER care") < text.index("ENTRYPOINT")
    # Long-lived layers take versions that were tested together.
    assert "--constraint constraints.txt" in text


def test_the_license_of_the_data_is_copied_with_it() -> None:
    named = re.search(r"license_files = (.*)", (ROOT / "setup.cfg").read_text())
    assert named is not None
    for name in named[1].split(", "):
        assert (ROOT / name).exists()
        assert name.partition("/")[0] in COPIED
