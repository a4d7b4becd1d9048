"""Public face of the operator rules: what a rule of your own imports (see CONTRIBUTING.md)."""

from __future__ import annotations

from onnxcop.coupling.ops import (
    DEFAULT_RULES,
    Choice,
    Contraction,
    Decline,
    Edit,
    Kernel,
    Label,
    Op,
    Rule,
    RuleTable,
)  # fmt: skip

__all__ = [
    "DEFAULT_RULES", "Choice", "Contraction", "Decline", "Edit", "Kernel", "Label", "Op", "Rule", "RuleTable",
]  # fmt: skip
