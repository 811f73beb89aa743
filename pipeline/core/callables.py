"""Callables that the user names as "package.module:callable": where they lie, and they themselves.

Finding one runs nothing of its module; importing it does.

A module is looked for where Python looks, and then in the working directory, so that a file there
stands for no library.
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from pipeline.core.errors import ModelError
from pipeline.core.words import in_short, nearest

NAMED = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""How a callable is named."""


@dataclass(frozen=True)
class Located:
    """Where a module of the user's lies.

    Attributes:
        module: Its full name.
        folder: The folder in which its outermost package, or it itself, lies.
        packages: Names of what lies there and may be imported by it: its own package alone where
            that is installed among others.
    """

    module: str
    folder: Path
    packages: tuple[str, ...]


def locate(stated: str) -> Located:
    """Find a module, without importing it or the packages around it.

    Args:
        stated: "package.module:callable".

    Raises:
        ModelError: There is no such module, or it is no Python source.
    """
    module, _ = split(stated)
    first, *_ = module.split(".")
    path: list[str] | None = [*sys.path, str(Path.cwd())]
    origin = None
    for count in range(1, module.count(".") + 2):
        name = ".".join(module.split(".")[:count])
        spec = None if path is None else PathFinder.find_spec(name, path)
        if spec is None:
            raise ModelError(
                f"there is no module {name}: run in the folder in which {first} lies, or install it"
            )
        path = (
            None if spec.submodule_search_locations is None else [*spec.submodule_search_locations]
        )
        origin = spec.origin
    if origin is None or not origin.endswith(".py"):
        raise ModelError(f"{module} is no Python source: name a module, such as {module}.nets")
    # One folder up for each package around the module; one more out of its own.
    levels = module.count(".") + (Path(origin).stem == "__init__")
    folder = Path(origin).parents[levels]
    if _is_shared(folder):
        return Located(module, folder, (first,))
    return Located(module, folder, tuple(sorted({first, *_packages(folder)})))


def imported(stated: str) -> Callable[..., Any]:
    """Import a callable; that runs its module.

    The working directory comes last, so that nothing in it stands for a library.

    Args:
        stated: "package.module:callable".

    Raises:
        ModelError: It is not there, cannot be imported, or cannot be called.
    """
    module, attribute = split(stated)
    locate(stated)
    sys.path.append(str(Path.cwd()))
    try:
        holder = importlib.import_module(module)
    except Exception as error:  # somebody's own code
        raise ModelError(f"{module} cannot be imported: {in_short(error)}") from error
    finally:
        sys.path.pop()
    return _attribute(holder, module, attribute)


def _attribute(holder: Any, module: str, attribute: str) -> Callable[..., Any]:
    found = getattr(holder, attribute, None)
    if found is None:
        hint = nearest(attribute, [name for name in vars(holder) if not name.startswith("_")])
        raise ModelError(f"{module} has no {attribute}{hint}")
    if not callable(found):
        raise ModelError(
            f"{module}:{attribute} is a {type(found).__name__}, which cannot be called"
        )
    return found  # type: ignore[no-any-return]


def split(stated: str) -> tuple[str, str]:
    """Module and name of a callable.

    Raises:
        ModelError: The text names none.
    """
    module, colon, attribute = stated.partition(":")
    names = [*module.split("."), attribute]
    if not colon or not all(name.isidentifier() for name in names):
        raise ModelError(f"{stated!r} names no callable: write package.module:callable")
    return module, attribute


def _packages(folder: Path) -> list[str]:
    """Top-level modules and packages of a folder."""
    modules = [path.stem for path in folder.glob("*.py")]
    return [*modules, *(path.parent.name for path in folder.glob("*/__init__.py"))]


def _is_shared(folder: Path) -> bool:
    """Whether packages of all kinds lie side by side there."""
    libraries = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib", "stdlib")}
    return folder in libraries or folder.name in ("site-packages", "dist-packages")
