from __future__ import annotations

import sys

import pytest
import torch

from pipeline.core.threads import SMALL, batches_for, threads_for, threads_that_help

pytestmark = pytest.mark.usefixtures("three_threads")


def test_small_pictures_take_one_thread_and_larger_ones_what_there_is() -> None:
    assert threads_for(3 * 64 * 64) == 1
    assert threads_for(SMALL) is None
    assert threads_for(3 * 224 * 224) is None


def test_many_small_pictures_are_divided_at_once() -> None:
    assert (batches_for(SMALL - 1), batches_for(SMALL)) == (8, 1)


def test_threads_are_given_back() -> None:
    for _ in range(2):
        with threads_that_help(SMALL - 1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3


def test_threads_are_given_back_after_an_error() -> None:
    with pytest.raises(KeyError), threads_that_help(1):
        raise KeyError
    assert torch.get_num_threads() == 3


def test_large_pictures_change_nothing() -> None:
    with threads_that_help(SMALL):
        assert torch.get_num_threads() == 3


def test_what_runs_without_pytorch_does_not_load_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    with threads_that_help(1):
        assert "torch" not in sys.modules
