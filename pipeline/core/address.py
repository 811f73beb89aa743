"""Where a store, or data, lies: an address for fsspec, of which nothing secret is ever shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from pipeline.core.errors import InputError, PipelineError, StoreError
from pipeline.core.inputs import expanded, why_no_path
from pipeline.core.words import in_short, nearest_or_all, printable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

EXTRAS = {
    "file": "",
    "memory": "",
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "abfs": "abfs",
    "abfss": "abfs",
    "az": "abfs",
    "sftp": "sftp",
}
"""Schemes of addresses, and the extra of this package that brings the driver; "" for none."""

SFTP = "sftp"
"""The scheme whose connection may end while nobody asks, which its driver does not notice."""

_ALIVE_S = 30
"""How often a connection that waits says so, in seconds: routers forget one that is silent."""

HIDDEN = "***"
_SHORTEST = 4
"""Secrets shorter than this cannot be told from other text: with one, no driver is quoted."""


@dataclass(frozen=True)
class Address:
    """A store's address, taken apart.

    Attributes:
        scheme: Such as "s3" or "file".
        url: What fsspec opens; with user and password, if it names them.
        shown: The same for people: without user, password and query.
        options: What the driver is told, such as keys.
        secrets: Text that no message may show.
    """

    scheme: str
    url: str = field(repr=False)
    shown: str
    options: Mapping[str, Any] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)

    @property
    def bare(self) -> str:
        """What another machine needs to find the place: no password, no query, no options.

        In front of the host stands a user, which is nobody else's business; with Azure the
        container does.
        """
        scheme, _, rest = self.url.partition("://")
        netloc, slash, path = rest.partition("/")
        user, at, host = netloc.rpartition("@")
        before = f"{user.partition(':')[0]}{at}" if EXTRAS[self.scheme] == "abfs" else ""
        return f"{scheme}://{before}{host}{slash}{path}"

    def clean(self, error: BaseException) -> str:
        """What a driver says, without secrets, in one line."""
        text = in_short(error)
        if any(len(secret) < _SHORTEST for secret in self.secrets):
            return type(error).__name__
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return printable(text)

    def open(
        self, what: str = "the store", kind: type[PipelineError] = StoreError
    ) -> tuple[AbstractFileSystem, str]:
        """The file system, and the place in it.

        Args:
            what: What lies there, for messages.
            kind: The error to raise.

        Raises:
            PipelineError: Of that kind: the driver is missing, or does not take the address.
        """
        import fsspec

        try:
            if self.scheme == SFTP:
                return _sftp(self.url, self.options)
            opened: tuple[AbstractFileSystem, str] = fsspec.url_to_fs(self.url, **self.options)
            return opened
        except ImportError:
            extra = EXTRAS[self.scheme]
            raise kind(
                f"{what} {self.shown} needs a driver: pip install 'care-deploy[{extra}]'"
            ) from None
        except Exception as error:
            # Drivers raise anything, and quote what they were told: only clean text leaves here.
            raise kind(f"cannot open {what} {self.shown}: {self.clean(error)}") from None


def parse(text: str, options: Mapping[str, Any] | None = None) -> Address:
    """Take an address apart.

    Args:
        text: A folder, or an address such as s3://bucket/care. What follows a question mark are
            options of the driver.
        options: Further options of the driver.

    Raises:
        InputError: No store can lie there; the message shows nothing of user, password or query.
    """
    scheme, colon, _ = text.partition("://")
    if not colon:
        return _folder(text, options or {})
    if scheme not in EXTRAS:
        hint = nearest_or_all(scheme, EXTRAS) if re.fullmatch(r"[a-z0-9]{1,10}", scheme) else ""
        raise InputError(f"no store has an address of this kind{hint}: name a folder or s3://…")
    try:
        parts = urlsplit(text)
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
    except ValueError:
        raise InputError("this is no address: write it like s3://bucket/folder") from None
    if scheme == "file":
        return _folder(parts.path, {**given, **(options or {})})
    user, _, host = parts.netloc.rpartition("@")
    if not (host + parts.path).strip("/"):
        raise InputError("this address names no place: write it like s3://bucket/folder")
    told = {**given, **(options or {})}
    return Address(
        scheme=scheme,
        url=f"{scheme}://{parts.netloc}{parts.path}",
        shown=printable(f"{scheme}://{host}{parts.path}"),
        options=told,
        secrets=_secrets(user, parts.query, told),
    )


def _sftp(url: str, options: Mapping[str, Any]) -> tuple[AbstractFileSystem, str]:
    """The driver that the extra brings, whichever others are installed, on a live connection."""
    from fsspec.implementations.sftp import SFTPFileSystem

    told = SFTPFileSystem._get_kwargs_from_urls(url)
    files = SFTPFileSystem(**{**told, **options})
    if not files.client.get_transport().is_active():
        files._connect()  # one that was opened before, and kept by fsspec
    files.client.get_transport().set_keepalive(_ALIVE_S)
    return files, SFTPFileSystem._strip_protocol(url)


def _folder(text: str, options: Mapping[str, Any]) -> Address:
    path = expanded(text)
    if problem := why_no_path(path):
        raise InputError(f"this {problem}")
    path = os.path.abspath(path)  # noqa: PTH100  a link stays what the user named
    return Address("file", f"file://{path}", printable(path), options, _secrets("", "", options))


def _secrets(user: str, query: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """All that may be secret, as it was written and as drivers may write it; longest first."""
    texts = [user, query, *user.split(":"), *_texts(options)]
    found = {form for text in texts if text for form in (text, unquote(text), quote(text, safe=""))}
    return tuple(sorted(found, key=len, reverse=True))


def _texts(value: Any) -> list[str]:
    """Every text in options, which may be nested."""
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []
