"""A throw-away environment: this one, but for other versions of some packages.

Nothing of the running environment is changed. The other one is a virtual environment in a temporary
folder that holds the asked packages alone and, behind them, looks for modules wherever this process
does.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import site
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.core.errors import InputError, UnavailableError
from pipeline.core.words import nearest, printable, shown

PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
"""How a package and its version are stated; no other form says which version was tried."""

_LAYER = "layer-below.pth"
_VERSIONS = re.compile(r"\(from versions: (.*)\)")
_MOST_VERSIONS = 10
_MOST_TOLD = 600
"""Characters of what pip says."""


def pinned(requirements: Sequence[str]) -> dict[str, str]:
    """The versions by package, of `package==version`.

    Raises:
        InputError: One is not written so, names a package that is not installed here, states the
            version that is, or stands there twice.
    """
    found: dict[str, str] = {}
    for text in requirements:
        match = PINNED.fullmatch(text)
        if match is None:
            raise InputError(
                f"--with {shown(text)}: write PACKAGE==VERSION, such as onnxruntime==1.23.0"
            )
        name, version = _normalized(match[1]), match[2]
        if name in found:
            raise InputError(f"--with {shown(text)}: there are two versions of {name}: give one")
        _require_another(name, version)
        found[name] = version
    return found


def _require_another(name: str, version: str) -> None:
    installed = _installed()
    if name not in installed:
        raise InputError(
            f"--with: {shown(name)} is not installed here, so that nothing is made by it"
            f"{nearest(name, installed)}"
        )
    if installed[name] == version:
        raise InputError(f"--with: {name} has version {version} here: name another one")


@contextlib.contextmanager
def changed(wanted: Mapping[str, str]) -> Iterator[Path]:
    """Make an environment with other versions of some packages; it is removed in the end.

    All other packages keep their versions: what the asked ones need beside them has to fit.

    Args:
        wanted: Versions by package, see `pinned`.

    Yields:
        Its Python interpreter.

    Raises:
        UnavailableError: It cannot be made: no such version, no network, a version that does not
            fit the others.
    """
    with tempfile.TemporaryDirectory(prefix="care-deploy-with-") as temporary:
        folder = Path(temporary)
        python = _make(folder / "environment")
        constraints = folder / "constraints.txt"
        constraints.write_text(_constraints(wanted), encoding="utf-8")
        asked = [f"{name}=={version}" for name, version in wanted.items()]
        # Wheels alone: to build one takes tools, and long, and comes out as something of its own.
        options = ["--no-input", "--disable-pip-version-check", "--only-binary", ":all:"]
        install = ["-m", "pip", "install", *options, "--constraint", str(constraints)]
        command = [str(python), *install, *asked]
        done = run_in(command)
        if done.returncode:
            why = _why(f"{done.stderr}\n{done.stdout}")  # a conflict's causes stand in its output
            raise UnavailableError(f"cannot install {', '.join(asked)}: {why}")
        yield python


def run_in(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run an interpreter of another environment to its end, without this one's `PYTHONPATH`.

    What that names would stand before the other environment's own packages.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, check=False
    )


def _make(folder: Path) -> Path:
    """A virtual environment that finds its own packages first, and then those of this process."""
    has_pip = "pip" in _installed()  # to look for the module itself would wake setuptools' hooks
    try:
        venv.create(folder, with_pip=not has_pip, symlinks=os.name != "nt")
    except (subprocess.CalledProcessError, OSError) as error:
        raise UnavailableError(
            f"cannot make an environment in {folder}: {error}; give that of an interpreter with "
            "--python instead"
        ) from error
    scheme = {"base": str(folder), "platbase": str(folder)}
    lines = "".join(_below(entry) for entry in sys.path if entry)
    Path(sysconfig.get_path("purelib", "venv", scheme), _LAYER).write_text(lines, encoding="utf-8")
    return Path(
        sysconfig.get_path("scripts", "venv", scheme),
        "python.exe" if os.name == "nt" else "python",
    )


def _below(entry: str) -> str:
    """A line of a .pth file that puts an entry of `sys.path` below the environment's own.

    Folders of packages as `site` does it, so that what their own .pth files add is found, too.
    Other folders, such as the working directory, may hold checkpoints that are called .pth.
    """
    of_packages = entry in (*site.getsitepackages(), site.getusersitepackages())
    how = "import site; site.addsitedir" if of_packages else "import sys; sys.path.append"
    return f"{how}({entry!a})\n"


def _constraints(wanted: Mapping[str, str]) -> str:
    """Versions of all that is installed, but for what is asked."""
    kept = {name: version for name, version in _installed().items() if name not in wanted}
    return "".join(f"{name}=={version}\n" for name, version in sorted(kept.items()))


def _installed() -> dict[str, str]:
    """Versions of installed packages, by normalized name; the first that Python would find."""
    found: dict[str, str] = {}
    for each in importlib.metadata.distributions():
        name, version = each.metadata["Name"], each.metadata["Version"]
        if name and version and PINNED.fullmatch(f"{name}=={version}"):
            found.setdefault(_normalized(name), version)
    return found


def _normalized(name: str) -> str:
    """A package's name as the index has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _why(said: str) -> str:
    """What is wrong and what to do, of all that pip says."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if conflict := _conflict(lines):
        return (
            f"it does not fit what is installed beside it: {conflict}; give --with for those "
            "packages, too, or prepare an environment and give its interpreter with --python"
        )
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    told = errors[0] if errors else (lines or ["pip said nothing"])[-1]
    if match := _VERSIONS.search(told):
        return f"the index has no wheel of it for this Python and machine; {_there_are(match[1])}"
    return printable(told)[:_MOST_TOLD]


def _there_are(listed: str) -> str:
    """The newest of the versions that pip lists, the oldest first."""
    if listed == "none":
        return "it has none at all: is there a network, and is the name right?"
    return f"it has {printable(', '.join(listed.split(', ')[-_MOST_VERSIONS:]))}"


def _conflict(lines: Sequence[str]) -> str:
    """What pip says of versions that exclude each other; "" if it was something else."""
    begin = "The conflict is caused by:"
    if begin not in lines:
        return ""
    causes = []
    for line in lines[lines.index(begin) + 1 :]:
        if line.startswith("To fix this"):
            break
        causes.append(line.replace("The user requested (constraint)", "here is"))
    return printable("; ".join(causes))[:_MOST_TOLD]
