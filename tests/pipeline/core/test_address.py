from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.address import parse
from pipeline.core.errors import InputError, StoreError

SECRETS = "s3://AKIA123:s%2Fecret@bucket/care?token=abcd%2Fef&region=eu-west-1"


def test_what_is_shown_holds_no_secret() -> None:
    address = parse(SECRETS, {"endpoint": "http://user:hidden@x", "client": {"key": "deepkey"}})
    assert address.shown == "s3://bucket/care"
    assert address.options["token"] == "abcd/ef"
    assert "AKIA" not in repr(address)
    said = "login AKIA123 s/ecret s%2Fecret abcd/ef abcd%2Fef http://user:hidden@x deepkey failed"
    assert address.clean(OSError(said)) == f"OSError: login {' '.join(['***'] * 7)} failed"


def test_a_short_secret_lets_no_driver_be_quoted() -> None:
    assert parse("s3://me:abc@bucket/x").clean(OSError("abc")) == "OSError"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s4://key:topsecret@bucket/x", "known are file, memory, s3"),
        ("https://topsecret@host/x", "of this kind"),
        ("s3://", "names no place"),
        ("s3://topsecret@", "names no place"),
        ("s3://[topsecret/x", "this is no address"),
        ("simplecache::s3://topsecret/x", "of this kind"),
        ("a\0b", "this"),
    ],
)
def test_no_address(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(text)
    assert "topsecret" not in str(caught.value)


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("shared").shown == parse(f"file://{tmp_path}/shared").shown
    files, root = parse("shared").open()
    assert root == str(tmp_path / "shared")
    assert not files.exists(root)


def test_a_missing_driver_is_named() -> None:
    with pytest.raises(StoreError, match=r"pip install 'care-deploy\[gs\]'"):
        parse("gs://bucket/x").open()
