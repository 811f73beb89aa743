"""Whatever byte of a sealed text changes, reading it says so."""

from __future__ import annotations

import hashlib
import json

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.seals import sealed, unsealed

VALUES = {"format": 2, "facts": {"top1": 0.9273, "state": "measured", "ä": None}, "files": {}}


def test_what_was_sealed_is_read_back() -> None:
    text = sealed(VALUES)
    values, seal = unsealed(text.encode(), "x")
    assert values == VALUES
    assert json.loads(text) == {**VALUES, "seal": seal}
    assert seal == hashlib.sha256((json.dumps(VALUES, indent=1) + "\n").encode()).hexdigest()


def test_equal_values_have_equal_seals() -> None:
    seals = {unsealed(sealed(v).encode(), "x")[1] for v in (VALUES, dict(VALUES), {"format": 2})}
    assert len(seals) == 2


@pytest.mark.parametrize("bits", [1, 0x20, 0x80])
def test_every_changed_byte_is_found(bits: int) -> None:
    whole = sealed(VALUES).encode()
    passed = []
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= bits
        try:
            _, seal = unsealed(bytes(changed), "x")
        except ArtifactError:
            continue
        if seal:
            passed.append(place)
    assert passed == []


@pytest.mark.parametrize("length", [0, 1, 50, -1, -2, -60, -90])
def test_what_is_cut_short_has_no_seal(length: int) -> None:
    with pytest.raises(ArtifactError, match="x is damaged"):
        unsealed(sealed(VALUES).encode()[:length], "x")


@pytest.mark.parametrize("more", [b"\n", b" ", b"x", b"\0"])
def test_what_is_longer_is_refused(more: bytes) -> None:
    with pytest.raises(ArtifactError, match="x is damaged"):
        unsealed(sealed(VALUES).encode() + more, "x")


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", "[" * 100_000, '{"seal": 1}', "\ud800".encode("utf-8", "replace")]
)
def test_what_is_no_object_is_refused(text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(ArtifactError, match="x is damaged"):
        unsealed(data, "x")


def test_what_has_no_seal_is_told_apart() -> None:
    assert unsealed(json.dumps(VALUES, indent=1).encode(), "x") == (VALUES, "")


def test_a_seal_of_other_values_does_not_fit() -> None:
    _, other = unsealed(sealed({"format": 3}).encode(), "x")
    _, own = unsealed(sealed(VALUES).encode(), "x")
    with pytest.raises(ArtifactError, match="x has changed since it was written"):
        unsealed(sealed(VALUES).replace(own, other).encode(), "x")
