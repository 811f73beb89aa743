"""How errors and interrupts end a program."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from pipeline.core.commandline import INTERRUPTED, Command, Group, argument, fail, option
from pipeline.core.errors import BuildError, InputError
from pipeline.core.signals import Ended

ROOT = Path(__file__).parents[3]


def program(error: BaseException | None) -> click.Group:
    @click.group(cls=Group)
    def main() -> None: ...

    @main.command()
    @click.option("--count", type=int)
    @click.pass_context
    def work(ctx: click.Context, count: int | None) -> None:
        if error is not None:
            raise error
        click.echo(f"worked {count}")
        ctx.exit(count or 0)

    return main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("no such file"), 2, "error: no such file\n"),
        (BuildError("refused"), 3, "error: refused\n"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
        (click.Abort(), INTERRUPTED, "interrupted"),
        (Ended(signal.SIGTERM), 143, "ended by SIGTERM"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error: BaseException, code: int, text: str) -> None:
    result = CliRunner().invoke(program(error), ["work"])
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.strip().splitlines()[-1].startswith(text.strip())
    assert "Traceback" not in result.output


def test_a_wrong_command_line_ends_with_2() -> None:
    for arguments in (["work", "--count", "many"], ["play"], ["work", "--no"]):
        result = CliRunner().invoke(program(None), arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")


def test_the_commands_own_status_is_that_of_the_program() -> None:
    assert CliRunner().invoke(program(None), ["work"]).exit_code == 0
    assert CliRunner().invoke(program(None), ["work", "--count", "4"]).exit_code == 4
    assert CliRunner().invoke(program(None), ["--help"]).exit_code == 0


def test_without_standalone_mode_errors_pass() -> None:
    with pytest.raises(InputError):
        program(InputError("x")).main(["work"], standalone_mode=False)


def test_a_single_command_ends_alike() -> None:
    @click.command(cls=Command)
    def main() -> None:
        raise InputError("no data")

    result = CliRunner().invoke(main)
    assert (result.exit_code, result.stderr) == (2, "error: no data\n")


def test_fail_says_and_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="7"):
        fail("over", 7)
    assert capsys.readouterr().err == "error: over\n"


def test_a_fault_of_the_program_is_one_line_and_a_file() -> None:
    result = CliRunner().invoke(program(KeyError("colour\nof the sky")), ["work"])
    assert result.exit_code == 70
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: an unforeseen fault: KeyError: 'colour")
    file = Path(re.search(r"with (\S+), which", line)[1])  # type: ignore[index]
    assert "Traceback" in file.read_text()
    file.unlink()


def test_nobody_reads_the_output() -> None:
    code = (
        "import click\nfrom pipeline.core.commandline import Command\n"
        "@click.command(cls=Command)\ndef main():\n"
        "    for i in range(100000): print('line', i)\n"
        "main()"
    )
    run = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -1; echo ${PIPESTATUS[0]}', sys.executable, code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert run.stdout.splitlines() == ["line 0", "141"]
    assert run.stderr == ""


def test_options_are_made_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Help of a group names its commands, and needs the options of none."""
    made = []

    class Counted(click.Option):
        def __init__(self, declared: list[str], **attributes: Any) -> None:
            made.extend(declared)
            super().__init__(declared, **attributes)

    monkeypatch.setattr(click, "Option", Counted)

    @click.group(cls=Group)
    def main() -> None: ...

    @main.group()
    def inner() -> None: ...

    @inner.command()
    @argument("place")
    @option("--kind", default="plain", show_default=True)
    @click.option("--plain", default=1)
    @option("--last", is_flag=True)
    def work(place: str, **options: object) -> None:
        """Work."""
        click.echo(f"{place} {options}")

    @inner.command()
    @option("--never")
    def rest(never: str) -> None: ...

    assert "Work." in CliRunner().invoke(main, ["inner", "--help"]).output
    assert made == []
    shown = CliRunner().invoke(main, ["inner", "work", "--help"]).output
    assert sorted(made) == ["--kind", "--last"]
    # In the order in which they stand, those of click among them.
    assert re.findall(r"^  --\w+", shown, re.MULTILINE) == [
        "  --kind",
        "  --plain",
        "  --last",
        "  --help",
    ]
    told = CliRunner().invoke(main, ["inner", "work", "here", "--kind", "blue"]).output
    assert told == "here {'kind': 'blue', 'plain': 1, 'last': False}\n"
    assert sorted(made) == ["--kind", "--last"]
