"""How errors and interrupts end a program, for every command line of this project.

    @click.command(cls=Command)
    def main() -> None: ...

A mistake that the user can mend is printed as one line, `error: …`, without a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from pipeline.core.errors import PipelineError
from pipeline.core.words import printable

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""

INTERRUPT_ADVICE = "interrupted: what was finished stays; run again to continue"


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

        Exit status: that of the error, 2 after a wrong command line, 130 after an interrupt.
        """
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            status = super().main(args, prog_name, complete_var, False, **extra)
        except PipelineError as error:
            fail(str(error), error.exit_code)
        except click.ClickException as error:
            fail(printable(error.format_message()), error.exit_code)
        except OSError as error:  # a disk, a permission or a file that went away
            where = f"{error.filename}: " if error.filename else ""
            fail(printable(f"{where}{error.strerror or error}"), PipelineError.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo(INTERRUPT_ADVICE, err=True)
            sys.exit(INTERRUPTED)
        # Without standalone mode click returns the status of an early exit such as --help.
        sys.exit(status if isinstance(status, int) else 0)


class Command(_Outermost):
    """A click command that ends as this project's programs do."""


class Group(_Outermost, click.Group):
    """A click group that ends as this project's programs do."""


def fail(message: str, status: int) -> None:
    """Print `error: message` on standard error and leave with `status`."""
    click.echo(f"error: {message}", err=True)
    sys.exit(status)
