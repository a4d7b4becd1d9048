"""Undoing a broadcast: the gradient of a tensor that was repeated is the sum over its copies."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcop.gradient.builder import INT64, Size, Tensor


def unbroadcast(g: Tensor, sizes: Sequence[Size], x: Tensor) -> Tensor:
    """Sums of a gradient over the axes along which `x` was repeated.

    Args:
        g: A gradient with the shape of the result.
        sizes: What is known of the result's shape.
        x: The operand, whose shape the sum gets.
    """
    lead = len(sizes) - x.rank
    summed = list(range(lead))
    unknown = False
    for axis, (mine, theirs) in enumerate(zip(x.sizes, sizes[lead:], strict=True), start=lead):
        if mine == theirs and mine is not None:
            continue
        if mine == 1:
            summed.append(axis)
        elif not isinstance(mine, int):
            unknown = True
    if unknown:  # axes of size 1 are known only at run time
        ones = x.dims().equals(1).op("Cast", elem_type=INT64, to=INT64).op("NonZero").reshape([-1])
        if lead:
            g = g.sum(range(lead))
        return g.op("ReduceSum", ones, keepdims=1, noop_with_empty_axes=1)
    if not summed:
        return g
    if len(summed) == lead:
        return g.sum(summed)
    g = g.sum(summed, keepdims=True)
    return g.reshape(x.dims()) if lead else g
