from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.errors import DataError
from pipeline.core.labels import distinct, imagenet_labels, read_labels, require_distinct


def labels(folder: Path, text: str) -> Path:
    path = folder / "labels.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_class_a_line_with_a_name_after_a_tab(tmp_path: Path) -> None:
    path = labels(tmp_path, "n01\tHöhe\n\nn02\tfish\tbig fish\n  n03  \n")
    assert read_labels(path) == (("n01", "n02", "n03"), ("Höhe", "big fish", "n03"))


def test_names_that_several_classes_have_get_the_identifier(tmp_path: Path) -> None:
    path = labels(tmp_path, "n01\tcrane\nn02\tcrane\nn03\tfish\n")
    assert read_labels(path)[1] == ("crane (n01)", "crane (n02)", "fish")
    # A name may already be what another one would become.
    assert distinct(("a", "b", "c"), ("x", "x", "x (a)")) == ("a", "b", "c")


def test_imagenet_has_a_thousand_names() -> None:
    identifiers, names = imagenet_labels()
    assert len(set(identifiers)) == len(set(names)) == 1000
    assert names[identifiers.index("n02012849")] == "crane (n02012849)"
    assert names[identifiers.index("n01440764")] == "tench"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant\nbee\nant\n", r"labels\.txt:3: the class 'ant' stands in line 1, too"),
        ("ant\tx\nant\ty\n", r"labels\.txt:2: the class 'ant' stands in line 1"),
        ("ant\nb\x1b[2J\n", r"labels\.txt:2: the class .* control character '.x1b'"),
        ("ant\nb\u202e\n", r"labels\.txt:2: the class .* control character"),
        ("a\tb\0\n", r"labels\.txt:1: .*control character"),
        ("\n \n", "names no class"),
    ],
)
def test_what_names_no_classes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(labels(tmp_path, text))


def test_what_is_no_file_of_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a device or a pipe"):
        read_labels(Path("/dev/zero"))
    (tmp_path / "x").write_bytes(b"ant\n\xff\n")
    with pytest.raises(DataError, match="x:2: it is not UTF-8 text"):
        read_labels(tmp_path / "x")


def test_classes_of_a_dataset() -> None:
    require_distinct(("cat", "Höhe", "Xenopus mülleri"), "d")
    for name in ("\x1b[2J", "", " ", "\udc80", "a\u2028b", "a\u2029b", *"\u202a\u202e\u2066\u2069"):
        with pytest.raises(DataError, match="d: the class"):
            require_distinct(("cat", name), "d")
    with pytest.raises(DataError, match="the class 'cat' is named twice"):
        require_distinct(("cat", "dog", "cat"), "d")
