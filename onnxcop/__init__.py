"""Structural pruning of ONNX models: fewer filters, smaller tensors, the same inputs and outputs.

    import onnxcop
    result = onnxcop.prune("model.onnx", macs=0.7)
    result.save("small.onnx")

The stages one by one: :func:`analyze` → :func:`statistics` → a :class:`Criterion`'s ranking →
:func:`choose` → :func:`recover` → :func:`apply` → :func:`verify`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnxcop._version import __version__

if TYPE_CHECKING:
    from onnxcop.allocation.budget import AUTO, Budget, Limits
    from onnxcop.allocation.greedy import choose
    from onnxcop.analysis.analyze import Analysis, analyze
    from onnxcop.coupling.ops import DEFAULT_RULES, Op
    from onnxcop.criteria.base import Criterion, PruningContext, Ranking, StaticRanking
    from onnxcop.criteria.registry import criterion_named
    from onnxcop.criteria.scores import statistics
    from onnxcop.errors import OnnxcopError
    from onnxcop.integrations.pytorch import resize_module, torch_state
    from onnxcop.pipeline.compare import compare
    from onnxcop.pipeline.options import PruneOptions
    from onnxcop.pipeline.prune import apply_plan, prune
    from onnxcop.pipeline.quantize import quantize
    from onnxcop.pipeline.stages import recover
    from onnxcop.pipeline.sweep import sweep
    from onnxcop.report.result import PruneResult
    from onnxcop.report.summary import Report
    from onnxcop.rewrite.apply import apply
    from onnxcop.rewrite.plan import PruningPlan
    from onnxcop.runtime.session import EngineOptions
    from onnxcop.training.finetune import finetune
    from onnxcop.verification.verify import verify

# Loaded on first use, so that `import onnxcop` and `onnxcop --help` stay quick.
_HOMES = {
    "AUTO": "onnxcop.allocation.budget",
    "Budget": "onnxcop.allocation.budget",
    "Limits": "onnxcop.allocation.budget",
    "choose": "onnxcop.allocation.greedy",
    "Analysis": "onnxcop.analysis.analyze",
    "analyze": "onnxcop.analysis.analyze",
    "DEFAULT_RULES": "onnxcop.coupling.ops",
    "Op": "onnxcop.coupling.ops",
    "Criterion": "onnxcop.criteria.base",
    "Ranking": "onnxcop.criteria.base",
    "StaticRanking": "onnxcop.criteria.base",
    "PruningContext": "onnxcop.criteria.base",
    "criterion_named": "onnxcop.criteria.registry",
    "statistics": "onnxcop.criteria.scores",
    "OnnxcopError": "onnxcop.errors",
    "compare": "onnxcop.pipeline.compare",
    "PruneOptions": "onnxcop.pipeline.options",
    "apply_plan": "onnxcop.pipeline.prune",
    "prune": "onnxcop.pipeline.prune",
    "recover": "onnxcop.pipeline.stages",
    "quantize": "onnxcop.pipeline.quantize",
    "sweep": "onnxcop.pipeline.sweep",
    "finetune": "onnxcop.training.finetune",
    "torch_state": "onnxcop.integrations.pytorch",
    "resize_module": "onnxcop.integrations.pytorch",
    "PruneResult": "onnxcop.report.result",
    "Report": "onnxcop.report.summary",
    "apply": "onnxcop.rewrite.apply",
    "PruningPlan": "onnxcop.rewrite.plan",
    "EngineOptions": "onnxcop.runtime.session",
    "verify": "onnxcop.verification.verify",
}

__all__ = [
    "AUTO",
    "DEFAULT_RULES",
    "Analysis",
    "Budget",
    "Criterion",
    "EngineOptions",
    "Limits",
    "OnnxcopError",
    "Op",
    "PruneOptions",
    "PruneResult",
    "PruningContext",
    "PruningPlan",
    "Ranking",
    "Report",
    "StaticRanking",
    "__version__",
    "analyze",
    "apply",
    "apply_plan",
    "choose",
    "compare",
    "criterion_named",
    "finetune",
    "prune",
    "quantize",
    "recover",
    "resize_module",
    "statistics",
    "sweep",
    "torch_state",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxcop' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
