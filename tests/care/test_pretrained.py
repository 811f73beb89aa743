"""Weights that timm has: where they lie, under which licence, and what is said without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.models import get_pretrained_cfg

from care.pretrained import fetch, remark
from pipeline.core.errors import ModelError

Download = Callable[[str, str], str]


def given(monkeypatch: pytest.MonkeyPatch, download: Download) -> None:
    """A Hub, and an empty cache."""

    def answer(repository: str, file: str, *, local_files_only: bool = False) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        return download(repository, file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)


def test_the_weights_that_timm_prefers_are_named_in_full_with_their_licence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given(monkeypatch, lambda repository, file: f"/cache/{repository}/{file}")
    found = fetch("resnet18")
    assert found.name == "timm's resnet18.a1_in1k"
    assert found.path == Path("/cache/timm/resnet18.a1_in1k/model.safetensors")
    assert found.licence == "apache-2.0"


def test_what_is_in_the_cache_is_taken_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(repository: str, file: str, *, local_files_only: bool = False) -> str:
        assert local_files_only
        return f"/cache/{file}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    assert fetch("resnet18").path == Path("/cache/model.safetensors")


def test_the_older_format_is_taken_where_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def download(repository: str, file: str) -> str:
        if file.endswith("safetensors"):
            raise OSError("404")
        return f"/cache/{file}"

    given(monkeypatch, download)
    assert fetch("resnet18.a1_in1k").path == Path("/cache/pytorch_model.bin")


def test_without_a_network_it_is_said_what_to_do_and_tried_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append(file)
        raise LocalEntryNotFoundError("no connection\nand more")

    given(monkeypatch, download)
    with pytest.raises(ModelError, match=r"cannot be had: \w+: no connection; run where"):
        fetch("resnet18")
    assert asked == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("care_s0", "timm has no weights of care_s0"),
        ("no_such_network", "timm has no weights of no_such_network"),
        ("resnet18.a1_in2k", "timm has no weights of resnet18.a1_in2k"),
    ],
)
def test_networks_without_weights_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    given(monkeypatch, lambda repository, file: "/cache/file")
    with pytest.raises(ModelError, match=words):
        fetch(name)


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        ("apache-2.0", ""),
        ("mit", ""),
        ("cc-by-nc-4.0", "the licence of the weights, cc-by-nc-4.0, forbids commercial use"),
        ("fair-noncommercial-research-license", "forbids commercial use"),
        ("apple-amlr", "forbids commercial use"),
        ("dinov3-license", "a licence of their own, dinov3-license: read it before you ship them"),
        ("", "no licence of the weights is stated"),
    ],
)
def test_a_licence_is_explained(licence: str, words: str) -> None:
    assert words in remark(licence)
    assert bool(words) == bool(remark(licence))


def test_timm_states_licences_where_they_are_looked_for() -> None:
    stated = get_pretrained_cfg("convnextv2_atto.fcmae_ft_in1k")
    assert stated is not None
    assert "forbids commercial use" in remark(str(stated.license))
