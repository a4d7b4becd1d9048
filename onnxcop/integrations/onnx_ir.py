"""Pruning as a pass of `onnx_ir`, e.g. in a `Sequential` or a `PassManager`.

Needs the package `onnx-ir` (`pip install "onnxcop[onnx-ir]"`).
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from onnxcop.pipeline.prune import PruneResult, prune


class PrunePass(ir.passes.FunctionalPass):
    """Prunes a model; the input model is not changed.

    Attributes:
        result: Result of the last call (plan, report, statistics), None before the first.
    """

    def __init__(self, **settings: Any) -> None:
        """Prepare a pass.

        Args:
            settings: Keyword arguments of :func:`onnxcop.prune`.
        """
        self.settings = settings
        self.result: PruneResult | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Prune a model.

        Returns:
            The pruned model, and whether anything was removed.

        Raises:
            OnnxcopError: As :func:`onnxcop.prune` does; a pass manager wraps it into its own error.
        """
        whole = ir.external_data.load_to_model(model.clone())
        self.result = prune(ir.to_proto(whole), **self.settings)
        return ir.passes.PassResult(ir.from_proto(self.result.model), modified=bool(self.result.plan.cuts))
