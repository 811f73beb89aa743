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
        _leave(INTERRUPTED)
    except SystemExit as ended:
        if not isinstance(ended.code, int) or _is_watched():
            raise
        if ended.code != INTERRUPTED and (threading := sys.modules.get("threading")):
            threading._shutdown()  # waits for threads, as Python does before functions of `atexit`
        _leave(ended.code)


def _is_watched() -> bool:
    """Whether somebody looks at this process who wants to go on after it: a profiler, `python -i`.

    A profiler prints what it saw when the program that it ran has ended.
    """
    return bool(sys.getprofile() or sys.gettrace() or sys.flags.inspect)


def _leave(status: int) -> None:
    """End with a status, and leave memory to the operating system.

    Python would take every module and object apart first, in a tenth of the time of `--help`. And
    where Ctrl-C arrives inside code that was given to `exec` as text, as dataclasses do while
    modules load, Python remembers it and would end by the signal whatever the exit status is.
    """
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:  # a full disk, nobody reads: Python says so
        sys.exit(status)
    os._exit(status)


if __name__ == "__main__":
    main()
