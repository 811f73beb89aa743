"""Signatures with keys as OpenSSL writes them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.core.errors import ArtifactError, InputError, UnavailableError
from pipeline.core.signing import LENGTH, Signer, Verifier

PRIVATE = """\
-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC
-----END PRIVATE KEY-----
"""
"""The key of RFC 8410, section 10.3."""

PUBLIC = """\
-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PUBLIC KEY-----
"""


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_text(PRIVATE)
    public.write_text(PUBLIC)
    return private, public


def test_what_the_key_signed_is_accepted_and_nothing_else(keys: tuple[Path, Path]) -> None:
    pytest.importorskip("cryptography")
    signer, verifier = Signer(keys[0]), Verifier(keys[1])
    signature = signer.sign(b"sums")
    assert len(signature) == LENGTH
    assert signer.fingerprint == verifier.fingerprint
    verifier.require(b"sums", signature, "it")
    for data, other in ((b"Sums", signature), (b"sums", bytes(LENGTH)), (b"sums", b"")):
        with pytest.raises(ArtifactError, match="it is not signed by the owner of"):
            verifier.require(data, other, "it")


def test_signatures_are_the_same_each_time(keys: tuple[Path, Path]) -> None:
    pytest.importorskip("cryptography")
    assert Signer(keys[0]).sign(b"x") == Signer(keys[0]).sign(b"x")


def test_what_is_no_key_is_refused(keys: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    with pytest.raises(InputError, match=r"is no private key in PEM: make one with: openssl"):
        Signer(keys[1])
    with pytest.raises(InputError, match=r"is no public key in PEM: make it with: openssl"):
        Verifier(keys[0])
    with pytest.raises(InputError, match="does not exist: make one with"):
        Signer(tmp_path / "none.pem")
    other = ec.generate_private_key(ec.SECP256R1())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = tmp_path / "ec.pem"
    path.write_bytes(other.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    with pytest.raises(InputError, match="is a key of another kind than ed25519"):
        Signer(path)
    locked = serialization.BestAvailableEncryption(b"secret")
    path.write_bytes(other.private_bytes(pem, pkcs8, locked))
    with pytest.raises(InputError, match="has a passphrase: decrypt it first"):
        Signer(path)


@pytest.mark.parametrize("kind", [Signer, Verifier])
def test_without_the_library_it_says_how_to_get_it(
    kind: type[Signer | Verifier], keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(UnavailableError, match=r"pip install 'care-deploy\[sign\]'"):
        kind(keys[0])
