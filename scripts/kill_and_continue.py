"""Kill runs at random moments and see that the next one ends as an undisturbed one would.

    python scripts/kill_and_continue.py --kills 20

Runs the pipeline on the embedded network with a few images, undisturbed; then again from nothing,
killed with SIGKILL again and again; then lets it finish, and compares the digests of everything
that is built. Timed figures differ from run to run and are left out.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

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
validation: {{images: 500}}
bench: {{samples: 20, warmup: 2, max_seconds: 2}}
output: {output}
"""


def command(config: Path) -> list[str]:
    """The command that is killed."""
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


@click.command()
@click.option("--kills", default=20, show_default=True, help="How often to kill.")
@click.option("--seed", default=0, show_default=True, help="Chooses the moments.")
def main(kills: int, seed: int) -> None:
    """Kill runs at random moments and compare what comes out in the end."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        root = Path(name)
        config, output = root / "pipeline.yaml", root / "engines"
        config.write_text(CONFIG.format(output=output))
        start = time.monotonic()
        subprocess.run(command(config), check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        expected = digests(output)
        click.echo(f"undisturbed: {len(expected)} artifacts in {seconds:.0f} s")
        shutil.rmtree(output)
        killed = 0
        while killed < kills:
            moment = moments.uniform(0.5, seconds / 3)
            with subprocess.Popen(
                command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as run:
                try:
                    run.wait(moment)
                except subprocess.TimeoutExpired:
                    run.send_signal(signal.SIGKILL)
                code = run.wait()
            if code == 0:
                click.echo("finished before it was killed: compared, and begun again")
                compare(expected, digests(output))
                shutil.rmtree(output)
                continue
            killed += 1
            there = len(digests(output)) if output.exists() else 0
            click.echo(f"kill {killed}: after {moment:4.1f} s, {there} artifacts there")
        subprocess.run(command(config), check=True, stdout=subprocess.DEVNULL)
        found = digests(output)
        left = [str(path) for path in output.rglob(".making-*")]
    compare(expected, found)
    click.echo(json.dumps({"kills": killed, "artifacts": len(found), "left_over": left}))
    if left:
        sys.exit("something was left over")


if __name__ == "__main__":
    main()
