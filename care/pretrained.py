"""The weights that timm has of its networks: where they lie, and under which licence.

They come through the Hub's own client, which keeps them in its cache and obeys HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import ModelError
from pipeline.core.words import in_short, nearest

_FILES = ("model.safetensors", "pytorch_model.bin")
"""What the Hub's repositories of timm call the weights, the safer format first."""

_FREE = frozenset({"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0"})
"""Licences that keep nobody from shipping the weights."""

_NO_COMMERCE = frozenset({"apple-amlr", "seer-license"})
"""Licences for research alone whose names do not say so."""


@dataclass(frozen=True)
class Pretrained:
    """Weights of timm's.

    Attributes:
        name: Their full name, such as "resnet18.a1_in1k".
        path: The file, in the Hub's cache.
        licence: As timm states it; "" where it states none.
    """

    name: str
    path: Path
    licence: str


def fetch(name: str) -> Pretrained:
    """The weights of a network, downloaded if they are not in the cache.

    Args:
        name: Such as "resnet18", for the weights that timm prefers, or "resnet18.a1_in1k".

    Raises:
        ModelError: timm has none, or they can be had in neither way.
    """
    import timm

    architecture, _, tag = name.partition(".")
    known = timm.list_pretrained(f"{architecture}*")
    there = any(each == name or (not tag and each.startswith(f"{name}.")) for each in known)
    stated = timm.get_pretrained_cfg(name) if there else None
    if stated is None:
        raise ModelError(f"timm has no weights of {name}{nearest(name, known)}: name a file")
    if stated.custom_load or not stated.hf_hub_id:
        raise ModelError(
            f"timm reads its weights of {name} in a way of their own: save them once, by "
            "timm.create_model(…, pretrained=True) and torch.save of its state_dict(), and name "
            "that file"
        )
    full = f"{architecture}.{stated.tag}" if stated.tag else architecture
    return Pretrained(full, _file(full, stated.hf_hub_id, stated.hf_hub_filename), _known(stated))


def remark(licence: str) -> str:
    """What a licence of weights means for who ships them; "" where nothing has to be said."""
    if not licence:
        return "no licence of the weights is stated: ask their authors before you ship them"
    if "-nc" in licence or "noncommercial" in licence or licence in _NO_COMMERCE:
        return f"the licence of the weights, {licence}, forbids commercial use"
    if licence in _FREE:
        return ""
    return f"the weights have a licence of their own, {licence}: read it before you ship them"


def _known(stated: object) -> str:
    licence = str(getattr(stated, "license", None) or "")
    return "" if licence == "unknown" else licence


def _file(name: str, repository: str, own: str | None) -> Path:
    """A file of the Hub's: of the cache, without asking the Hub, if it is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    names = (own,) if own else _FILES
    for file in names:
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(repository, file, local_files_only=True))
    reason = ""
    for file in names:
        try:
            return Path(hf_hub_download(repository, file))
        except Exception as error:  # the client, the Hub and the network fail in their own ways
            reason = reason or in_short(error)
            if isinstance(error, LocalEntryNotFoundError):
                break  # there is no network: the next one would try as long in vain
    raise ModelError(
        f"timm's weights of {name} are not in the Hub's cache, and cannot be had: {reason}; run "
        f"where there is a network, copy the cache, or name a file of {repository}"
    )
