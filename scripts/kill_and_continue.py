"""End runs by signals at random moments and see that the next one ends as an undisturbed one would.

    python scripts/kill_and_continue.py --kills 20

Runs the pipeline on the embedded network with a few images, undisturbed; then again from nothing,
ended by SIGKILL, SIGTERM, SIGHUP and SIGINT again and again; then lets it finish, and compares the
digests of everything that is built. After each signal no process of the run may live on, and the
exit status has to be the signal's; after all but SIGKILL no temporary folder may be left either.
Timed figures differ from run to run and are left out.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import click

from pipeline.core.replacing import TEMPORARY_PREFIX
from pipeline.steps.artifact import MANIFEST, Artifact

CONFIG = """\
name: trial
model: {{name: care_tiny, checkpoint: embedded}}
data: {{validation: fashion-mnist, calibration: fashion-mnist}}
calibration: {{images: 64}}
targets:
  trt: {{precisions: [fp16, int8]}}
  ort: {{precisions: [fp32]}}
  coreml: {{precisions: [fp16]}}
validation: {{images: {images}}}
bench: {{samples: 20, warmup: 2, max_seconds: 2}}
output: {output}
"""

SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")

_GRACE_S = 10.0
"""Seconds after the end of a run within which all of its processes have to be gone."""

_PATIENCE_S = 60.0
"""Seconds after a signal within which a run has to end; a busy machine takes ten."""


def command(config: Path) -> list[str]:
    """The command that is ended."""
    return [sys.executable, "-m", "pipeline", "run", str(config), "--quiet"]


def digests(output: Path) -> dict[str, str]:
    """Digest of every artifact but those that hold times."""
    folder = output / "trial"
    found = (Artifact.read(path.parent) for path in folder.rglob(MANIFEST))
    return {a.name: a.digest for a in found if a.kind != "bench"}


def compare(expected: dict[str, str], found: dict[str, str]) -> None:
    """End with the names of what differs, if anything does."""
    different = sorted(n for n in expected.keys() | found if expected.get(n) != found.get(n))
    if different:
        sys.exit(f"these differ from an undisturbed run: {', '.join(different)}")


def alive_in(session: int) -> list[int]:
    """Processes of a session, without those that have ended and wait to be collected."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # State, parent, group and session follow the name, which may hold anything.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(entry.name))
    return found


def orphans(session: int, grace_s: float = _GRACE_S) -> list[int]:
    """Processes of a session that are still there after a time."""
    end = time.monotonic() + grace_s
    while (found := alive_in(session)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def _answer_signals() -> None:
    """Let signals end this process also where whoever called ignores them, as nohup does."""
    for name in SIGNALS:
        if name != "SIGKILL":
            signal.signal(signal.Signals[name], signal.SIG_DFL)


def ended(
    config: Path, temporary: Path, number: int, moment_s: float, patience_s: float = _PATIENCE_S
) -> tuple[int | None, list[int]]:
    """Begin a run and send it a signal.

    Args:
        config: The configuration.
        temporary: Where it makes its temporary files.
        number: The signal.
        moment_s: Seconds after which it is sent.
        patience_s: Seconds after which a run that goes on is killed.

    Returns:
        The exit status as shells have it, None if it had finished before, and the processes that
        lived on.
    """
    with subprocess.Popen(
        command(config),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_answer_signals,
        start_new_session=True,  # of which its children are a part, whoever becomes their parent
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as run:
        try:
            if run.wait(moment_s) == 0:
                return None, orphans(run.pid)
        except subprocess.TimeoutExpired:
            run.send_signal(number)
        try:
            status = run.wait(patience_s)
        except subprocess.TimeoutExpired:
            run.kill()
            status = run.wait()
    return (status if status >= 0 else 128 - status), orphans(run.pid)


def left_over(output: Path, temporary: Path, usual: Collection[str] = ()) -> list[str]:
    """Temporary files and folders that lie in results, or in the folder for such.

    Args:
        output: Where results lie.
        temporary: Where a run makes its temporary files.
        usual: Names of what an undisturbed run leaves there: caches of libraries, as PyTorch's.
    """
    own = [path for path in temporary.iterdir() if path.name not in usual]
    return [str(path) for path in (*output.rglob(f"{TEMPORARY_PREFIX}*"), *own)]


def emptied(folder: Path) -> None:
    """Empty a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def problems(name: str, status: int | None, lived_on: list[int], left: list[str]) -> list[str]:
    """What is wrong with how a run ended; nothing if it had finished before."""
    number = int(signal.Signals[name])
    found = []
    if status not in (None, 128 + number):
        found.append(f"exit status {status}, not {128 + number}; 137 if it went on and was killed")
    if lived_on:
        found.append(f"processes lived on: {lived_on}")
    if left and number != signal.SIGKILL:
        found.append(f"left over: {', '.join(left)}")
    return [f"{name}: {problem}" for problem in found]


@click.command()
@click.option("--kills", default=20, show_default=True, help="How often to send each signal.")
@click.option("--images", default=500, show_default=True, help="How many to validate on.")
@click.option("--seed", default=0, show_default=True, help="Chooses the moments.")
@click.option(
    "--signal",
    "signals",
    type=click.Choice(SIGNALS),
    multiple=True,
    default=SIGNALS,
    show_default=True,
    help="Which to send.",
)
def main(kills: int, images: int, seed: int, signals: tuple[str, ...]) -> None:
    """End runs by signals at random moments and compare what comes out in the end."""
    moments = random.Random(seed)
    wanted = [name for name in signals for _ in range(kills)]
    moments.shuffle(wanted)
    sent: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        root = Path(folder)
        config, output, temporary = root / "pipeline.yaml", root / "engines", root / "tmp"
        temporary.mkdir()
        config.write_text(CONFIG.format(output=output, images=images))
        start = time.monotonic()
        aside = {**os.environ, "TMPDIR": str(temporary)}
        subprocess.run(command(config), check=True, stdout=subprocess.DEVNULL, env=aside)
        seconds = time.monotonic() - start
        expected = digests(output)
        usual = {path.name for path in temporary.iterdir()}
        beside = f", beside {', '.join(sorted(usual))}" if usual else ""
        click.echo(f"undisturbed: {len(expected)} artifacts in {seconds:.0f} s{beside}")
        shutil.rmtree(output)
        while wanted:
            moment, name = moments.uniform(0.1, seconds / 3), wanted[-1]
            emptied(temporary)
            # SIGKILL may leave something, which stays until its step begins in a later run.
            before = left_over(output, temporary, usual)
            status, lived_on = ended(config, temporary, signal.Signals[name], moment)
            left = [path for path in left_over(output, temporary, usual) if path not in before]
            new = problems(name, status, lived_on, left)
            faults += new
            for fault in new:
                click.echo(f"FAULT: {fault}")  # at once: the whole takes an hour
            if status is None:
                click.echo("finished before it was ended: compared, and begun again")
                compare(expected, digests(output))
                shutil.rmtree(output)
                continue
            wanted.pop()
            sent[name] += 1
            there = len(digests(output)) if output.exists() else 0
            click.echo(f"{name} {sent[name]}: after {moment:4.1f} s, {there} artifacts there")
        subprocess.run(command(config), check=True, stdout=subprocess.DEVNULL)
        found = digests(output)
        left = [str(path) for path in output.rglob(f"{TEMPORARY_PREFIX}*")]
    compare(expected, found)
    faults += [f"left over in the end: {path}" for path in left]
    click.echo(json.dumps({"sent": dict(sent), "artifacts": len(found), "faults": faults}))
    if faults:
        sys.exit("a run did not end as it should")


if __name__ == "__main__":
    main()
