"""A network of the user's own: what a callable of theirs makes.

create("my_package.nets:make", width=2)
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.core.callables import locate, split
from pipeline.core.errors import ModelError
from pipeline.core.words import in_short, nearest


def create(stated: str, **kwargs: Any) -> nn.Module:
    """Call a callable of the user's and return the network that it makes.

    Args:
        stated: "package.module:callable".
        **kwargs: Its arguments.

    Raises:
        ModelError: It cannot be imported or called, or makes no network.
    """
    module, attribute = split(stated)
    locate(stated)
    make = _attribute(_imported(module), module, attribute)
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


def _imported(module: str) -> Any:
    """The module; the working directory comes last, so that nothing in it stands for a library."""
    sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(module)
    except Exception as error:  # somebody's own code
        raise ModelError(f"{module} cannot be imported: {in_short(error)}") from error
    finally:
        sys.path.pop()


def _attribute(holder: Any, module: str, attribute: str) -> Any:
    found = getattr(holder, attribute, None)
    if found is None:
        hint = nearest(attribute, [name for name in vars(holder) if not name.startswith("_")])
        raise ModelError(f"{module} has no {attribute}{hint}")
    if not callable(found):
        raise ModelError(
            f"{module}:{attribute} is a {type(found).__name__}, which cannot be called"
        )
    return found
