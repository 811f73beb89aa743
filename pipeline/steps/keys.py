"""What decides a result beside its inputs: versions of tools, and this project's own code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import ArtifactError
from pipeline.core.files import digest_of, file_hash

if TYPE_CHECKING:
    pass


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of packages, without importing them; "missing" where there is none."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def code_hash(*modules: str) -> str:
    """Hash of the sources of modules of this project, found without importing them.

    A package counts with all modules in it.
    """
    hashes: dict[str, str] = {}
    for module in modules:
        package, _, rest = module.partition(".")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ArtifactError(f"the package {package} is not installed completely")
        path = Path(spec.submodule_search_locations[0], *rest.split("."))
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        hashes |= {f"{module}/{file.name}": file_hash(file) for file in files}
    return digest_of(hashes)
