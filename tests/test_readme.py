"""The README's commands exist, with the options that it gives them."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

LINES = [line.strip() for line in README.splitlines() if line.startswith("    ")]
COMMANDS = [line for line in LINES if "-m pipeline" in line or "-m care." in line]
MAKE = [line.split()[1] for line in LINES if line.startswith("make ")]


def command_of(module: str) -> click.Command:
    name = "pipeline.cli" if module == "pipeline" else module
    found = importlib.import_module(name).main
    assert isinstance(found, click.Command)
    return found


def test_the_readme_begins_with_the_two_commands() -> None:
    assert LINES[0].startswith("make run")
    assert LINES[1].startswith("make test")
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_parse(line: str) -> None:
    words = shlex.split(line)
    rest = words[words.index("-m") + 1 :]
    if rest[0] == "-m" or "torchrun" in words:
        rest = words[len(words) - words[::-1].index("-m") :]
    command, arguments = command_of(rest[0]), rest[1:]
    while isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    # Parses options and their values without running anything.
    command.make_context("x", arguments, resilient_parsing=False)


@pytest.mark.parametrize("target", MAKE)
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_files_that_the_readme_names_exist() -> None:
    links = re.findall(r"\]\(([^):]+)\)", README)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert missing == []
