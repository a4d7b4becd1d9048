"""Structural pruning of ONNX models: fewer filters, smaller tensors, the same inputs and outputs.

    import onnxcop
    result = onnxcop.prune("model.onnx", macs=0.7)
    result.save("small.onnx")

The stages one by one: :func:`analyze` → :func:`statistics` → a :class:`Criterion`'s ranking →
:func:`choose` → :func:`recover` → :func:`apply` → :func:`verify`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcop.allocate import choose
    from onnxcop.analysis import Analysis, analyze
    from onnxcop.budget import AUTO, Budget, Limits
    from onnxcop.catalogue import criterion_named
    from onnxcop.criteria import Criterion, Ranking, StaticRanking, Subject
    from onnxcop.engine import EngineOptions
    from onnxcop.errors import OnnxcopError
    from onnxcop.ops import DEFAULT_RULES, Op
    from onnxcop.pipeline import apply_plan, prune
    from onnxcop.plan import PruningPlan
    from onnxcop.report import Report
    from onnxcop.result import PruneResult
    from onnxcop.rewrite import apply
    from onnxcop.scores import statistics
    from onnxcop.stages import recover
    from onnxcop.tradeoff import sweep
    from onnxcop.verify import verify
    from onnxcop.versus import compare

__version__ = "0.1.0"

# Loaded on first use, so that `import onnxcop` and `onnxcop --help` stay quick.
_HOMES = {
    "AUTO": "budget", "Analysis": "analysis", "Budget": "budget", "Criterion": "criteria", "DEFAULT_RULES": "ops",
    "EngineOptions": "engine", "Limits": "budget", "OnnxcopError": "errors", "Op": "ops",
    "PruneResult": "result", "PruningPlan": "plan", "Ranking": "criteria", "Report": "report",
    "Subject": "criteria", "analyze": "analysis", "apply": "rewrite", "apply_plan": "pipeline",
    "choose": "allocate", "compare": "versus", "criterion_named": "catalogue", "prune": "pipeline",
    "recover": "stages", "statistics": "scores", "sweep": "tradeoff", "StaticRanking": "criteria", "verify": "verify",
}  # fmt: skip

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
    "PruneResult",
    "PruningPlan",
    "Ranking",
    "Report",
    "StaticRanking",
    "Subject",
    "__version__",
    "analyze",
    "apply",
    "apply_plan",
    "choose",
    "compare",
    "criterion_named",
    "prune",
    "recover",
    "statistics",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module = import_module(f"onnxcop.{_HOMES[name]}")
        value = getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'onnxcop' has no attribute {name!r}")


class _Package(ModuleType):
    """The package itself, in which a module never takes the place of the function of its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds every submodule to its package: `verify` would become a module.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
