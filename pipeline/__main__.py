"""`python -m pipeline`."""

import sys


def main() -> None:
    """Run the command line; an interrupt while it loads ends as one does later."""
    try:
        from pipeline.cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
