from __future__ import annotations

import pytest
import torch

from pipeline.core import errors
from pipeline.core.errors import (
    ArtifactError,
    BuildError,
    CheckpointError,
    GateFailedError,
    InputError,
    PipelineError,
    UnavailableError,
    UnforeseenError,
    about,
    failure_of,
)

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, PipelineError)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_table_of_codes_is_that_of_the_code(kind: type[PipelineError]) -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if kind.__name__ in line]
    assert len(lines) == 1, "the module's docstring lists every kind once"
    assert f" {kind.exit_code}" in lines[0].split(kind.__name__)[1]


def test_codes() -> None:
    codes = {GateFailedError: 1, InputError: 2, ArtifactError: 2, BuildError: 3}
    assert {kind: kind.exit_code for kind in codes} == codes
    assert UnavailableError.exit_code == 4


def test_a_place_is_put_before_the_message_and_the_kind_stays() -> None:
    with (
        pytest.raises(CheckpointError, match=r"^model\.checkpoint: is torn$"),
        about("model.checkpoint"),
    ):
        raise CheckpointError("is torn")


def test_a_place_is_said_once() -> None:
    with pytest.raises(InputError, match=r"^data\.labels: none$"), about("data.labels"):
        raise InputError("data.labels: none")


def test_what_is_no_input_error_passes() -> None:
    with pytest.raises(BuildError, match=r"^no kernel$"), about("model"):
        raise BuildError("no kernel")
    with pytest.raises(ValueError, match=r"^a bug$"), about("model"):
        raise ValueError("a bug")


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (KeyError("colour"), UnforeseenError, "a: an unforeseen fault: KeyError: 'colour'; see b"),
        (MemoryError("8 GiB"), BuildError, "a: out of memory: MemoryError: 8 GiB; free some"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            BuildError,
            "a: out of memory: RuntimeError: [enforce fail]",
        ),
    ],
)
def test_memory_that_runs_out_is_no_fault_of_the_program(
    error: Exception, kind: type[PipelineError], says: str
) -> None:
    found = failure_of("a", error, "see b")
    assert type(found) is kind
    assert str(found).startswith(says)


def test_what_torch_says_where_memory_runs_out_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert isinstance(failure_of("a", caught.value, ""), BuildError)
