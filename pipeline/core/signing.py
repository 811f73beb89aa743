"""Signatures of files by ed25519, with keys that the user makes and keeps.

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub

A signature is the 64 bytes that the algorithm defines, so that OpenSSL verifies it as well:

    openssl pkeyutl -verify -pubin -inkey key.pub -rawin -in SHA256SUMS -sigfile SHA256SUMS.sig

The library is `cryptography`, an extra of this package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtifactError, InputError, UnavailableError
from pipeline.core.inputs import read_input

INSTALL = "pip install 'care-deploy[sign]'"
LENGTH = 64
"""Bytes of a signature."""

_MOST_OF_KEY = 100_000
_MAKE = "make one with: openssl genpkey -algorithm ed25519 -out key.pem"
_MAKE_PUBLIC = "make it with: openssl pkey -in key.pem -pubout -out key.pub"


class Signer:
    """Signs with a private key.

    Args:
        path: The key, PEM, without a passphrase.

    Raises:
        InputError: It is no such key.
        UnavailableError: The library is not installed.
    """

    def __init__(self, path: Path) -> None:
        serialization = _serialization()
        data = read_input(path, _MOST_OF_KEY, InputError, _MAKE)
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except TypeError as error:
            raise InputError(
                f"{path} has a passphrase: decrypt it first, openssl pkey -in {path} -out key.pem"
            ) from error
        except ValueError as error:
            raise InputError(f"{path} is no private key in PEM: {_MAKE}") from error
        _require_ed25519(key, path, _MAKE)
        self._key: Any = key
        self.fingerprint = _fingerprint(key.public_key())

    def sign(self, data: bytes) -> bytes:
        """The signature of some data, 64 bytes."""
        signature: bytes = self._key.sign(data)
        return signature


class Verifier:
    """Verifies with a public key.

    Args:
        path: The key, PEM.

    Raises:
        InputError: It is no such key.
        UnavailableError: The library is not installed.
    """

    def __init__(self, path: Path) -> None:
        serialization = _serialization()
        data = read_input(path, _MOST_OF_KEY, InputError, _MAKE_PUBLIC)
        try:
            key = serialization.load_pem_public_key(data)
        except ValueError as error:
            raise InputError(f"{path} is no public key in PEM: {_MAKE_PUBLIC}") from error
        _require_ed25519(key, path, _MAKE_PUBLIC)
        self.path = path
        self._key: Any = key
        self.fingerprint = _fingerprint(key)

    def require(self, data: bytes, signature: bytes, what: str) -> None:
        """Refuse data that the key's owner did not sign.

        Args:
            data: The data.
            signature: The signature.
            what: What is signed, for the message.

        Raises:
            ArtifactError: The signature is of other data, or by another key.
        """
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.verify(signature, data)
        except InvalidSignature as error:
            raise ArtifactError(
                f"{what} is not signed by the owner of {self.path}: changed since, or signed with "
                "another key"
            ) from error


def _serialization() -> Any:
    """The library's module that reads keys."""
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise UnavailableError(
            f"signatures need the package cryptography, which is not installed: {INSTALL}"
        ) from error
    return serialization


def _require_ed25519(key: object, path: Path, advice: str) -> None:
    from cryptography.hazmat.primitives.asymmetric import ed25519

    if not isinstance(key, (ed25519.Ed25519PrivateKey, ed25519.Ed25519PublicKey)):
        raise InputError(f"{path} is a key of another kind than ed25519: {advice}")


def _fingerprint(public: Any) -> str:
    """SHA-256 of the public key, as people compare it; its first 16 characters."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]
