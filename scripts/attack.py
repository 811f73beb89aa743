"""Give the product hostile and odd inputs, and see that each is refused clearly or works.

    python scripts/attack.py yaml checkpoint image tar --count 600
    python scripts/attack.py artifact manifest report import --count 3000 --commands 50
    python scripts/attack.py --count 0 --commands 200     # through real commands alone

In one process, with a time for every input. Prints how many inputs were refused clearly, loaded,
ended in a traceback or did not end; exit status 1 if there is one of the latter two, or if one was
loaded that had to be refused. Equal seeds try equal inputs.

A further kind of input is a module in scripts/attacks and an entry in KINDS.
"""

from __future__ import annotations

import faulthandler
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from attacks import (
    artifacts,
    checkpoints,
    configurations,
    headers,
    images,
    imports,
    manifests,
    networks,
    reports,
    tars,
)
from attacks.attempt import Attempt, Outcome, Tally, tally

KINDS: dict[str, Callable[[Path, int, int], Iterator[Attempt]]] = {
    "yaml": configurations.attempts,
    "model": networks.attempts,
    "checkpoint": checkpoints.attempts,
    "safetensors": headers.attempts,
    "image": images.attempts,
    "tar": tars.attempts,
    "artifact": artifacts.attempts,
    "manifest": manifests.attempts,
    "report": reports.attempts,
    "import": imports.attempts,
}

COMMANDS: dict[str, Callable[[Path, int, int], Iterator[Attempt]]] = {
    "yaml": configurations.commands,
    "checkpoint": checkpoints.commands,
    "safetensors": headers.commands,
    "tar": tars.commands,
    "artifact": artifacts.commands,
    "manifest": manifests.commands,
    "report": reports.commands,
    "import": imports.commands,
}
"""Kinds that are tried through real commands, too."""

_MEMORY = 8 * 2**30
"""Bytes beyond those of the loaded libraries: what fills the memory shall fail, not the machine."""


_COMMAND_LIMIT = 12
"""How many times as long commands may take: three of them, each of which loads libraries."""


def limit_memory() -> None:
    """Limit what this process may allocate from now on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


@click.command()
@click.argument("kinds", type=click.Choice(list(KINDS)), nargs=-1)
@click.option("--seed", default=0, show_default=True, help="Chooses the random inputs.")
@click.option(
    "--count",
    default=200,
    show_default=True,
    help="Random inputs of a kind, beside those listed; 0: none.",
)
@click.option("--commands", default=0, show_default=True, help="Inputs through real commands.")
@click.option("--limit-s", default=10.0, show_default=True, help="Seconds for an input.")
@click.option("--faults", default=10, show_default=True, help="Show at most so many of a kind.")
def main(
    kinds: tuple[str, ...], seed: int, count: int, commands: int, limit_s: float, faults: int
) -> None:
    """Try inputs of KINDS; of all kinds, if none is named."""
    faulthandler.enable()
    if sys.platform == "linux":
        limit_memory()
    failed = False
    for kind in kinds or KINDS:
        if count:
            result = tried(KINDS[kind], seed, count, limit_s)
            failed |= told(kind, result, faults)
        if commands and kind in COMMANDS:
            result = tried(COMMANDS[kind], seed, commands, _COMMAND_LIMIT * limit_s)
            failed |= told(f"{kind}, by command", result, faults)
    sys.exit(1 if failed else 0)


def tried(
    attempts: Callable[[Path, int, int], Iterator[Attempt]], seed: int, count: int, limit_s: float
) -> Tally:
    """Try inputs of one kind, in a folder of their own."""
    # For what no signal ends: code outside Python that never comes back.
    faulthandler.dump_traceback_later(3600, exit=True)
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        return tally(attempts(Path(folder), seed, count), limit_s)


def told(kind: str, result: Tally, most: int) -> bool:
    """Print what came of a kind; returns whether there is a fault."""
    counts = ", ".join(f"{result.counts[o]} {o.value}" for o in Outcome)
    click.echo(f"{kind}: {result.counts.total()} inputs: {counts}")
    for line in result.faults[:most]:
        click.echo(f"  {line}")
    return bool(result.faults)


if __name__ == "__main__":
    main()
