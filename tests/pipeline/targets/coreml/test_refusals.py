"""What cannot be converted is refused with the place, the reason and the way out."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.errors import BuildError
from pipeline.targets.base import BuildJob
from pipeline.targets.coreml.refusals import explain, own_fault
from pipeline.targets.coreml.target import CoreMLTarget

CASES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "six axes": (
        lambda x: x.reshape(-1, 4, 4, 2, 4, 2, 4).cumsum(3).reshape(x.shape),
        "at most five axes",
    ),
    "bicubic": (
        lambda x: F.interpolate(x, size=(12, 12), mode="bicubic"),
        "interpolates bilinearly",
    ),
    "nearest-exact": (
        lambda x: F.interpolate(x, size=(12, 12), mode="nearest-exact"),
        "interpolates bilinearly",
    ),
    "antialiasing": (
        lambda x: F.interpolate(x, size=(3, 3), mode="bilinear", antialias=True),
        "antialias=False",
    ),
    "unknown": (lambda x: torch.fmod(x, 0.7), "no conversion for this operation"),
    "dilated pooling": (lambda x: F.max_pool2d(x, 2, 1, dilation=2), "has no dilation"),
    "divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "multiply the average"),
    "circular": (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), "concatenate slices"),
    "output_padding": (
        lambda x: F.conv_transpose2d(x, torch.ones(16, 16, 2, 2), stride=2, output_padding=1),
        "needs a padding too",
    ),
}


# The messages about the others name no value.
PLACED = ("six axes", "bicubic", "nearest-exact", "antialiasing", "unknown")


@pytest.fixture(autouse=True)
def _leave_nothing() -> Iterator[None]:
    """A conversion that fails leaves a temporary folder to the garbage collector, which warns."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


class Step(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("case", CASES)
def test_refusal_names_the_place_and_the_way_out(
    case: str, tiny: Callable[..., nn.Module], make_job: Callable[..., BuildJob], tmp_path: Path
) -> None:
    function, remedy = CASES[case]

    def module() -> nn.Module:
        network: Any = tiny()
        network.stem = nn.Sequential(network.stem, Step(function))
        return network.eval().requires_grad_(False)  # type: ignore[no-any-return]

    with pytest.raises(BuildError, match=remedy) as raised:
        CoreMLTarget().build(make_job(module=module), tmp_path)
    message = str(raised.value)
    assert "tiny" in message
    assert "remove coreml from the targets" in message
    assert ("(in stem.1)" in message) == (case in PLACED)


def test_other_messages_are_handed_on() -> None:
    message = "cannot do this\nand a traceback"
    assert explain(message, {}).startswith("cannot do this: change the network")


def test_a_fault_of_coremltools_is_named_and_what_it_was_given_kept(
    make_job: Callable[..., BuildJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(*_: Any, **__: Any) -> Any:
        raise KeyError("var_12")

    monkeypatch.setattr("coremltools.convert", stumble)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(BuildError) as raised:
        CoreMLTarget().build(make_job(), tmp_path)
    message = str(raised.value)
    version = metadata.version("coremltools")
    assert f"tiny: internal fault of coremltools {version}: KeyError: 'var_12'; report" in message
    assert "install another version of it, or remove coreml from the targets" in message
    found = re.search(r"\S+program\.pt2", message)
    assert found
    kept = torch.export.load(found[0]).module()
    image = torch.rand(1, 3, 16, 16)
    assert len(kept(image)) > 0


def test_a_program_that_cannot_be_saved_hides_no_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(*_: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr("torch.export.save", fail)
    program = torch.export.export(nn.ReLU(), (torch.zeros(1),))
    said = own_fault(TypeError("odd"), program)
    assert "TypeError: odd; the exported program cannot be saved for a bug report (OSError" in said
    assert not list(tmp_path.glob("care-deploy-fault-*"))


@pytest.mark.parametrize(
    "error", [ValueError("no"), TypeError("'NoneType' object is not iterable")]
)
def test_what_coremltools_refuses_is_no_fault_of_it(error: Exception) -> None:
    assert own_fault(error, torch.export.export(nn.ReLU(), (torch.zeros(1),))) == ""
