"""Write the lowest versions that setup.cfg allows, as constraints for pip.

    python scripts/lower.py > lowest.txt
    pip install --constraint lowest.txt --editable '.[test]'

`make lower` does that in an environment of its own, and runs the suite there: what setup.cfg says
of versions is only true if somebody tries it. A bound has to be a version that exists. Needs
nothing but Python: it is run before anything is installed.
"""

from __future__ import annotations

import configparser
from collections.abc import Iterator
from pathlib import Path

SETTINGS = Path(__file__).parents[1] / "setup.cfg"

ASIDE = "coreai"
"""An extra that needs newer versions of what all others share: NumPy 2.3, safetensors 0.5.3."""


def requirements(settings: configparser.ConfigParser) -> Iterator[str]:
    """Every requirement of the package and of its extras, one a line."""
    yield from settings["options"]["install_requires"].splitlines()
    for name, lines in settings["options.extras_require"].items():
        if name != ASIDE:
            yield from lines.splitlines()


def lowest(lines: Iterator[str]) -> list[str]:
    """Constraints of those lines that state a lowest version, sorted.

    Args:
        lines: Requirements, such as `torch>=2.13` or `s3fs[boto3]>=2024.6; os_name == "posix"`.
    """
    found = set()
    for line in lines:
        requirement, _, condition = line.partition(";")
        name, bounded, version = requirement.partition(">=")
        if bounded:
            # Constraints may name no extras.
            pinned = f"{name.partition('[')[0].strip()}=={version.strip()}"
            found.add(f"{pinned}; {condition.strip()}" if condition else pinned)
    return sorted(found)


def main() -> None:
    """Write the lowest versions that setup.cfg allows, as constraints for pip."""
    settings = configparser.ConfigParser()
    settings.read_string(SETTINGS.read_text(encoding="utf-8"))
    print("\n".join(lowest(requirements(settings))))


if __name__ == "__main__":
    main()
