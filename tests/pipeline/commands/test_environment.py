from __future__ import annotations

import importlib.metadata
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import filelock
import pytest

from pipeline.commands.environment import changed, pinned, run_in
from pipeline.core.errors import InputError, UnavailableError


def wheel(folder: Path, name: str, version: str, code: str, *requires: str) -> Path:
    """A wheel of one package, for an index that is a folder."""
    title = name.replace("-", "_")
    info = f"{title}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
    files = {
        f"{title}/__init__.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    folder.mkdir(exist_ok=True)
    place = folder / f"{title}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(place, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return place


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


@pytest.mark.parametrize(
    ("requirements", "told"),
    [
        (["filelock"], "write PACKAGE==VERSION"),
        (["filelock>=3"], "write PACKAGE==VERSION"),
        (["--index-url=x==1"], "write PACKAGE==VERSION"),
        (["file-lok==3"], "did you mean filelock"),
        (["filelock==98", "FileLock==99"], "two versions of filelock"),
        ([f"filelock=={importlib.metadata.version('filelock')}"], "name another one"),
    ],
)
def test_what_says_no_other_version_is_refused(requirements: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        pinned(requirements)


def test_names_are_those_of_the_index() -> None:
    assert pinned(["PyYAML==99.1", "pydantic_core==98"]) == {
        "pyyaml": "99.1",
        "pydantic-core": "98",
    }


def test_only_what_was_asked_is_other(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(index, "filelock", "99.1", "STAND_IN = True")
    here = importlib.metadata.version("filelock")
    monkeypatch.setenv("PYTHONPATH", str(Path(filelock.__file__).parents[1]))  # the old one's
    # Where something loaded distutils before, setuptools warns whoever looks for the module pip.
    monkeypatch.setitem(sys.modules, "distutils", ModuleType("distutils"))
    code = (
        "import importlib.metadata as m, json, filelock, pipeline, click\n"
        "print(json.dumps([m.version('filelock'), filelock.STAND_IN, pipeline.__file__, "
        "m.version('click')]))"
    )
    with changed({"filelock": "99.1"}) as python:
        done = run_in([str(python), "-P", "-c", code])
        folder = python.parents[2]
    assert done.returncode == 0, done.stderr
    version, stand_in, ours, click = json.loads(done.stdout)
    assert (version, stand_in) == ("99.1", True)
    assert click == importlib.metadata.version("click")
    assert Path(ours) == Path(__file__).parents[3] / "pipeline" / "__init__.py"
    assert not folder.exists()
    assert importlib.metadata.version("filelock") == here


def test_checkpoints_in_the_working_directory_are_no_pth_files_of_pythons(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those Python runs the lines; `python -m` puts the working directory among the paths."""
    wheel(index, "filelock", "99.1", "STAND_IN = True")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "network.pth").write_bytes(b"PK\x03\x04\x80\x81 a checkpoint")
    touched = f"import pathlib; pathlib.Path({str(folder)!r}, 'x').touch()"
    (folder / "notes.pth").write_text(touched)
    (folder / "own_net.py").write_text("FOUND = 1\n")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    with changed({"filelock": "99.1"}) as python:
        done = run_in([str(python), "-P", "-c", "import own_net, filelock, click, pipeline"])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not (folder / "x").exists()


def test_a_version_that_is_not_there_is_told_with_those_that_are(index: Path) -> None:
    wheel(index, "filelock", "98.0", "")
    told = r"filelock==99\.1: .*no wheel.*it has 98\.0$"
    with pytest.raises(UnavailableError, match=told), changed({"filelock": "99.1"}):
        pass


def test_no_index_is_told(index: Path) -> None:
    told = "none at all: is there a network"
    with pytest.raises(UnavailableError, match=told), changed({"filelock": "99.1"}):
        pass


def test_a_version_that_does_not_fit_the_others_is_told(index: Path) -> None:
    wheel(index, "filelock", "99.1", "", "click>=99")
    wheel(index, "click", "99.2", "")
    here = importlib.metadata.version("click")
    with pytest.raises(UnavailableError) as error, changed({"filelock": "99.1"}):
        pass
    assert "filelock 99.1 depends on click>=99" in str(error.value)
    assert f"here is click=={here}" in str(error.value)
    with changed({"filelock": "99.1", "click": "99.2"}) as python:
        code = "import importlib.metadata as m; print(m.version('click'))"
        assert run_in([str(python), "-c", code]).stdout.strip() == "99.2"
