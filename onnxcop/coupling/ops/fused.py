"""Operators that stand for several, as onnxruntime's optimizer makes them: a layer with what follows it."""

from __future__ import annotations

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.contraction import _axis, _batch_labels, _convolution
from onnxcop.coupling.ops.elementwise import broadcast_labels
from onnxcop.coupling.ops.facts import Kernel
from onnxcop.coupling.ops.op import Decline, Op


def fused_conv(op: Op) -> None:
    """FusedConv: a Conv, then the sum with a fourth input, then an activation.

    Exact: input channels and filters, as for Conv; those of the sum are tied.
    Frozen: space.
    """
    _convolution(op, Kernel(input=1, in_axis=1, out_axis=0, groups=int(op.attr("group", 1)), bias=2, kind="conv"))
    if op.has(3):
        op.freeze_axes(3, range(2, len(op.shape(3))), "is added to what is convolved over")
        made, added = op.labels_out[0], op.label(3)
        if made is not None:
            op.emit((op.tie(made[0], added[0]), op.tie(made[1], added[1]), *made[2:]))


def fused_matmul(op: Op) -> None:
    """FusedMatMul: a scaled MatMul of operands that may be transposed.

    Exact: rows, columns, batch axes and the axis summed over.
    Frozen: all axes of a vector, or where the first axis is moved to the rows.
    """
    left, right = op.shape(0), op.shape(1)
    if op.attr("transBatchA", 0) or op.attr("transBatchB", 0) or len(left) < 2 or len(right) < 2:
        raise Decline("FusedMatMul of an unusual form")
    a_in = len(left) - (2 if op.attr("transA", 0) else 1)
    b_in = len(right) - (1 if op.attr("transB", 0) else 2)
    a_out, b_out = 2 * len(left) - 3 - a_in, 2 * len(right) - 3 - b_in
    rows, columns = op.label(0)[a_out], op.label(1)[b_out]
    kernel: Kernel | None = None
    produced: IntArray | None = None
    if op.constant(1) and len(right) == 2:
        kernel, produced = Kernel(input=1, in_axis=b_in, out_axis=b_out, groups=1, kind="matmul"), columns
    elif op.constant(0) and len(left) == 2:
        kernel, produced = Kernel(input=0, in_axis=a_in, out_axis=a_out, groups=1, bias=None, kind="matmul_left"), rows
    op.contract((0, a_in), (1, b_in), kernel=kernel, produced=produced)
    batch = _batch_labels(op, 0, 1) if len(left) > 2 or len(right) > 2 else ()
    label = (*batch, rows, columns)
    sizes = [_axis(live, size) for live, size in zip(label, op.out_shape(), strict=True)]
    summed = op.label(1)[b_in] if op.label(0)[a_in] is not None else None
    op.macs(1.0, *sizes, _axis(summed, right[b_in]))
    op.emit(label)


def with_bias(op: Op) -> None:
    """BiasGelu, FastGelu: a bias, which may be left out, and an activation.

    Exact: every axis; the bias is cut along.
    Frozen: axes that meet one that is never pruned.
    """
    op.emit(broadcast_labels(op, (0, 1)))


def skip_normalization(op: Op) -> None:
    """SkipLayerNormalization (and simplified): the sum of x, skip and bias, normalized over the last axis.

    Exact: batch and sequence.
    Inexact: the last axis; the parameters are cut along. The sum itself, another output, is exact.
    """
    simplified = "Simplified" in op.node.op_type
    parameters = (2, 3) if simplified else (2, 3, 4)
    label = list(broadcast_labels(op, (0, 1)))
    for position in parameters:
        if op.has(position) and op.shape(position)[0] > 1:
            label[-1] = op.tie(label[-1], op.label(position)[0])
    op.inexact(label[-1], "statistics over the pruned axis")
    op.emit(label)
    for position in (1, 2):
        op.emit((*label[:-1], None), position)
    op.emit(label, 3)


def embed_normalization(op: Op) -> None:
    """EmbedLayerNormalization: the sum of three embeddings, normalized.

    Inexact: the width of the embeddings; the parameters are cut along.
    Frozen: tokens, positions and segments.
    """
    tables, parameters = (2, 3, 4), (5, 6)
    width: IntArray | None = None
    for number, position in enumerate(p for p in (*tables, *parameters) if op.has(p)):
        live = op.label(position)[-1]
        width = live if number == 0 else op.tie(width, live)
    for position in (0, 1, *tables, 7, 8):
        if op.has(position):
            axes = range(len(op.label(position)) - (1 if position in tables else 0))
            op.freeze_axes(position, axes, "is indexed by data")
    op.inexact(width, "statistics over the pruned axis")
    op.emit((None, None, width))
    op.emit((None, None, width), 2)
