"""What the command lines of this package share: how errors and interrupts end a program.

    @click.command(cls=Command)
    def main() -> None: ...

A mistake that the user can mend is printed as one line, `error: …`, without a traceback.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from care.errors import CareError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""


class Command(click.Command):
    """A click command that prints `error: …` for whatever a user can mend.

    Exit status: 2 after a mistake of the user, 130 after an interrupt.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command; see `click.Command.main`."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            status = super().main(args, prog_name, complete_var, False, **extra)
        except CareError as error:
            fail(str(error), error.exit_code)
        except click.ClickException as error:
            fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            fail("interrupted", INTERRUPTED)
        # Without standalone mode click returns the status of an early exit such as --help.
        sys.exit(status if isinstance(status, int) else 0)


def fail(message: str, status: int) -> None:
    """Print `error: message` on standard error and leave with `status`."""
    click.echo(f"error: {message}", err=True)
    sys.exit(status)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as "; did you mean care_s0?", or nothing if no known word is near."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
