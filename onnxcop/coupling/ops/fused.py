"""Operators that replace several, as onnxruntime's optimizer makes them: a layer with what follows it."""

from __future__ import annotations

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.contraction import couple_convolution, couple_product
from onnxcop.coupling.ops.elementwise import broadcast_labels
from onnxcop.coupling.ops.op import Decline, Op
from onnxcop.graph.linear import convolution


def fused_conv(op: Op) -> None:
    """FusedConv: a Conv, then the sum with a fourth input, then an activation.

    Exact: input channels and filters, as for Conv; those of the sum are tied.
    Frozen: space.
    """
    couple_convolution(op, convolution(op.node))
    if op.has(3):
        op.freeze_axes(3, range(2, len(op.shape(3))), "is added to the spatial axis of a convolution")
        made, added = op.labels_out[0], op.label(3)
        if made is not None:
            op.emit((op.tie(made[0], added[0]), op.tie(made[1], added[1]), *made[2:]))


def fused_matmul(op: Op) -> None:
    """FusedMatMul: a scaled MatMul of operands that may be transposed.

    Exact: rows, columns, batch axes and the axis summed over.
    Frozen: all axes of a vector; all axes if the first axis is moved to the rows.
    """
    ranks = (len(op.shape(0)), len(op.shape(1)))
    if op.attr("transBatchA", 0) or op.attr("transBatchB", 0) or min(ranks) < 2:
        raise Decline("FusedMatMul of an unusual form")
    couple_product(op, 0, 1)


def with_bias(op: Op) -> None:
    """BiasGelu, FastGelu: a bias, which may be left out, and an activation.

    Exact: every axis; the bias is cut too.
    Frozen: axes combined with one that is never pruned.
    """
    op.emit(broadcast_labels(op, (0, 1)))


def skip_normalization(op: Op) -> None:
    """SkipLayerNormalization (and simplified): the sum of x, skip and bias, normalized over the last axis.

    Exact: batch and sequence.
    Inexact: the last axis; the parameters are cut too. The sum itself, another output, is exact.
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

    Inexact: the width of the embeddings; the parameters are cut too.
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
            op.freeze_axes(position, axes, "is indexed by values computed from data")
    op.inexact(width, "statistics over the pruned axis")
    op.emit((None, None, width))
    op.emit((None, None, width), 2)
