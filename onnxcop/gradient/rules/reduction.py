"""Gradients of reductions, normalizations and softmaxes."""

from __future__ import annotations

from collections.abc import Callable

from onnxcop.gradient.builder import INT64, NoGradient, Tensor
from onnxcop.gradient.node import Node, Vjp
from onnxcop.gradient.rules.broadcast import unbroadcast


def reduction(slope: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> tuple[Callable[..., Tensor], None]:
    """The rule of a Reduce operator from its derivative.

    Args:
        slope: The gradient of every element from `g`, the result, the input and the axes, where the first two have
            an axis of size one in place of each axis that was reduced; it is then repeated to the input's shape.
    """

    def rule(g: Tensor, y: Tensor, x: Tensor, axes: Tensor | None = None, *,
             node: Node, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:  # fmt: skip
        if noop_with_empty_axes and node.value(axes) is None:
            raise NoGradient("it may reduce nothing")
        if not keepdims and axes is not None:
            g, y = g.unsqueeze(axes), y.unsqueeze(axes)
        return slope(g, y, x, axes).expand(x.dims())

    return rule, None


def mean(g: Tensor, y: Tensor, x: Tensor, axes: Tensor | None) -> Tensor:
    """1 / n."""
    return g * (y.op("Size", elem_type=INT64).cast(g) / x.op("Size", elem_type=INT64).cast(g))


def extreme(g: Tensor, y: Tensor, x: Tensor, axes: Tensor | None) -> Tensor:
    """To the elements that are the result, in equal parts."""
    winners = x.equals(y).cast(g)
    return g * winners / winners.sum(axes, keepdims=True)


def softmax(g: Tensor, y: Tensor, x: Tensor, *, axis: int = -1) -> Tensor:
    """y (g - Σ g y)."""
    p = g * y
    return p - y * p.sum([axis], keepdims=True)


def log_softmax(g: Tensor, y: Tensor, x: Tensor, *, axis: int = -1) -> Tensor:
    """g - softmax(x) Σ g."""
    return g - y.op("Exp") * g.sum([axis], keepdims=True)


def batch_scale(x: Tensor, scale: Tensor, rank: int) -> Tensor:
    """A vector of channels in the shape that broadcasts over [N, C, ...]."""
    return scale.reshape([-1] + [1] * (rank - 2))


def batch_input(
    g: Tensor, y: Tensor, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, node: Node,
    epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0,
) -> Tensor:  # fmt: skip
    """With frozen statistics: a product with one factor per channel."""
    if training_mode:
        raise NoGradient("it is in training mode")
    return g * batch_scale(x, scale / (var + epsilon).op("Sqrt"), x.rank).cast(g)


def batch_scales(
    g: Tensor, y: Tensor, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *,
    epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0,
) -> Tensor:  # fmt: skip
    """Σ g (x - mean) / deviation, from two sums per channel."""
    axes = [0, *range(2, x.rank)]
    return ((g * x).sum(axes).cast(scale) - mean * g.sum(axes).cast(scale)) / (var + epsilon).op("Sqrt")


def standardized(x: Tensor, axes: list[int], epsilon: float) -> tuple[Tensor, Tensor]:
    """x less its mean over its deviation, and one over the deviation."""
    centred = x - x.mean(axes)
    inverse = 1 / ((centred * centred).mean(axes) + epsilon).op("Sqrt")
    return centred * inverse, inverse


def through_statistics(g: Tensor, unit: Tensor, inverse: Tensor, axes: list[int]) -> Tensor:
    """(g - mean g - x̂ mean(g x̂)) / deviation, for standardized values x̂."""
    return inverse * (g - g.mean(axes) - unit * (g * unit).mean(axes))


def layer_axes(x: Tensor, axis: int) -> list[int]:
    """The axes that a LayerNormalization runs over."""
    return list(range(axis % x.rank, x.rank))


def layer_input(
    g: Tensor, y: Tensor, x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1,
    epsilon: float = 1e-5, stash_type: int = 1,
) -> Tensor:  # fmt: skip
    """Through scale, mean and deviation."""
    axes = layer_axes(x, axis)
    unit, inverse = standardized(x, axes, epsilon)
    return through_statistics(g * scale, unit, inverse, axes)


def layer_scale(
    g: Tensor, y: Tensor, x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1,
    epsilon: float = 1e-5, stash_type: int = 1,
) -> Tensor:  # fmt: skip
    """Σ g x̂."""
    return unbroadcast(g * standardized(x, layer_axes(x, axis), epsilon)[0], x.sizes, scale)


def instance_input(g: Tensor, y: Tensor, x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Through scale, mean and deviation of every channel of every sample."""
    axes = list(range(2, x.rank))
    unit, inverse = standardized(x, axes, epsilon)
    return through_statistics(g * batch_scale(x, scale, x.rank), unit, inverse, axes)


def instance_scale(g: Tensor, y: Tensor, x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Σ g x̂ of every channel."""
    return (g * standardized(x, list(range(2, x.rank)), epsilon)[0]).sum([0, *range(2, x.rank)])


def lp_normalized(g: Tensor, y: Tensor, x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """(g - y Σ g y) / ‖x‖, for the 2-norm."""
    if p != 2:
        raise NoGradient("its p is 1")
    norm = (x * x).sum([axis], keepdims=True).op("Sqrt")
    return (g - y * (g * y).sum([axis], keepdims=True)) / norm


REDUCTIONS: dict[str, tuple[Vjp | None, ...]] = {
    "ReduceL1": reduction(lambda g, y, x, axes: g * x.op("Sign")),
    "ReduceL2": reduction(lambda g, y, x, axes: g * x / y),
    "ReduceLogSum": reduction(lambda g, y, x, axes: g / y.op("Exp")),
    "ReduceLogSumExp": reduction(lambda g, y, x, axes: g * (x - y).op("Exp")),
    "ReduceMax": reduction(extreme),
    "ReduceMean": reduction(mean),
    "ReduceMin": reduction(extreme),
    "ReduceSum": reduction(lambda g, y, x, axes: g),
    "ReduceSumSquare": reduction(lambda g, y, x, axes: 2 * g * x),
    "Softmax": (softmax,),
    "LogSoftmax": (log_softmax,),
    "BatchNormalization": (
        batch_input, batch_scales,
        lambda g, y, x, scale, bias, mean, var: g.sum([0, *range(2, x.rank)]).cast(bias), None, None,
    ),
    "LayerNormalization": (
        layer_input, layer_scale, lambda g, y, x, scale, bias: unbroadcast(g, x.sizes, bias),
    ),
    "InstanceNormalization": (
        instance_input, instance_scale, lambda g, y, x, scale, bias: g.sum([0, *range(2, x.rank)]),
    ),
    "LpNormalization": (lp_normalized,),
}  # fmt: skip
