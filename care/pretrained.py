"""The weights that timm has of its networks: where they lie, and under which licence.

They come through the Hub's own client, which keeps them in its cache and obeys HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.arguments import first_unknown
from pipeline.core.errors import DataError, ModelError
from pipeline.core.inputs import read_input
from pipeline.core.labels import require_distinct
from pipeline.core.plain import read_json
from pipeline.core.words import in_short, nearest, shown

_FILES = ("model.safetensors", "pytorch_model.bin")
"""What the Hub's repositories of timm call the weights, the safer format first."""

_FREE = frozenset({"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0"})
"""Licences that keep nobody from shipping the weights."""

_NO_COMMERCE = frozenset({"apple-amlr", "seer-license"})
"""Licences for research alone whose names do not say so."""

_CONFIG, _CARD = "config.json", "README.md"
"""Of a repository: which network it holds, and what its authors say of it."""

_STATED = (
    "architecture",
    "num_classes",
    "input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "pool_size",
    "first_conv",
    "classifier",
    "tag",
    "license",
)
"""What is taken of a repository's configuration: nothing that names a file or an address."""

_LICENCE = re.compile(
    r"""^license(?P<name>_name)?:[ \t]*['"]?(?P<value>[\w.+-]{1,100})""", re.MULTILINE
)
_LARGEST_CARD = 10_000_000


@dataclass(frozen=True)
class Pretrained:
    """Weights of timm's.

    Attributes:
        name: Where they are from, such as "timm's resnet18.a1_in1k".
        path: The file, in the Hub's cache.
        licence: As timm states it; "" where it states none.
    """

    name: str
    path: Path
    licence: str


@dataclass(frozen=True)
class HubNetwork:
    """A network of timm's in a repository of the Hub.

    Attributes:
        repository: Its name, with the revision if one was asked for.
        architecture: Name of the network in timm.
        arguments: Those of its constructor that were saved with it.
        stated: What timm takes as its `pretrained_cfg`.
        labels: Its classes in the order of the logits; None where it does not name them.
        weights: Their file and licence.
    """

    repository: str
    architecture: str
    arguments: Mapping[str, Any]
    stated: Mapping[str, Any]
    labels: tuple[str, ...] | None
    weights: Pretrained = field(compare=False)

    @property
    def classes(self) -> int | None:
        """How many there are; None where it does not say."""
        count = self.stated.get("num_classes")
        return count if type(count) is int else None


def fetch_hub(repository: str) -> HubNetwork:
    """A network of the Hub's, downloaded if it is not in the cache.

    timm saved it there, or something that writes the same: config.json names the architecture. Of
    that file, which anybody may have written, only harmless values are taken.

    Args:
        repository: Such as "timm/resnet18.a1_in1k" or "org/name@revision".

    Raises:
        ModelError: It holds no network of timm's, or can be had in neither way.
    """
    place, _, revision = repository.partition("@")
    where = f"{repository} of the Hub"
    config = read_json(_file(where, place, (_CONFIG,), revision), ModelError)
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ModelError(
            f"{where} is no network of timm's: its {_CONFIG} names no architecture; take a "
            "repository that timm can load, or name a checkpoint"
        )
    inner = config.get("pretrained_cfg", config)
    arguments = config.get("model_args", {})
    if not isinstance(inner, dict) or not isinstance(arguments, dict):
        raise ModelError(f"{where} was refused: pretrained_cfg or model_args is no mapping")
    if problem := first_unknown(arguments):
        raise ModelError(f"{where} was refused: in its {_CONFIG}, {problem}")
    said = {**inner, **{key: config[key] for key in ("num_classes",) if key in config}}
    stated = {key: said[key] for key in _STATED if key in said}
    path = _file(where, place, _FILES, revision)
    licence = _known_licence(said) or _licence_of_card(where, place, revision)
    weights = Pretrained(f"{where}{_commit(path)}", path, licence)
    labels = _labels({**inner, **config}, stated.get("num_classes"), where)
    architecture = config["architecture"]
    return HubNetwork(repository, architecture, arguments, stated, labels, weights)


def _labels(said: Mapping[str, Any], count: object, where: str) -> tuple[str, ...] | None:
    """Names of classes, where there is one for each logit."""
    names = said.get("label_names", said.get("labels"))
    if not isinstance(names, list) or len(names) != count:
        return None
    if not all(isinstance(name, str) for name in names):
        return None
    try:
        require_distinct(names, where)
    except DataError:
        return None
    return tuple(names)


def _licence_of_card(where: str, repository: str, revision: str) -> str:
    """What the head of the repository's README states; "" where it states none."""
    try:
        path = _file(where, repository, (_CARD,), revision)
        text = read_input(path, _LARGEST_CARD, ModelError, "remove it").decode("utf-8", "replace")
    except ModelError:
        return ""
    if not text.startswith("---"):
        return ""
    found = {m["name"] or "": m["value"] for m in _LICENCE.finditer(text.split("---", 2)[1])}
    named = found.get("_name", "")
    return named if found.get("") == "other" and named else found.get("", "")


def _commit(path: Path) -> str:
    """Which version a file of the cache is of, for people."""
    parts = path.parts
    if "snapshots" not in parts[:-1]:
        return ""
    return f", commit {parts[parts.index('snapshots') + 1][:12]}"


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
    names = (stated.hf_hub_filename,) if stated.hf_hub_filename else _FILES
    path = _file(f"timm's weights of {full}", stated.hf_hub_id, names)
    return Pretrained(f"timm's {full}", path, _known(stated))


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
    return _known_licence({"license": getattr(stated, "license", None)})


def _known_licence(stated: Mapping[str, Any]) -> str:
    licence = str(stated.get("license") or "")
    return "" if licence == "unknown" else licence[:100]


def _file(what: str, repository: str, names: Sequence[str], revision: str = "") -> Path:
    """A file of the Hub's: of the cache, without asking the Hub, if it is there.

    Args:
        what: What is looked for, for messages.
        repository: Such as "timm/resnet18.a1_in1k".
        names: What the file may be called, the best first.
        revision: Of the repository; "" for its main branch.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    of: dict[str, Any] = {"revision": revision} if revision else {}
    for file in names:
        try:
            with contextlib.suppress(LocalEntryNotFoundError):
                return Path(hf_hub_download(repository, file, local_files_only=True, **of))
        except HFValidationError as error:
            raise ModelError(
                f"{shown(repository)} names no repository: {in_short(error)}"
            ) from error
    reason = ""
    for file in names:
        try:
            return Path(hf_hub_download(repository, file, **of))
        except Exception as error:  # the client, the Hub and the network fail in their own ways
            reason = reason or in_short(error)
            if isinstance(error, LocalEntryNotFoundError):
                break  # there is no network: the next one would try as long in vain
    raise ModelError(
        f"{what}: {' or '.join(names)} is not in the Hub's cache, and cannot be had: {reason}; run "
        f"where there is a network, copy the cache, or name a file of {repository}"
    )
