"""Gradients of operators that work element by element.

A rule is a function of `g` (the gradient of the output), `y` (the output) and the inputs; its keyword-only
parameters are the operator's attributes with their defaults. Of two inputs that tie (Relu at 0, Max of equal
values) the conventions are PyTorch's: Relu and its kin are 0 at 0, Clip passes the gradient at its bounds,
and Max and Min share it equally.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from onnxcop.gradient.builder import NoGradient, Tensor, total
from onnxcop.gradient.node import Node

_ROOT_2_PI = math.sqrt(2 * math.pi)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return x.op("Sigmoid")


def hard_sigmoid(g: Tensor, y: Tensor, x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """The slope where the line is not cut off."""
    return alpha * g.masked((y > 0) & (y < 1))


def hard_swish(g: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """0 below -3, 1 above 3, (2 x + 3) / 6 between."""
    gate = x.op("HardSigmoid", alpha=1 / 6, beta=0.5)
    return g * (gate + (x / 6).masked((gate > 0) & (gate < 1)))


def mish(g: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Of x tanh(softplus x)."""
    t = x.op("Softplus").op("Tanh")
    return g * (t + x * (1 - t * t) * sigmoid(x))


def gelu(g: Tensor, y: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """Of x Φ(x), or of its approximation by tanh."""
    if approximate == "none":
        cumulative = 0.5 * (1 + (x * math.sqrt(0.5)).op("Erf"))
        return g * (cumulative + x * ((x * x * -0.5).op("Exp") * (1 / _ROOT_2_PI)))
    scale = math.sqrt(2 / math.pi)
    t = (scale * x * (1 + 0.044715 * (x * x))).op("Tanh")
    return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (scale * (1 + 3 * 0.044715 * (x * x))))


def swish(g: Tensor, y: Tensor, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Of x sigmoid(alpha x)."""
    s = sigmoid(alpha * x)
    return g * (s + alpha * (y * (1 - s)))


def power_base(g: Tensor, y: Tensor, x: Tensor, exponent: Tensor) -> Tensor:
    """p x ** (p - 1)."""
    p = exponent.cast(x)
    return g * p * x ** (p - 1)


def power_exponent(g: Tensor, y: Tensor, x: Tensor, exponent: Tensor) -> Tensor:
    """y ln x, and 0 where x is not positive."""
    positive = x > 0
    return (g * y * x.where(positive, 1).op("Log")).cast(exponent)


def shared(g: Tensor, y: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Max and Min: to the inputs that are the result, in equal parts."""
    winners = [x.equals(y).cast(g) for x in inputs]
    part = g / total(winners)
    return [part * won for won in winners]


def dropout(g: Tensor, y: Tensor, x: Tensor, *_: Tensor, node: Node, seed: int = 0) -> Tensor:
    """Nothing is dropped when a model runs."""
    if len(node.proto.input) > 2 and node.proto.input[2]:
        raise NoGradient("its training mode drops values at random")
    return g


# Operators of one input.
UNARY: dict[str, Callable[..., Tensor]] = {
    "Abs": lambda g, y, x: g * x.op("Sign"),
    "Acos": lambda g, y, x: -g / (1 - x * x).op("Sqrt"),
    "Acosh": lambda g, y, x: g / (x * x - 1).op("Sqrt"),
    "Asin": lambda g, y, x: g / (1 - x * x).op("Sqrt"),
    "Asinh": lambda g, y, x: g / (x * x + 1).op("Sqrt"),
    "Atan": lambda g, y, x: g / (x * x + 1),
    "Atanh": lambda g, y, x: g / (1 - x * x),
    "Cast": lambda g, y, x, *, to=0, saturate=1, round_mode="up": g.cast(x),
    "Celu": lambda g, y, x, *, alpha=1.0: g * (x / alpha).op("Exp").where(x < 0, 1),
    "Cos": lambda g, y, x: -g * x.op("Sin"),
    "Cosh": lambda g, y, x: g * x.op("Sinh"),
    "Dropout": dropout,
    "Elu": lambda g, y, x, *, alpha=1.0: g * (y + alpha).where(x < 0, 1),
    "Erf": lambda g, y, x: g * ((-x * x).op("Exp") * (2 / math.sqrt(math.pi))),
    "Exp": lambda g, y, x: g * y,
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Identity": lambda g, y, x: g,
    "LeakyRelu": lambda g, y, x, *, alpha=0.01: g.where(x > 0, alpha * g),
    "Log": lambda g, y, x: g / x,
    "Mish": mish,
    "Neg": lambda g, y, x: -g,
    "Reciprocal": lambda g, y, x: -g * y * y,
    "Relu": lambda g, y, x: g.masked(y > 0),
    "Selu": lambda g, y, x, *, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875:
        g * (y + alpha * gamma).where(x < 0, gamma),
    "Shrink": lambda g, y, x, *, bias=0.0, lambd=0.5: g.masked(x.op("Abs") > lambd),
    "Sigmoid": lambda g, y, x: g * (y * (1 - y)),
    "Sin": lambda g, y, x: g * x.op("Cos"),
    "Sinh": lambda g, y, x: g * x.op("Cosh"),
    "Softplus": lambda g, y, x: g * sigmoid(x),
    "Softsign": lambda g, y, x: g / (1 + x.op("Abs")) ** 2,
    "Sqrt": lambda g, y, x: 0.5 * g / y,
    "Swish": swish,
    "Tan": lambda g, y, x: g * (1 + y * y),
    "Tanh": lambda g, y, x: g * (1 - y * y),
    "ThresholdedRelu": lambda g, y, x, *, alpha=1.0: g.masked(x > alpha),
}  # fmt: skip

# Operators whose inputs broadcast: one function per input; the sums that undo the broadcast follow by themselves.
BROADCAST: dict[str, tuple[Callable[..., Tensor] | None, ...]] = {
    "Add": (lambda g, y, a, b: g, lambda g, y, a, b: g),
    "Sub": (lambda g, y, a, b: g, lambda g, y, a, b: -g),
    "Mul": (lambda g, y, a, b: g * b, lambda g, y, a, b: g * a),
    "Div": (lambda g, y, a, b: g / b, lambda g, y, a, b: -g * y / b),
    "Pow": (power_base, power_exponent),
    "PRelu": (lambda g, y, x, slope: g.where(x > 0, g * slope), lambda g, y, x, slope: (g * x).masked(x < 0)),
    "Where": (None, lambda g, y, c, a, b: g.masked(c), lambda g, y, c, a, b: g.masked(c.op("Not"))),
    "Mod": (lambda g, y, a, b, *, fmod=0: g, None),
    "Clip": (lambda g, y, x, low=None, high=None: g.masked(x.equals(y)), None, None),
}

# The same for any number of inputs: one function that returns the gradient of each.
VARIADIC: dict[str, Callable[..., list[Tensor]]] = {
    "Sum": lambda g, y, *inputs: [g for _ in inputs],
    "Mean": lambda g, y, *inputs: [g / len(inputs) for _ in inputs],
    "Max": shared,
    "Min": shared,
}

# The derivative is 0 wherever there is one.
STEPS = "Ceil Floor Hardmax Round Sign".split()
