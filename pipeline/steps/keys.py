"""What decides a result beside its inputs: versions of tools, and this project's own code.

The code is computed: all modules that a step's own modules import, directly or not, inside of
functions too. Nobody has to list them, so no list can be wrong.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.callables import locate
from pipeline.core.errors import ArtifactError
from pipeline.core.files import write_atomically
from pipeline.core.plain import read_json

PROJECT = Path(__file__).parents[2]
"""Where the packages of this project lie."""

OWN = ("pipeline", "care", "calibration")
"""The packages of this project."""

CUT = (
    "pipeline.__main__",
    "pipeline.cli",
    "pipeline.commands",
    "pipeline.config",
    "pipeline.exports",
    "pipeline.report",
    "pipeline.scheduler",
    "pipeline.store",
    "pipeline.targets.registry",
)
"""What changes no result, although others import it. The values of the configuration are inputs of
the steps; through the registry every step would depend on every target."""

_CUT_BEGINNINGS = tuple(f"{name}." for name in CUT)

MISSING = "missing"
"""The version of a package that is not installed."""

_VERSION = "Version:"

MOST_REMEMBERED = 2000
"""Sources whose imports are remembered: those of some earlier versions too."""

Import = tuple[int, str, tuple[str, ...], str]
"""Level (0: absolute), module and names of `from ..module import names`, and the outermost function
or method that it stands in; "" if it stands in none."""

_DIGEST = 64
"""Digits of a SHA-256."""

_PARSED: dict[str, list[Import]] = {}
"""What a source imports, by its hash."""


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of packages, without importing them; `MISSING` where there is none."""
    return {package: _version(package) for package in packages}


@functools.cache
def _version(package: str) -> str:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING
    # Below the fields stands the package's whole README, which `distribution.version` parses too: a
    # plan asks a dozen packages, and that takes ten milliseconds.
    fields = (distribution.read_text("METADATA") or "").partition("\n\n")[0]
    stated = (line for line in fields.splitlines() if line.startswith(_VERSION))
    return next(stated, _VERSION).removeprefix(_VERSION).strip() or distribution.version


@dataclass(frozen=True)
class Module:
    """One of our modules.

    Attributes:
        title: Its file, below the folder of the packages.
        digest: SHA-256 of its source.
        imports: Full name of every one of our modules that it imports, but for what is cut out,
            and the function or method that does it; "" outside of these.
    """

    title: str
    digest: str
    imports: frozenset[tuple[str, str]]


class Code:
    """The modules of this project: what they import, and hashes of their content.

    A module is read once; what its source imports is known by its content, in this process and, by
    the file `cache`, between runs.

    Args:
        root: Where the packages lie.
        cache: Remembers the imports of sources between runs; None to remember nothing. No folder is
            made for it.
        own: The packages and modules there that count; what else is imported is a library.
    """

    def __init__(self, root: Path, cache: Path | None = None, own: Collection[str] = OWN) -> None:
        self.folders = dict.fromkeys(own, root)
        self.cache = cache
        self._files: dict[str, Path | None] = {}
        self._folders: dict[str, dict[str, Path]] = {}
        self._modules: dict[str, Module] = {}
        self._found: dict[tuple[object, ...], dict[str, str]] = {}
        remembered = {} if cache is None else _read_cache(cache)
        _PARSED.update(remembered)
        self._remembered = set(remembered)

    def hashes(
        self,
        roots: Sequence[str],
        *,
        registered: Collection[str] = frozenset(),
        aside: Collection[str] = frozenset(),
    ) -> dict[str, str]:
        """Hash of the roots and of every module that they import, directly or not.

        Packages count with their `__init__`, and with what that imports. Imports for type checkers
        do not count.

        Args:
            roots: Full names of modules.
            registered: Modules that the roots import only to make them known: an import by a root
                does not count.
            aside: Functions and methods of the roots whose imports do not count.

        Returns:
            SHA-256 by the file's name, such as "pipeline/core/network.py".

        Raises:
            ArtifactError: A root is no module.
        """
        # Steps of a kind ask for the same, and a run asks each of them more than once.
        asked = (tuple(roots), frozenset(registered), frozenset(aside))
        if asked not in self._found:
            self._found[asked] = self._closure(*asked)
        return dict(self._found[asked])

    def _closure(
        self, roots: Sequence[str], registered: Collection[str], aside: Collection[str]
    ) -> dict[str, str]:
        """See `hashes`."""
        for root in roots:
            self._admit(root)
        found: dict[str, str] = {}
        seen: set[str] = set()
        packages = [name for root in roots for name in _with_packages(root)]
        waiting = [name for name in packages if self._file(name)]
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            module = self._module(name)
            found[module.title] = module.digest
            waiting += [
                other
                for other, function in module.imports
                if name not in roots or not (other in registered or function in aside)
            ]
        self._remember()
        return dict(sorted(found.items()))

    def _admit(self, root: str) -> None:
        """Find a root; one of another package, such as somebody's own target, brings that in."""
        module = sys.modules.get(root)
        file = getattr(module, "__file__", None)
        if root.partition(".")[0] not in self.folders and file:
            self.folders[root.partition(".")[0]] = Path(file).parents[root.count(".")]
            self._files[root] = Path(file)
        if self._file(root) is None:
            raise ArtifactError(f"the module {root} is not installed completely")

    def _file(self, name: str) -> Path | None:
        """File of a module; None for libraries, and for what is something in a module."""
        if name not in self._files:
            self._files[name] = self._find(name)
        return self._files[name]

    def _find(self, name: str) -> Path | None:
        package = name.partition(".")[0]
        if package not in self.folders:
            return None
        above, _, last = name.rpartition(".")
        return self._listed(above, self.folders[package]).get(last)

    def _listed(self, package: str, root: Path) -> dict[str, Path]:
        """Files of the modules and packages in a package, by their names; read once.

        Hundreds of names are asked for that are no modules, but something in one: a path for each
        would take longer than all the rest.

        Args:
            package: Its full name; "" for the folder that packages lie in.
            root: That folder.
        """
        known = package or str(root)
        if known not in self._folders:
            folder = root.joinpath(*package.split("."))
            entries = list(folder.iterdir()) if folder.is_dir() else []
            inits = {entry.name: entry / "__init__.py" for entry in entries if not entry.suffix}
            packages = {name: file for name, file in inits.items() if file.is_file()}
            modules = {entry.stem: entry for entry in entries if entry.suffix == ".py"}
            self._folders[known] = {**packages, **modules}
        return self._folders[known]

    def _module(self, name: str) -> Module:
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> Module:
        file = self._file(name)
        assert file is not None, name
        source = file.read_bytes()
        digest = hashlib.sha256(source).hexdigest()
        if digest not in _PARSED:
            _PARSED[digest] = list(_imports(ast.parse(source, file)))
        imported = _imported(name, file.stem == "__init__", _PARSED[digest], self.folders)
        ours = frozenset(
            (other, function)
            for other, function in imported
            if self._file(other) and not _is_cut(other)
        )
        folder = self.folders[name.partition(".")[0]]
        return Module(file.relative_to(folder).as_posix(), digest, ours)

    def _remember(self) -> None:
        """Write down the imports of the sources: of those in use alone, once they are many."""
        used = {module.digest for module in self._modules.values()}
        if self.cache is None or used <= self._remembered or not self.cache.parent.is_dir():
            return
        kept = used | self._remembered
        if len(kept) > MOST_REMEMBERED:
            kept = used
        try:
            content = json.dumps({digest: _PARSED[digest] for digest in kept})
            write_atomically(self.cache, content, is_cache)
        except ArtifactError:
            self.cache = None  # read-only: each run parses them again
        self._remembered = kept


@functools.cache
def project() -> Code:
    """The code that runs, as it was when this process first asked."""
    return Code(PROJECT)


def is_cache(path: Path) -> bool:
    """Whether a file is one in which imports are remembered: by digests of sources, lists."""
    try:
        plain = read_json(path)
    except ArtifactError:
        return False
    return isinstance(plain, dict) and all(
        len(digest) == _DIGEST and isinstance(found, list) for digest, found in plain.items()
    )


def _read_cache(path: Path) -> dict[str, list[Import]]:
    try:
        plain = read_json(path)
        return {
            digest: [
                (int(level), str(module), tuple(names), str(function))
                for level, module, names, function in imports
            ]
            for digest, imports in plain.items()
        }
    except (ArtifactError, ArithmeticError, ValueError, TypeError, AttributeError):
        return {}  # none yet, or damaged


def _is_cut(name: str) -> bool:
    return f"{name}.".startswith(_CUT_BEGINNINGS)


def _with_packages(name: str) -> list[str]:
    """A module, and the packages around it: importing it runs them all."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _imported(
    name: str, is_package: bool, imports: Sequence[Import], own: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Full names of what a module imports of our packages, and where.

    Some name something in a module.
    """
    package = name.split(".") if is_package else name.split(".")[:-1]
    for level, module, names, function in imports:
        if not level and module.partition(".")[0] not in own:
            continue  # a library: most imports are of one
        base = package[: len(package) - level + 1] if level else []
        full = ".".join([*base, *([module] if module else [])])
        within = (f"{full}.{imported}" for imported in names)
        yield from ((each, function) for each in (*_with_packages(full), *within))


_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
"""Where statements hold others. No expression holds an import, and most of a source are these."""


def _imports(node: ast.AST, function: str = "") -> Iterator[Import]:
    """All imports of a source but those for type checkers."""
    if isinstance(node, ast.Import):
        yield from ((0, alias.name, (), function) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        names = tuple(alias.name for alias in node.names)
        yield node.level, node.module or "", names, function
    elif isinstance(node, ast.If) and _for_type_checkers(node.test):
        for other in node.orelse:
            yield from _imports(other, function)
    else:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = function or node.name
        for block in _BLOCKS:
            for inner in getattr(node, block, ()):
                yield from _imports(inner, function)


def _for_type_checkers(test: ast.expr) -> bool:
    if isinstance(test, ast.Attribute):
        return test.attr == "TYPE_CHECKING"
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def own_code(stated: str) -> dict[str, str]:
    """Hashes of a module of the user's and of what it imports of theirs; nothing is imported.

    Args:
        stated: "package.module:callable".

    Raises:
        ModelError: There is no such module, or it is no Python source.
    """
    place = locate(stated)
    return Code(place.folder, own=place.packages).hashes([place.module])
