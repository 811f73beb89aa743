from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core import yamlfile
from pipeline.core.errors import ConfigError


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_values_and_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a: 1\nb:\n  c: [x, 2.5]\n  d: true\n")
    document = yamlfile.read(path)
    assert document.values == {"a": 1, "b": {"c": ["x", 2.5], "d": True}}
    assert document.place(("b", "d")).line == 4
    assert document.place(("b", "c", 1)).line == 3
    # What is not written is looked for around where it would be.
    assert str(document.place(("b", "missing"))) == f"{path}:2"


def test_environment(tmp_path: Path) -> None:
    path = write(tmp_path, "a: ${A}\nb: ${B:-8}\nc: in-${A}-${B:-x}\nd: ${E:-}\n")
    values = yamlfile.read(path, {"A": "5"}).values
    assert values == {"a": "5", "b": "8", "c": "in-5-x", "d": None}
    with pytest.raises(ConfigError, match=r"a\.yaml:1: the environment variable A is not set"):
        yamlfile.read(path, {})


def test_extends_merges_mappings_and_remembers_the_file(tmp_path: Path) -> None:
    base = write(tmp_path, "a: 1\nb: {c: 1, d: [1, 2]}\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\nb: {d: [3]}\ne: 4\n")
    document = yamlfile.read(path)
    assert document.values == {"a": 1, "b": {"c": 1, "d": [3]}, "e": 4}
    assert document.place(("b", "c")).file == base
    assert document.place(("b", "d")).file == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- 1\n", "a mapping of keys"),
        ("a: [1\n", r"a\.yaml:2: no valid YAML"),
        ("a: 1\na: 2\n", r"a\.yaml:2: a stands here twice"),
        ("extends: a.yaml\n", "extends itself"),
        ("extends: [x]\n", "extends names one file"),
        ("extends: other.yaml\n", r"other\.yaml does not exist"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        yamlfile.read(write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        yamlfile.read(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        yamlfile.read(tmp_path)
    path = tmp_path / "b.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        yamlfile.read(path)
