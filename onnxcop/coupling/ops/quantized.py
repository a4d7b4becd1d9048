"""Operators that quantize, or compute on quantized tensors, with scales that are themselves tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.contraction import couple_product, extent
from onnxcop.coupling.ops.elementwise import broadcast_labels
from onnxcop.coupling.ops.movement import join
from onnxcop.coupling.ops.op import Decline, Op
from onnxcop.graph.linear import matrix


def _per_tensor(op: Op, positions: Sequence[int]) -> None:
    """Decline if a scale or zero point has more than one value."""
    for position in positions:
        if op.has(position) and op.shape(position) not in ((), (1,)):
            raise Decline(f"{op.node.op_type} with a scale per channel")


def qlinear_unary(op: Op) -> None:
    """QLinearLeakyRelu, QLinearSigmoid: x, its scale and zero point, those of y.

    Exact: every axis.
    Frozen: all axes if there is a scale per channel.
    """
    _per_tensor(op, range(1, op.count))
    op.emit(op.label(0))


def qlinear_binary(op: Op) -> None:
    """QLinearAdd, QLinearMul: a and b, each with scale and zero point, those of the result.

    Exact: every axis, tied between the operands; constants are cut too.
    Frozen: axes combined with one that is never pruned; all axes if there is a scale per channel.
    """
    _per_tensor(op, (1, 2, 4, 5, 6, 7))
    op.emit(broadcast_labels(op, (0, 3)))


def qlinear_concat(op: Op) -> None:
    """QLinearConcat: scale and zero point of the result, then tensors, each with its own.

    Exact: every axis, the joined one included.
    Frozen: all axes if there is a scale per channel.
    """
    _per_tensor(op, [0, 1, *(p for p in range(2, op.count) if p % 3 != 2)])
    join(op, range(2, op.count, 3))


def qlinear_pool(op: Op) -> None:
    """QLinearGlobalAveragePool, QLinearAveragePool: over space, which is last or before channels.

    Exact: batch and channels.
    Frozen: space; all axes if there is a scale per channel.
    """
    _per_tensor(op, range(1, op.count))
    label = op.label(0)
    channel = len(label) - 1 if op.attr("channels_last", 0) else 1
    kept = (0, channel)
    op.freeze_axes(0, [axis for axis in range(len(label)) if axis not in kept], "spatial axis of a pooling")
    op.emit([live if axis in kept else None for axis, live in enumerate(label)])


def qlinear_where(op: Op) -> None:
    """QLinearWhere: a condition, x and y, each with scale and zero point, those of the result.

    Exact: every axis, tied between the operands.
    Frozen: axes combined with one that is never pruned; all axes if there is a scale per channel.
    """
    _per_tensor(op, (2, 3, 5, 6, 7, 8))
    op.emit(broadcast_labels(op, (0, 1, 4)))


def qlinear_softmax(op: Op) -> None:
    """QLinearSoftmax: for an opset before 13, which an attribute names, over all axes from `axis` on.

    Exact: the other axes.
    Frozen: its axis; before opset 13 all from `axis` on.
    """
    _per_tensor(op, range(1, op.count))
    label = list(op.label(0))
    first = int(op.attr("axis", -1)) % len(label)
    last = first + 1 if int(op.attr("opset")) >= 13 else len(label)
    for axis in range(first, last):
        op.freeze(label[axis], "QLinearSoftmax over this axis", given=True)
        label[axis] = None
    op.emit(label)


def qgemm(op: Op) -> None:
    """QGemm: a and b, each with scale and zero point, a bias, scale and zero point of the result.

    Exact: rows, columns and the axis summed over; bias, scales and zero points of columns are cut too.
    Frozen: the axis summed over, if the second operand is not constant.
    """
    _per_tensor(op, (1, 2, 7, 8))
    a_in = 0 if op.attr("transA", 0) else 1
    b_in = 1 if op.attr("transB", 0) else 0
    rows, columns = op.label(0)[1 - a_in], op.label(3)[1 - b_in]
    for position in (4, 5, 6):
        if op.has(position) and op.shape(position) not in ((), (1,)):
            columns = op.tie(columns, op.label(position)[-1])
    kernel = replace(matrix(op.node, 3), zero=5) if op.constant(3) else None
    if kernel is None:
        op.freeze(op.label(0)[a_in], "is contracted in integers with something other than a weight matrix")
    op.contract((0, a_in), (3, b_in), kernel=kernel, produced=columns)
    shape = op.out_shape()
    summed: IntArray | None = op.label(3)[b_in] if op.label(0)[a_in] is not None else None
    op.macs(1.0, extent(rows, shape[0]), extent(columns, shape[1]), extent(summed, op.shape(3)[b_in]))
    op.emit((rows, columns))


def matmul_integer_to_float(op: Op) -> None:
    """MatMulIntegerToFloat: a, b, their scales, their zero points, a bias.

    Exact: as for MatMul; bias, scales and zero points of columns are cut too.
    Frozen: all axes if rows have scales of their own; the axis summed over, if the second
        operand is not a constant matrix.
    """
    _per_tensor(op, (2, 4))
    couple_product(op, 0, 1, (3, 5, 6), zero=5)


def dynamic_quantize_matmul(op: Op) -> None:
    """DynamicQuantizeMatMul: a is quantized by its range while the model runs; b, scale, zero point, bias.

    Exact: columns; their bias, scales and zero points are cut too.
    Inexact: axes of the first operand.
    """
    for live in op.label(0):
        op.inexact(live, "quantized by the range of the whole tensor")
    couple_product(op, 0, 1, (2, 3, 4), zero=3)


def dynamic_quantize(op: Op) -> None:
    """DynamicQuantizeLinear: x is quantized by its range while the model runs.

    Exact: no axis.
    Inexact: every axis.
    """
    for live in op.label(0):
        op.inexact(live, "quantized by the range of the whole tensor")
    op.emit(op.label(0))
    op.emit((), 1)
    op.emit((), 2)
