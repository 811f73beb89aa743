"""A worker's side of a fleet: runs one step by its name, in a process of its own.

Dask calls `work` with the text of an order. What it does lies in a folder of the worker's, as often
as orders of one configuration come; it goes with the worker. The process sees the user's module of
this order and no other, has the threads that a plain run has, and takes the worker with it in no
case.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import filelock

from pipeline.core import machine, signals
from pipeline.core.errors import BuildError, PipelineError, UnavailableError, failure_of
from pipeline.scheduler.orders import MODULE, RESULTS, Answer, Order, differences
from pipeline.scheduler.places import MachineFacts
from pipeline.scheduler.plan import step_named
from pipeline.scheduler.processes import digest_again, planned
from pipeline.steps.folders import LOG_FILE
from pipeline.steps.keys import PROJECT
from pipeline.steps.log import Log
from pipeline.steps.step import Place, Step
from pipeline.store import parcels
from pipeline.store.shared import Shared
from pipeline.targets.registry import TARGETS

PROGRAM = "pipeline.scheduler.worker"
"""The module that a worker's process runs."""

MACHINE = "--machine"
"""Asks the program for the machine in place of an order."""

MOST_LINES = 500
"""Lines of a step's log that travel back: the last ones."""

_FETCHING = ".fetching.lock"


def work(text: str) -> str:
    """Run a step; called by Dask.

    Args:
        text: An `Order`, as JSON.

    Returns:
        An `Answer`, as JSON.

    Raises:
        BuildError: The process died: Dask may try again, here or elsewhere.
    """
    from distributed import get_worker

    worker = get_worker()
    folder = Path(worker.local_directory, "care-deploy").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{worker.name} ({platform.node()})"
    nannied = worker.nanny is not None
    with tempfile.TemporaryDirectory(dir=folder, prefix="order-") as place:
        order, answer = Path(place, "order.json"), Path(place, "answer.json")
        order.write_text(text)
        arguments = [str(folder), str(order), str(answer), name]
        _run([sys.executable, "-m", PROGRAM, *arguments], _environment(nannied))
        found = Answer.from_json(answer.read_text())
        return replace(found, address=str(worker.address)).to_json()


async def told_machine(targets: Sequence[str]) -> str:
    """What decides a figure of this machine; called by Dask, beside what the worker does.

    Args:
        targets: Names of those whose hardware counts.

    Returns:
        `machine_facts` as JSON; "" where nothing can be told.
    """
    command = [sys.executable, "-m", PROGRAM, MACHINE, *targets]
    answer = await asyncio.to_thread(
        subprocess.run, command, env=_environment(False), capture_output=True, text=True
    )
    return str(answer.stdout)


def machine_facts(targets: Sequence[str]) -> MachineFacts:
    """What decides a figure of this machine, as keys of steps have it."""
    hardware = {name: TARGETS[name].hardware() for name in targets}
    return {"cpu": machine.cpu_class(), "targets": hardware}


def _run(command: list[str], environment: dict[str, str]) -> None:
    """Run a process that ends when this one does.

    Raises:
        BuildError: It died.
    """
    # Nothing is ever written there: its end tells the process that the worker ended.
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
        code = process.wait()
    if code:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        raise BuildError(
            f"its process {how}: see that there is memory enough, and the worker's log"
        )


def _environment(nannied: bool) -> dict[str, str]:
    """What the process finds: this project, and no limit of threads that Dask's nanny set."""
    import dask

    kept = dict(os.environ)
    for name, value in dask.config.get("distributed.nanny.pre-spawn-environ", {}).items():
        # Their number decides how floats are rounded: as many as in a plain run.
        if nannied and kept.get(name) == str(value):
            del kept[name]
    kept["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")])
    )
    return kept


def main(arguments: Sequence[str]) -> None:
    """Carry out an order.

    Args:
        arguments: The worker's folder, the order, where the answer goes, and the worker's name; or
            `MACHINE`, and targets: what decides a figure here is written to standard output.
    """
    if arguments[0] == MACHINE:
        print(json.dumps(machine_facts(arguments[1:])))
        return
    signals.die_with_parent()
    threading.Thread(target=_end_with_worker, daemon=True).start()
    folder, order, answer = map(Path, arguments[:3])
    with signals.raised():
        answer.write_text(fill(Order.from_json(order.read_text()), folder, arguments[3]).to_json())


def _end_with_worker() -> None:
    """Where the system does not end the process with its worker, the end of its input does."""
    sys.stdin.read()
    os._exit(1)


def fill(order: Order, folder: Path, name: str) -> Answer:
    """Run what an order asks for.

    Args:
        order: The order.
        folder: The worker's folder.
        name: The worker's name.
    """
    lines: list[str] = []
    notes: list[str] = []
    try:
        place = folder / order.place
        (place / MODULE).mkdir(parents=True, exist_ok=True)
        (place / RESULTS).mkdir(exist_ok=True)
        os.chdir(place / MODULE)
        made = _made(order, place, lines, notes)
        told = tuple(notes), tuple(lines[-MOST_LINES:])
        if isinstance(made, str):
            return Answer(name, None, *told, digest=made)
        return Answer(name, made, *told)
    except PipelineError as error:
        kind, message = type(error).__name__, str(error)
    except Exception as error:
        # The traceback goes to the run's log: it is the only thing that tells what happened here.
        lines += "".join(traceback.format_exception(error)).splitlines()
        failure = failure_of(order.step, error, f"see {LOG_FILE}")
        kind, message = type(failure).__name__, str(failure)
    return Answer(name, None, tuple(notes), tuple(lines[-MOST_LINES:]), message, kind)


def _made(order: Order, place: Path, lines: list[str], notes: list[str]) -> parcels.Parcel | str:
    """The manifest of what was made, in the store; the digest of what was made once more."""
    store = _open(order, notes.append)
    assert store.entries is not None, "a store that is required is open, or an error"
    objects = store.entries.objects
    for path, parcel in order.files.items():
        parcels.receive_file(objects, parcel, place / path)
    steps = planned(json.dumps(order.config), lines.append)
    folder = steps[0].context.folder
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / _FETCHING):
        parcels.receive_all(objects, order.artifacts, folder)
    step = step_named(steps, order.step)
    if step is None:
        raise UnavailableError(f"it plans no step {order.step}: install the version of the run")
    if order.missing:
        step.do_without([each for each in steps if each.name in order.missing])
        step.notes.clear()  # the run notes that itself
    with step.seen_from(Place(order.parts.get("inputs", {}), order.parts.get("tools", {}))):
        found = differences(order.parts, step.parts())
    if found:
        raise UnavailableError(
            f"it would make {order.step} from something else: {found}: install the run's versions "
            "(pip install -c constraints.txt -e .), and let the images be the same there"
        )
    if order.again:
        with _logged(step):
            digest = digest_again(step)
        if isinstance(digest, PipelineError):
            raise digest
        return digest
    try:
        with _logged(step):
            if order.anew or not store.take(step):
                step.run()
    finally:
        notes += step.notes
    store.give(step)
    return parcels.send(objects, step.artifact())


def _open(order: Order, warn: Callable[[str], object]) -> Shared:
    return Shared.open(order.store, push=True, required=True, warn=warn, limit_s=order.timeout_s)


@contextmanager
def _logged(step: Step) -> Iterator[None]:
    """Let what libraries print go to the log in the worker's place."""
    log = Log(step.context.folder / LOG_FILE)
    try:
        with log.captured():
            yield
    finally:
        log.close()


if __name__ == "__main__":
    main(sys.argv[1:])
