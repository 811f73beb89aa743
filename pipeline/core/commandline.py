"""How errors and interrupts end a program, for every command line of this project.

    @click.command(cls=Command)
    def main() -> None: ...

A mistake that the user can mend is printed as one line, `error: …`, without a traceback.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import click

from pipeline.core import signals
from pipeline.core.errors import PipelineError, UnforeseenError
from pipeline.core.words import in_short, printable

F = TypeVar("F", bound=Callable[..., Any])

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""

NOBODY_READS = 141
"""Exit status where the output goes to a pipe that was closed: 128 + SIGPIPE."""

ADVICE = "what was finished stays; run again to continue"


class _Outermost(click.Command):
    """Ends the program with one line for whatever a user can mend."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command; see `click.Command.main`.

        Exit status: that of the error, 2 after a wrong command line, 70 after a fault of this
        program, 130 after an interrupt, 143 and 129 after SIGTERM and SIGHUP, 141 where nobody
        reads the output.
        """
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        _show_all_characters()
        try:
            with signals.raised():
                status = super().main(args, prog_name, complete_var, False, **extra)
        except PipelineError as error:
            fail(str(error), error.exit_code)
        except click.ClickException as error:
            fail(printable(error.format_message()), error.exit_code)
        except OSError as error:  # a disk, a permission or a file that went away
            where = f"{error.filename}: " if error.filename else ""
            fail(printable(f"{where}{error.strerror or error}"), PipelineError.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _leave(f"interrupted: {ADVICE}", INTERRUPTED)
        except signals.Ended as ended:
            _leave(f"ended by {ended.name}: {ADVICE}", ended.exit_code)
        except Exception as error:
            fail(unforeseen(error), UnforeseenError.exit_code)
        # Without standalone mode click returns the status of an early exit such as --help.
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; click itself would give a closed pipe the exit status 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Whoever read the output is gone; Python would complain once more when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(NOBODY_READS)


class Command(_Outermost):
    """A click command that ends as this project's programs do."""


class _Late(click.Command):
    """A command whose options and arguments are made when they are first asked for.

    Help names every command, and each run carries out a single one: the options of all the others
    took a tenth of the time of help.
    """

    _declared: list[click.Parameter | Callable[[], click.Parameter]]
    _made: list[click.Parameter] | None

    @property
    def params(self) -> list[click.Parameter]:
        """Options and arguments; see `click.Command`."""
        if self._made is None:
            self._made = [p if isinstance(p, click.Parameter) else p() for p in self._declared]
        return self._made

    @params.setter
    def params(self, declared: list[click.Parameter]) -> None:
        self._declared, self._made = [*declared], None


class _Inner(_Late, click.Group):
    """A group within a group."""

    command_class = _Late


class Group(_Outermost, _Inner):
    """A click group that ends as this project's programs do."""

    group_class = _Inner


def option(*declared: str, **attributes: Any) -> Callable[[F], F]:
    """As `click.option`, for commands of `Group`, which make it when it is asked for."""
    return _declaring(partial(click.Option, declared, **attributes))


def argument(*declared: str, **attributes: Any) -> Callable[[F], F]:
    """As `click.argument`, for commands of `Group`, which make it when it is asked for."""
    return _declaring(partial(click.Argument, declared, **attributes))


def _declaring(make: Callable[[], click.Parameter]) -> Callable[[F], F]:
    def declared(function: F) -> F:
        # Where click's own decorators keep them, so that both go together in their order.
        vars(function).setdefault("__click_params__", []).append(make)
        return function

    return declared


def unforeseen(error: Exception) -> str:
    """What to say of a fault of this program; the traceback goes to a file that is named."""
    # Here: `--help` and whatever else goes well need neither, and they take a tenth of its time.
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile(
        "w", prefix="care-deploy-fault-", suffix=".txt", delete=False, encoding="utf-8"
    ) as stream:
        stream.write("".join(traceback.format_exception(error)))
    return (
        f"an unforeseen fault: {in_short(error)}; please report it with {stream.name}, which says "
        "where"
    )


def _show_all_characters() -> None:
    """Escape what the terminal's encoding lacks: a name ends no program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leave(message: str, status: int) -> None:
    click.echo(message, err=True)
    sys.exit(status)


def fail(message: str, status: int) -> None:
    """Print `error: message` on standard error and leave with `status`."""
    click.echo(f"error: {message}", err=True)
    sys.exit(status)
