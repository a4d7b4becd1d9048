"""Gradients of operators: one table, from the operator to a function per input.

A function takes `g`, the gradient of the node's output, `y`, the output, and the inputs, and returns the gradient
of its input; None says that nothing flows there (indices, shapes, axes). Its keyword-only parameters are the
attributes of the node by name, with the defaults of the ONNX specification: an attribute that no function of a
node names declines the node, so that none is overlooked. A parameter `node` gives access to the node itself,
its other outputs and the values of its constant inputs.

Add an operator by a line here, and its cases in tests/gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxcop.gradient.builder import Tensor
from onnxcop.gradient.node import Vjp
from onnxcop.gradient.rules.contraction import CONTRACTIONS, einsum
from onnxcop.gradient.rules.convolution import CONVOLUTIONS
from onnxcop.gradient.rules.elementwise import BROADCAST, STEPS, UNARY, VARIADIC
from onnxcop.gradient.rules.movement import MOVEMENTS, concatenated
from onnxcop.gradient.rules.pooling import POOLINGS
from onnxcop.gradient.rules.reduction import REDUCTIONS


@dataclass(frozen=True, slots=True)
class GradientRule:
    """How gradients pass through an operator.

    Attributes:
        inputs: A function per input, None for one that no gradient reaches.
        together: Instead: one function that returns the gradients of all inputs, however many there are.
        broadcasts: Whether the inputs broadcast, so that sums over what was repeated follow.
        outputs: Whether the gradient may come from other outputs than the first.
    """

    inputs: Sequence[Vjp | None] = ()
    together: Callable[..., Sequence[Tensor]] | None = None
    broadcasts: bool = False
    outputs: bool = False

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """All of its functions."""
        return [f for f in (*self.inputs, self.together) if f is not None]


GradientRules = Mapping[tuple[str, str], GradientRule]

DEFAULT_GRADIENTS: dict[tuple[str, str], GradientRule] = (
    {("", name): GradientRule((rule,)) for name, rule in UNARY.items()}
    | {("", name): GradientRule(rules, broadcasts=True) for name, rules in BROADCAST.items()}
    | {("", name): GradientRule(together=rule, broadcasts=True) for name, rule in VARIADIC.items()}
    | {("", name): GradientRule(rules) for name, rules in (CONTRACTIONS | CONVOLUTIONS).items()}
    | {("", name): GradientRule(rules) for name, rules in (REDUCTIONS | POOLINGS).items()}
    | {("", name): GradientRule(rules, outputs=name == "Split") for name, rules in MOVEMENTS.items()}
    | {("", "Concat"): GradientRule(together=concatenated), ("", "Einsum"): GradientRule(together=einsum)}
)

__all__ = ["DEFAULT_GRADIENTS", "STEPS", "GradientRule", "GradientRules", "Vjp"]
