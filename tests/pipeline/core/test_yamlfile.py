from __future__ import annotations

import os
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


# Kinds of odd files that once ended in a traceback, or never.


@pytest.mark.parametrize(
    "value", ["a: b", "[", "2025-02-30", "@x", "%x", "*x", "run #3", "x\ny", "5"]
)
def test_what_a_variable_holds_is_text(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, "a: ${A}\nb: '${A}'\n")
    document = yamlfile.read(path, {"A": value})
    assert document.values == {"a": value, "b": value}
    assert document.filled == {("a",), ("b",)}


def test_a_variable_that_is_overwritten_is_not_filled_in(tmp_path: Path) -> None:
    write(tmp_path, "a: ${A}\nb: ${A}\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\na: 1\n")
    document = yamlfile.read(path, {"A": "x"})
    assert document.values == {"a": 1, "b": "x"}
    assert document.filled == {("b",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!int abc", "'abc' is no whole number"),
        ("!!int ''", "is no whole number"),
        ("!!float x", "'x' is no number"),
        ("!!bool maybe", "'maybe' is neither true nor false"),
        ("!!timestamp abc", "the tag !!timestamp is not known"),
        ("!!binary YQ==", "the tag !!binary is not known"),
        ("!!set {a: null}", "the tag !!set is not known"),
        ("!!omap [a: 1]", "the tag !!omap is not known"),
        ("!own x", "the tag !own is not known"),
        ("!!python/tuple [1]", "the tag !!python/tuple is not known"),
        ("9" * 30, "too large a number"),
        ("9" * 5000, "is no whole number"),
        ("0x" + "f" * 5000, "too large a number"),
        (".nan", "is no number that can be used"),
        ("1.0e+999", "is no number that can be used"),
        ('"\\0"', "control character '.x00'"),
        ('"\\e[2J"', "control character '.x1b'"),
        ('"\\ud800"', "control character '.ud800'"),
        ("x" * 10_001, "longer than 10000 characters"),
    ],
)
def test_scalars_that_are_no_values(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        yamlfile.read(write(tmp_path, f"a: 1\nb: {text}\n"))
    assert str(caught.value).startswith(f"{tmp_path / 'a.yaml'}:2: ")
    assert "\n" not in str(caught.value)


def test_a_date_is_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a: 2025-02-30\nb: 2025-02-03\nc: '='\nd: =\n")
    assert yamlfile.read(path).values == {"a": "2025-02-30", "b": "2025-02-03", "c": "=", "d": "="}


def test_merges_take_over_and_the_first_wins(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*a, *b], z: 3}\nd: {<<: *a}\n"
    document = yamlfile.read(write(tmp_path, text))
    assert document.values["c"] == {"x": 1, "y": 1, "z": 3}
    assert document.values["d"] == {"x": 1, "y": 1}
    assert document.place(("c", "z")).line == 3


BOMB = "a0: &a0 [1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}'])}]\n" for n in range(1, 11)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]\n", ":1: this value holds itself"),
        ("a: &a {b: *a}\n", ":1: this value holds itself"),
        ("a: &a\n  <<: *a\n", "this value holds itself"),
        (BOMB, "with its aliases it holds more than 10000 values"),
        (
            BOMB.replace("[*", "{<<: [*").replace("]\n", "]}\n").replace("[1]}", "{}"),
            "more than 10000",
        ),
        ("a:\n  <<: 5\n", ":2: << takes over a mapping"),
        ("a:\n  <<: [{b: 1}, 2]\n", ":2: << takes over a mapping"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a\n", ":4: << stands here twice"),
        ("a: " + 60 * "[" + 60 * "]", "nested deeper than 50 levels"),
        ("a: " + 5000 * "[" + 5000 * "]", "nested deeper than 50 levels"),
        ("".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 99)), "no valid YAML: found undef"),
        (
            "a0: &a0 1\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 99)),
            "nested deeper",
        ),
        ("a: [" + 30_000 * "1, " + "]", "holds more than 10000 values"),
        ("#" + 1_000_000 * " ", "is larger than 1 MB"),
        ("? [a]\n: 1\n", ":1: a key is a word"),
        ('"\\e": 1\n', ":1: .*control character"),
    ],
)
def test_what_would_never_end_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        yamlfile.read(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_decoded_says_where(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("a: 1\nb: Höhe\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.yaml:2: it is not UTF-8 text"):
        yamlfile.read(path)
    path.write_bytes(b"a: 1\nb: \0\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:2: no valid YAML: the character"):
        yamlfile.read(path)
    path.write_bytes("\ufeffa: 1\n".encode())
    assert yamlfile.read(path).values == {"a": 1}


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("/dev/zero", "is a device or a pipe"),
        ("pipe", "is a device or a pipe"),
        ("loop", "cannot read"),
        ("x" * 300, "has a name of 300 bytes"),
        (".", "is a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            yamlfile.read(tmp_path / name)
        with pytest.raises(ConfigError, match=r"a\.yaml:1: extends: .* does not end in \.yaml"):
            yamlfile.read(write(tmp_path, f"extends: {name}\n"))
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name, message in (
        ("pipe.yaml", "is a device or a pipe"),
        ("folder.yaml", "is a folder"),
        ("loop.yaml", "cannot read"),
        (f"{'x' * 300}.yaml", "has a name of 305 bytes"),
    ):
        with pytest.raises(ConfigError, match=rf"a\.yaml:1: extends: .*{message}"):
            yamlfile.read(write(tmp_path, f"extends: {name}\n"))
    with pytest.raises(ConfigError, match="is no path"):
        yamlfile.read(Path("a\0b"))


def test_a_chain_of_extends_has_an_end(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path, f"extends: {number + 1}.yaml\n", f"{number}.yaml")
    write(tmp_path, "a: 1\n", "30.yaml")
    assert yamlfile.read(tmp_path / "20.yaml").values == {"a": 1}
    with pytest.raises(ConfigError, match="the end of more than 16 extends"):
        yamlfile.read(tmp_path / "0.yaml")


def test_a_single_value_is_read_with_the_same_limits() -> None:
    assert yamlfile.value_of("[1, '${A}']", "--option") == [1, "${A}"]
    assert yamlfile.value_of("", "--option") is None
    with pytest.raises(ConfigError, match="--option:1: 'x' is no whole number"):
        yamlfile.value_of("!!int x", "--option")
    assert [yamlfile.plain(text) for text in ("5", "1.5", "true", "x", "[1]", "[")] == [
        *(5, 1.5, True, "x", "[1]", "["),
    ]


@pytest.mark.parametrize(
    "content", ["root:$6$SECRET:19000:0:::\n", "password: SECRET\n", "a: *SECRET\n", "!!int SECRET"]
)
@pytest.mark.parametrize("link", [None, "hosts.yaml", "hosts.yml"])
def test_a_file_that_is_no_configuration_is_not_quoted(
    tmp_path: Path, content: str, link: str | None
) -> None:
    (tmp_path / "shadow").write_text(content)
    if link:
        (tmp_path / link).symlink_to("shadow")
    with pytest.raises(ConfigError, match=r"a\.yaml:1: extends: .*shadow does not end") as caught:
        yamlfile.read(write(tmp_path, f"extends: {link or 'shadow'}\n"))
    assert "SECRET" not in str(caught.value)
