"""Conversion of an exported network to a Core AI program with the same bytes every time."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import BuildError
from pipeline.core.network import Network
from pipeline.targets.coreai.network import IMAGE, LOGITS

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_RESOURCE = re.compile(r"\bresource_\d+\b")
_PART = re.compile(r"@(\w+)_[a-z]{8}\b")


def convert(program: ExportedProgram, network: Network) -> Any:
    """Convert an exported network.

    Args:
        program: What `network.export` made.
        network: Its name, for messages.

    Returns:
        A `coreai.authoring.AIProgram`.

    Raises:
        BuildError: coreai-torch cannot convert the network.
    """
    # Before coreai_torch, whose own imports run into a circle otherwise.
    import coreai.authoring  # noqa: F401
    from coreai_torch import TorchConverter

    converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
    try:
        converter.add_exported_program(program, input_names=[IMAGE], output_names=[LOGITS])
        return converter.to_coreai()
    # The converter raises whatever a lowering or the compiler does.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise BuildError(
            f"coreai-torch cannot convert {network.name}: {reason}; write that part of the network "
            "with other operations, or remove coreai from the targets"
        ) from error


def canonical(program: Any) -> Any:
    """The same program with names that do not change from build to build.

    Weights and called parts get random names, and operations the place in our code that made them:
    without both, a network gives one and the same program, and so the same bytes.

    Args:
        program: A `coreai.authoring.AIProgram`.
    """
    from coreai._compiler.ir import Module
    from coreai.authoring import AIProgram, Context

    module = program._module._mlir_module
    text = module.operation.get_asm(enable_debug_info=False)
    text = _numbered(_numbered(text, _RESOURCE, "weights"), _PART, "@part")
    # Kept by the module that is parsed in it.
    return AIProgram._from_mlir_module(Module.parse(text, Context()._mlir_context))


def _numbered(text: str, pattern: re.Pattern[str], name: str) -> str:
    """Names that match, numbered in the order in which they occur."""
    names: dict[str, str] = {}

    def renamed(found: re.Match[str]) -> str:
        return names.setdefault(found.group(), f"{name}_{len(names)}")

    return pattern.sub(renamed, text)
