"""`python -m pipeline`."""

import atexit
import os
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line; an interrupt while it loads ends as one does later."""
    try:
        from pipeline.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave()
    except SystemExit as ended:
        if ended.code != INTERRUPTED:
            raise
        _leave()


def _leave() -> None:
    """End with the status of an interrupt.

    Where Ctrl-C arrives inside code that was given to `exec` as text, as dataclasses do while
    modules load, Python remembers it and would end by the signal whatever the exit status is.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
