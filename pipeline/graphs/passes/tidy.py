"""Remove what no node needs, and what says where the graph was made."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common


class Tidy(ir.passes.InPlacePass):
    """Constants become shared initializers, equal nodes one node, unused ones none.

    Exporters leave stack traces with machine paths in the metadata of nodes: they go too, so that
    the same network gives the same bytes everywhere. The model's own metadata stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Tidy `model`, in place."""
        about = dict(model.metadata_props)
        steps = ir.passes.Sequential(
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.IdentityEliminationPass(),
            common.CommonSubexpressionEliminationPass(),
            common.DeduplicateInitializersPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedOpsetsPass(),
            common.ClearMetadataAndDocStringPass(),
        )
        modified = steps(model).modified
        model.metadata_props.update(about)
        return ir.passes.PassResult(model, modified)
