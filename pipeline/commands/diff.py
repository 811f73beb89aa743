"""`diff`: where does an artifact leave the reference, layer by layer?"""

from __future__ import annotations

from rich.table import Table

from pipeline.commands.artifacts import one_artifact
from pipeline.config import Config
from pipeline.core.errors import InputError
from pipeline.core.screen import styled
from pipeline.report.terminal import render
from pipeline.targets.registry import TARGETS, able


def diff(config: Config, target: str | None, *, precision: str | None, images: int) -> str:
    """Error of a built artifact against PyTorch, layer by layer, and where it jumps.

    Raises:
        InputError: The artifact is not built, or the target cannot compare layer by layer.
    """
    target = target or able("diff")[0]
    with one_artifact(config, target, precision, images) as (context, artifact, chosen):
        rows = TARGETS[target].diff(artifact, context.source.fused(), chosen)
    if rows is None:
        raise InputError(f"{target} has no comparison by layer; {', '.join(able('diff'))} can tell")
    table = Table("module", "operation", "line", "relative error", "largest", "", box=None)
    for row in rows:
        table.add_row(
            row["module"],
            row["operation"],
            str(row["line"]),
            f"{row['relative']:.2e}",
            f"{row['largest']:.2e}",
            styled("jumps here", "red") if row["jump"] else "",
        )
    first = next((row["module"] or "the network itself" for row in rows if row["jump"]), None)
    verdict = f"the error jumps at {first}" if first else "the error grows slowly: it jumps nowhere"
    return render(table, verdict)
