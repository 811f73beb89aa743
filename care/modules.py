"""A network of the user's own: what a callable of theirs makes.

create("my_package.nets:make", width=2)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeline.core.callables import imported
from pipeline.core.errors import ModelError
from pipeline.core.words import in_short


def create(stated: str, **kwargs: Any) -> nn.Module:
    """Call a callable of the user's and return the network that it makes.

    Args:
        stated: "package.module:callable".
        **kwargs: Its arguments.

    Raises:
        ModelError: It cannot be imported or called, or makes no network.
    """
    make = imported(stated)
    try:
        made = make(**kwargs)
    except TypeError as error:
        given = ", ".join(kwargs) or "none"
        raise ModelError(
            f"{stated} cannot be called with these arguments ({given}): {in_short(error)}: give "
            "them in model.kwargs"
        ) from error
    except Exception as error:  # somebody's own code
        raise ModelError(f"{stated} failed: {in_short(error)}") from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"{stated} made a {type(made).__name__}, no torch.nn.Module: return one")
    return made
