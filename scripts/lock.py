"""Write requirements.lock: the versions of constraints.txt with the hashes of their files.

    python scripts/lock.py

Asks pip what it would install here, without installing it, and writes down no more than names,
versions and SHA-256: no address of an index or of a file. Run it on the main platform, Linux x86-64
with Python 3.11, after a change of constraints.txt.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
CONSTRAINTS, LOCK = ROOT / "constraints.txt", ROOT / "requirements.lock"

HEADER = """\
# constraints.txt with the hashes of the files, for Linux x86-64 with Python 3.11:
#     pip install --require-hashes -r requirements.lock
# Written by scripts/lock.py.
"""


def normalized(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(text: str) -> dict[str, str]:
    """Versions by name, of lines such as `click==8.1.7`."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    pairs = [line.partition("==") for line in lines if line]
    return {normalized(name): version for name, _, version in pairs}


def lines_of(report: dict[str, Any]) -> list[str]:
    """A line for each file that pip's report names.

    Raises:
        KeyError: A file has no SHA-256.
    """
    lines = []
    for item in report["install"]:
        name, version = normalized(item["metadata"]["name"]), item["metadata"]["version"]
        sha256 = item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={version} --hash=sha256:{sha256}")
    return sorted(lines)


def asked(constraints: Path) -> dict[str, Any]:
    """What pip says that it would install."""
    with tempfile.TemporaryDirectory(prefix="lock-") as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
        command = [sys.executable, "-m", "pip", "install", *options]
        subprocess.run([*command, "--report", str(report), "-r", str(constraints)], check=True)
        found: dict[str, Any] = json.loads(report.read_bytes())
    return found


@click.command()
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="A report of pip's that is there already; default: ask pip.",
)
def main(report: Path | None) -> None:
    """Write requirements.lock."""
    found = json.loads(report.read_bytes()) if report else asked(CONSTRAINTS)
    content = HEADER + "\n".join(lines_of(found)) + "\n"
    expected = pinned(CONSTRAINTS.read_text())
    written = {line.split()[0] for line in lines_of(found)}
    lacking = [f"{n}=={v}" for n, v in expected.items() if f"{n}=={v}" not in written]
    if lacking:
        sys.exit(f"pip would not install {', '.join(lacking)} here")
    LOCK.write_text(content)
    click.echo(f"{LOCK.name}: {len(written)} packages")


if __name__ == "__main__":
    main()
