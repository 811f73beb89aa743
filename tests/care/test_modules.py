from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from care.modules import create
from pipeline.core.errors import ModelError


def test_a_callable_makes_the_network(own_modules: Path) -> None:
    network = create("my_nets:make", width=5)
    assert isinstance(network, nn.Sequential)
    assert network[0].out_channels == 5
    assert str(own_modules) not in sys.path


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("my_nets", "write package.module:callable"),
        ("my_nets:", "write package.module:callable"),
        ("my-nets:make", "write package.module:callable"),
        ("my_notes:make", "there is no module my_notes: run in the folder in which my_notes lies"),
        ("my_package.nets:make", "there is no module my_package.nets"),
        ("my_nets:mak", "my_nets has no mak; did you mean make"),
        ("my_nets:number", "my_nets:number is a int, which cannot be called"),
        ("my_nets:broken", "my_nets:broken failed: .*the file of weights is gone"),
        ("my_nets:text", "made a str, no torch.nn.Module"),
        ("my_package.inner.deep:make", "cannot be imported: .*imported"),
        ("sys:exit", "there is no module sys"),
        ("my_package.none.deep:make", "there is no module my_package.none"),
    ],
)
def test_what_makes_no_network_is_refused(own_modules: Path, stated: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create(stated)


def test_arguments_that_it_does_not_take_are_named(own_modules: Path) -> None:
    with pytest.raises(
        ModelError, match=r"with these arguments \(depth\): .*'depth'.*model.kwargs"
    ):
        create("my_nets:make", depth=3)
