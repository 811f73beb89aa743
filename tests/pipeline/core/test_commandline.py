"""How errors and interrupts end a program."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from pipeline.core.commandline import INTERRUPTED, Command, Group, fail
from pipeline.core.errors import BuildError, InputError


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
