"""The wheel carries all that the installed programs read: templates, data, configurations."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("care", "pipeline", "calibration")
BUILT_FROM = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "pipeline.yaml", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, *BUILT_FROM):
        copied, source = folder / "source" / name, ROOT / name
        copied.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copied)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    command = [sys.executable, "-c", build]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_a_package_is_in_the_wheel(wheel: zipfile.ZipFile, package: str) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files - set(wheel.namelist()) == set()


def test_configurations_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    expected = {"pipeline.yaml", *(f"configs/{path.name}" for path in ROOT.glob("configs/*.yaml"))}
    there = {name.partition("/share/care-deploy/")[2] for name in wheel.namelist()}
    assert expected <= there
