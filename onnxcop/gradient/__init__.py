"""Gradients of any ONNX model, written as ONNX nodes and run by ONNX Runtime.

    from onnxcop.gradient import differentiate, trainable

    gradients = differentiate(model, "loss")    # d loss / d weight for every trainable weight
    gradients.model                             # forward and backward graph, standard operators only
    gradients.names["conv1.weight"]             # the output that holds its gradient
    gradients.stops                             # nodes that no gradient passes, and why

The rules are one table, `DEFAULT_GRADIENTS`; pass `DEFAULT_GRADIENTS | {("my.domain", "MyOp"): rule}` for operators
of your own. Operators without a rule that the ONNX specification defines by others are written out first.
It knows nothing of pruning, and may import `runtime` and the packages below it. Start at `rules`.
"""

from __future__ import annotations

from onnxcop.gradient.backward import Gradients, Stop, differentiate, trainable
from onnxcop.gradient.builder import Builder, NoGradient, Tensor
from onnxcop.gradient.rules import DEFAULT_GRADIENTS, GradientRule, GradientRules

__all__ = [
    "DEFAULT_GRADIENTS",
    "Builder",
    "GradientRule",
    "GradientRules",
    "Gradients",
    "NoGradient",
    "Stop",
    "Tensor",
    "differentiate",
    "trainable",
]  # fmt: skip
