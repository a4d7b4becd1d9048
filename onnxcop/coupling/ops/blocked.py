"""Operators whose weights are packed in blocks, and mixtures of experts."""

from __future__ import annotations

import numpy as np

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.facts import Contraction
from onnxcop.coupling.ops.op import Decline, Op
from onnxcop.graph.linear import Kernel

_RIGID = "is contracted with an axis that is never pruned"
_PACKED = "is packed into bytes"


def matmul_nbits(op: Op) -> None:
    """MatMulNBits: a [*, k], weights of n bits [n, blocks, bytes], scales, zero points, order, bias.

    Exact: columns; whole blocks of the axis summed over, as many as share a byte of zero points.
    Frozen: all axes if scales or zero points are stored flat, or columns have an order of their own.
    """
    if op.has(4) or op.attr("weight_prepacked", 0):
        raise Decline("MatMulNBits whose weights are stored in an order of their own")
    if not all(op.constant(position) for position in (1, 2, 3) if op.has(position)):
        raise Decline("MatMulNBits whose weights are computed")
    if any(len(op.shape(position)) != rank for position, rank in ((1, 3), (2, 2), (3, 2)) if op.has(position)):
        raise Decline("MatMulNBits with scales or zero points in one row")
    a, (columns, blocks, packed) = op.label(0), op.label(1)
    width, count = op.shape(0)[-1], op.shape(1)[1]
    op.freeze(packed, _PACKED)
    for position in (2, 3):
        if op.has(position):
            columns = op.tie(columns, op.label(position)[0])
            blocks = op.tie(blocks, _spread(op, position, 1, count))
    if op.has(5):
        columns = op.tie(columns, op.label(5)[0])
    summed = op.tie(a[-1], None if blocks is None else np.repeat(blocks, int(op.attr("block_size")))[:width], _RIGID)
    op.drop(blocks)
    op.size("K", 0, summed)
    op.size("N", 0, columns)
    op.contract((0, len(a) - 1))
    _measured_by(op, 2, (1, 0), columns)
    rows = [size if live is None else live for live, size in zip(a[:-1], op.shape(0)[:-1], strict=True)]
    op.macs(1.0, *rows, width if summed is None else summed, op.shape(1)[0] if columns is None else columns)
    op.emit((*a[:-1], columns))


def mixture_of_experts(op: Op) -> None:
    """MoE: x [*, c], probabilities of experts, weights and bias [experts, …] of a first layer, a second and a third.

    Exact: channels of the input, which are those of the output; inner channels, of all experts alike.
    Frozen: experts and tokens.
    """
    layers = [(weights, weights + 1) for weights in (2, 4, 6) if op.has(weights)]
    for weights, bias in layers:
        if not op.constant(weights) or len(op.shape(weights)) != 3:
            raise Decline("MoE whose weights are computed")
        for position in (weights, bias):
            if op.has(position):
                op.freeze(op.label(position)[0], "is an expert")
    op.freeze_axes(1, range(len(op.label(1))), "holds probabilities of experts")
    x, inner = op.label(0), op.label(4)[2]
    columns = op.tie(x[-1], op.label(4)[1], _RIGID)
    op.freeze_axes(0, range(len(x) - 1), "is a token")
    gates = op.shape(2)[1] // op.shape(4)[2]
    for weights, bias in layers:
        made = columns if weights == 4 else _gated(op, inner, gates if weights == 2 else 1)
        made = op.tie(op.label(weights)[1], made)
        if op.has(bias):
            made = op.tie(made, op.label(bias)[1])
        op.contract(*([] if weights == 4 else [(0, len(x) - 1)]), (weights, 2))
        _measured_by(op, weights, (2, 1), made)
    size, width = op.shape(4)[2], op.shape(0)[-1]
    tokens = float(np.prod(op.shape(0)[:-1])) * int(op.attr("k", 1))
    op.macs(
        tokens * (gates + (len(layers) > 2)), x[-1] if x[-1] is not None else width, size if inner is None else inner
    )
    op.macs(tokens, size if inner is None else inner, op.shape(4)[1] if columns is None else columns)
    op.emit((*(None for _ in x[:-1]), columns))


def _gated(op: Op, inner: IntArray | None, gates: int) -> IntArray | None:
    """The inner channels as the first layer makes them, interleaved with gates if it computes these too."""
    if inner is None or gates == 1:
        return inner
    return np.repeat(inner, gates) if int(op.attr("swiglu_fusion", 0)) == 1 else np.tile(inner, gates)


def _measured_by(op: Op, position: int, axes: tuple[int, int], produced: IntArray | None) -> None:
    """State that an input [in, out by `axes`] measures the size of the filters that make channels."""
    kernel = Kernel(input=position, in_axis=axes[0], out_axis=axes[1], kind="other")
    op.findings.contractions.append(Contraction(op.index, (), kernel, produced))


def _spread(op: Op, position: int, axis: int, count: int) -> IntArray | None:
    """The atoms of an axis, each as often as it stands for several of `count` indices."""
    live = op.label(position)[axis]
    return None if live is None else np.repeat(live, -(-count // len(live)))[:count]
