"""What Core ML or its converter cannot express, and what to do about it.

coremltools says what it stumbled on, mostly by the name of a value. `explain` adds the module of
the network that computes it, the limit behind the message and the way out; `own_fault` names what
is a fault of its own, and `check` finds what coremltools converts into something else without a
word.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import BuildError
from pipeline.core.words import in_short
from pipeline.targets.coreml.nodes import kind_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_ELSEWHERE = "or remove coreml from the targets"


@dataclass(frozen=True)
class Refusal:
    """A known limit.

    Attributes:
        message: What coremltools says, as a pattern; its group `value` names a value.
        remedy: What to do, for people.
    """

    message: str
    remedy: str


REFUSALS = (
    Refusal(
        r"tensors with rank <= 5.*Layer \"(?P<value>\w+)\"",
        "Core ML's tensors have at most five axes: write that reshape and what follows it with "
        "fewer (fold the batch of one into another axis)",
    ),
    Refusal(
        r"Unsupported fx node (?P<value>\w+), kind _?upsample_(bicubic|nearest_exact)",
        "Core ML interpolates bilinearly or takes the nearest pixel: use one of these, or resize "
        "images before the network",
    ),
    Refusal(
        r"Unsupported fx node (?P<value>\w+), kind",
        "coremltools has no conversion for this operation: write it with others",
    ),
    Refusal(
        r"max_pool does not support dilation",
        "Core ML's max pooling has no dilation: use another pooling",
    ),
    Refusal(
        r"divisor_override is not supported",
        "Core ML divides by the size of the window: multiply the average by a factor instead",
    ),
    Refusal(
        r"Pad mode should be one of",
        "Core ML pads with a constant, the edge or its mirror image: concatenate slices instead",
    ),
    Refusal(
        r"padding=0 and output_padding|'NoneType' object is not iterable",
        "a transposed convolution with output_padding needs a padding too: give it one, and pad "
        "its result",
    ),
    Refusal(
        r"float output size is not supported",
        "Core ML interpolates by the ratio of whole sizes: give interpolate a size, not a factor",
    ),
)
"""In the order in which they are tried."""


_OWN_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError)
"""What the converter raises where it stumbles over itself; what it refuses it says in others."""


def own_fault(error: Exception, program: ExportedProgram) -> str:
    """What to say of a fault of coremltools' own; "" where it refuses something.

    Args:
        error: What it raised.
        program: What it was given, which is saved for a bug report.
    """
    known = any(re.search(each.message, str(error), re.DOTALL) for each in REFUSALS)
    if known or not isinstance(error, _OWN_FAULTS):
        return ""
    return (
        f"internal fault of coremltools {metadata.version('coremltools')}: {in_short(error)}; "
        f"{_saved(program)}; install another version of it, {_ELSEWHERE}"
    )


def _saved(program: ExportedProgram) -> str:
    """Where the program lies from now on; it is written where it cannot be in anybody's way."""
    import torch

    folder = tempfile.mkdtemp(prefix="care-deploy-fault-")
    path = Path(folder, "program.pt2")
    try:
        torch.export.save(program, path)
    except Exception as error:  # the first fault is what matters
        shutil.rmtree(folder)
        return f"the exported program cannot be saved for a bug report ({in_short(error)})"
    return f"report it with the exported program, {path}"


def explain(message: str, owners: Mapping[str, str]) -> str:
    """Say what a refusal of coremltools means.

    Args:
        message: What it raised.
        owners: The module of each value of the exported program (`record.module_owners`).

    Returns:
        The message's first line, where in the network that is, and what to do.
    """
    from pipeline.emulate.mil.record import torch_name

    reason = message.strip().partition("\n")[0].rstrip(".")
    for refusal in REFUSALS:
        found = re.search(refusal.message, message, re.DOTALL)
        if found is None:
            continue
        value = torch_name(found.groupdict().get("value") or "")
        module = owners.get(value, "").removeprefix("network").removeprefix(".")
        where = f" (in {module})" if module else ""
        return f"{reason}{where}: {refusal.remedy}, {_ELSEWHERE}"
    return f"{reason}: change the network there, {_ELSEWHERE}"


def check(program: ExportedProgram, name: str) -> None:
    """Refuse what coremltools would convert into something else.

    Args:
        program: The exported network.
        name: The network's name, for messages.

    Raises:
        BuildError: The network has such an operation.
    """
    from pipeline.emulate.mil.record import module_owners

    for node in program.graph.nodes:
        if kind_of(node) == "_upsample_bilinear2d_aa" and _shrinks(node):
            owner = module_owners(program).get(node.name, "")
            module = owner.removeprefix("network").removeprefix(".") or "the network itself"
            raise BuildError(
                f"{name} shrinks an image with antialiasing (in {module}), which Core ML does not "
                f"have: interpolate with antialias=False, or pool, {_ELSEWHERE}"
            )


def _shrinks(node: Any) -> bool:
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    return any(new < old for old, new in zip(before[-2:], after[-2:], strict=True))
