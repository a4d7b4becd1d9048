"""Operators that sum over channels: convolutions, matrix products, Einsum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.elementwise import broadcast_labels
from onnxcop.coupling.ops.facts import Contraction, Operand
from onnxcop.coupling.ops.op import Decline, Label, Op
from onnxcop.graph.linear import Kernel, convolution, deconvolution, einsum_terms, einsum_weights, flipped, matrix


def conv(op: Op) -> None:
    """Conv: `n c *, o c *, o -> n o *`, with groups.

    Exact: input channels and filters; whole groups, or one stripe of inputs
        across all groups and equally many filters of each.
    Frozen: space.
    """
    couple_convolution(op, convolution(op.node))


def conv_transpose(op: Op) -> None:
    """ConvTranspose: `n c *, c o *, o -> n o *`, with groups (c over all groups, o of one).

    Exact: input channels and filters; whole groups, or one stripe across all groups.
    Frozen: space.
    """
    couple_convolution(op, deconvolution(op.node))


def conv_integer(op: Op) -> None:
    """ConvInteger: x, w, x_zero_point, w_zero_point.

    Exact: input channels and filters, as for Conv; zero points are cut too.
    Frozen: space.
    """
    couple_convolution(op, replace(convolution(op.node), bias=None, zero=3), tied=(3,))


def qlinear_conv(op: Op) -> None:
    """QLinearConv: x and w each with scale and zero point, then y's, then the bias.

    Exact: input channels and filters, as for Conv; scales, zero points and bias are cut too.
    Frozen: space.
    """
    couple_convolution(op, replace(convolution(op.node), input=3, bias=8, zero=5), tied=(4, 5))


def couple_convolution(op: Op, kernel: Kernel, tied: tuple[int, ...] = ()) -> None:
    """Couple input, weights and per-channel parameters of a convolution, and count its cost."""
    if kernel.zero is not None and not op.constant(kernel.input):
        raise Decline("integer convolution whose weights are not constant")
    x_shape, w_shape, out_shape = op.shape(0), op.shape(kernel.input), op.out_shape()
    x, w = op.label(0), op.label(kernel.input)
    op.freeze_axes(0, range(2, len(x)), "spatial axis of a convolution")
    op.freeze_axes(kernel.input, range(2, len(w)), "spatial axis of a kernel")
    if kernel.groups == 1:
        produced, summed = w[kernel.out_axis], w[kernel.in_axis]
        op.contract((0, 1), (kernel.input, kernel.in_axis), kernel=kernel, produced=produced)
    else:
        produced, summed = _grouped(op, kernel)
    for position in (kernel.bias, *tied):
        if position is not None and op.has(position) and op.shape(position) not in ((), (1,)):
            produced = op.tie(produced, op.label(position)[0])
    taps = float(np.prod(w_shape[2:]))
    space = out_shape[2:] if kernel.kind == "conv" else x_shape[2:]
    per_group_in = w_shape[1] if kernel.kind == "conv" else x_shape[1] // kernel.groups
    ins: IntArray | int = summed if summed is not None else per_group_in
    outs: IntArray | int = produced if produced is not None else out_shape[1]
    op.macs(out_shape[0] * taps * float(np.prod(space)), ins, outs)
    op.emit((x[0], produced, *(None for _ in out_shape[2:])))


def _grouped(op: Op, kernel: Kernel) -> tuple[IntArray | None, IntArray | None]:
    """Couple a grouped convolution by whole groups, or by one stripe across all groups.

    Returns:
        The atoms of all output channels, and those that one output channel sums over.
    """
    groups, conv_kind = kernel.groups, kernel.kind == "conv"
    channels, w = op.shape(0)[1], op.label(kernel.input)
    outputs = op.out_shape()[1]
    per_in, per_out = channels // groups, outputs // groups
    x = op.label(0)[1]
    # The weights carry all channels on their first axis and one group's on their second.
    total, single = w[0], w[1]
    if total is None or x is None:
        op.freeze(x, "feeds groups whose weights are not constant")
        op.freeze(single, "grouped convolution of channels that are never pruned")
        if total is not None and conv_kind:
            op.balance(total.reshape(groups, -1), "cannot be divided equally among the groups")
        else:
            op.freeze(total, "grouped convolution of channels that are never pruned")
        op.findings.contractions.append(Contraction(op.index, (), kernel, total if conv_kind else None))
        return (total if conv_kind else None), None
    default = 0 if groups >= max(per_in, per_out) else 1
    options = 2 if max(per_in, per_out) > 1 else 1
    whole = op.choose(options, x, default if options == 2 else 0) == 0
    if whole:
        return _whole_groups(op, kernel, x, total, single, per_in, per_out)
    return _stripes(op, kernel, x, total, single)


def _whole_groups(
    op: Op, kernel: Kernel, x: IntArray, total: IntArray, single: IntArray | None, per_in: int, per_out: int
) -> tuple[IntArray | None, IntArray | None]:
    conv_kind = kernel.kind == "conv"
    groups = kernel.groups
    leaders = x[::per_in].copy()
    op.tie(x, np.repeat(leaders, per_in))
    op.tie(total, np.repeat(leaders, per_out if conv_kind else per_in))
    op.freeze(single, "one group's channels, and groups are pruned whole")
    op.ratio("group", x, per_in)
    if conv_kind:
        op.findings.contractions.append(Contraction(op.index, (), kernel, total))
        return total, None
    op.findings.contractions.append(Contraction(op.index, (), kernel, None))
    produced = np.repeat(leaders, op.out_shape()[1] // groups)
    return produced, None


def _stripes(
    op: Op, kernel: Kernel, x: IntArray, total: IntArray, single: IntArray | None
) -> tuple[IntArray | None, IntArray | None]:
    groups = kernel.groups
    if kernel.kind != "conv":
        # Inputs: the first weight axis runs over all groups, like x; outputs: stripes of the second.
        op.tie(x, total)
        stripes = x.reshape(groups, -1)
        op.tie(x, np.tile(stripes[0], groups))
        produced = None if single is None else np.tile(single, groups)
        op.contract((0, 1), (kernel.input, 0), kernel=kernel, produced=produced)
        op.drop(single)
        return produced, x[: len(x) // groups].copy()
    op.balance(total.reshape(groups, -1), "cannot be divided equally among the groups")
    if single is None:
        op.freeze(x, "feeds groups of a single channel")
        return total, None
    op.tie(x, np.tile(single, groups))
    operands = (Operand(0, 1, x), Operand(kernel.input, 1, single))
    op.findings.contractions.append(Contraction(op.index, operands, kernel, total))
    return total, single


def gemm(op: Op) -> None:
    """Gemm: A [m, k] or transposed, B [k, n] or transposed, C broadcast to [m, n].

    Exact: rows, columns and the axis summed over; the bias is cut too.
    """
    a_in = 0 if op.attr("transA", 0) else 1
    b_in = 1 if op.attr("transB", 0) else 0
    a, b = op.label(0), op.label(1)
    rows, columns = a[1 - a_in], b[1 - b_in]
    op.contract((0, a_in), (1, b_in), kernel=matrix(op.node, bias=2), produced=columns)
    if op.has(2):
        bias, shape = op.label(2), op.shape(2)
        if len(shape) >= 1 and shape[-1] > 1:
            columns = op.tie(columns, bias[-1])
        if len(shape) == 2 and shape[0] > 1:
            rows = op.tie(rows, bias[0])
    shapes = op.out_shape()
    op.macs(
        1.0,
        extent(rows, shapes[0]),
        extent(columns, shapes[1]),
        extent(b[b_in], op.shape(1)[b_in]),
    )
    op.emit((rows, columns))


def matmul(op: Op) -> None:
    """MatMul and its integer kin with operands 0 and 1.

    Exact: rows, columns, batch axes and the axis summed over, whichever operand is constant, if
        one is.
    Frozen: axes summed with one that is never pruned.
    """
    couple_product(op, 0, 1)


def qlinear_matmul(op: Op) -> None:
    """QLinearMatMul: operands 0 and 3; per-column parameters of the second are tied.

    Exact: as for MatMul; scales and zero points of columns are cut too.
    Frozen: all axes if rows have scales of their own; the axis summed over, if the second
        operand is not a constant matrix.
    """
    if any(op.has(position) and op.shape(position) not in ((), (1,)) for position in (1, 6)):
        raise Decline("QLinearMatMul with a scale per row")
    couple_product(op, 0, 3, (4, 5), zero=5)


def matmul_integer(op: Op) -> None:
    """MatMulInteger: operands 0 and 1, zero points 2 (rows) and 3 (columns).

    Exact: as for MatMul; zero points of columns are cut too.
    Frozen: all axes if rows have zero points of their own; the axis summed over, if the
        second operand is not a constant matrix.
    """
    if op.has(2) and op.shape(2) not in ((), (1,)):
        raise Decline("MatMulInteger with a zero point per row")
    couple_product(op, 0, 1, (3,), zero=3)


def couple_product(
    op: Op, left: int, right: int, per_column: tuple[int, ...] = (), zero: int | None = None
) -> None:  # fmt: skip
    """Couple a matrix product of two inputs, and count its cost.

    Args:
        op: The node.
        left: Position of the first operand.
        right: Position of the second.
        per_column: Inputs with one value for each column, or one for all.
        zero: Input that holds the zero point of the second operand; None unless it is quantized.
    """
    a_shape, b_shape = op.shape(left), op.shape(right)
    if not a_shape or not b_shape:
        raise Decline("a matrix product with a scalar")
    a, b = op.label(left), op.label(right)
    a_in, a_out = (-2, -1) if flipped(op.node, left) else (-1, -2)
    b_in, b_out = (-1, -2) if flipped(op.node, right) else (-2, -1)
    columns = b[b_out] if len(b_shape) > 1 else None
    rows = a[a_out] if len(a_shape) > 1 else None
    a_in, b_in = len(a_shape) + a_in, max(len(b_shape) + b_in, 0)
    for position in per_column:
        if op.has(position) and op.shape(position) not in ((), (1,)):
            columns = op.tie(columns, op.label(position)[-1])
    kernel, produced = _weights_side(op, left, right, rows, columns, zero)
    if zero is not None and (kernel is None or kernel.zero is None):
        op.freeze(a[a_in], "is contracted in integers with something other than a weight matrix")
        op.freeze(b[b_in], "is contracted in integers with something other than a weight matrix")
    op.contract((left, a_in), (right, b_in), kernel=kernel, produced=produced)
    batch: Label = ()
    if len(a_shape) > 2 or len(b_shape) > 2:
        batch = _batch_labels(op, left, right)
    tail = ([rows] if len(a_shape) > 1 else []) + ([columns] if len(b_shape) > 1 else [])
    label = (*batch, *tail)
    sizes = op.out_shape()
    axes = [extent(live, size) for live, size in zip(label, sizes, strict=True)]
    op.macs(1.0, *axes, extent(b[b_in] if a[a_in] is not None else None, b_shape[b_in]))
    op.emit(label)


def _batch_labels(op: Op, left: int, right: int) -> Label:
    """Broadcast the batch axes of a matrix product (operands of fewer than two axes have none)."""
    given = [p for p in (left, right) if len(op.shape(p)) > 2]
    return broadcast_labels(op, given, skip_last=2)


def _weights_side(
    op: Op, left: int, right: int, rows: IntArray | None, columns: IntArray | None, zero: int | None
) -> tuple[Kernel | None, IntArray | None]:
    """Which operand of a matrix product is constant, if one is."""
    if op.constant(right) and len(op.shape(right)) == 2:
        return replace(matrix(op.node, right), zero=zero), columns
    if op.constant(left) and len(op.shape(left)) == 2:
        return matrix(op.node, left), rows
    return None, None


def extent(live: IntArray | None, size: int) -> IntArray | int:
    """The atoms of an axis, or its size if it is rigid, as :meth:`Op.macs` takes them."""
    return size if live is None else live


def einsum(op: Op) -> None:
    """Einsum: letters shared by operands are tied; letters that the result lacks are summed over.

    Exact: every letter.
    Frozen: all axes if there is an ellipsis, a letter twice in one operand, or a letter that
        broadcasts.
    """
    terms, result = einsum_terms(op.node)
    if "." in "".join(terms):
        raise Decline("Einsum with an ellipsis")
    if any(len(set(term)) != len(term) for term in terms):
        raise Decline("Einsum with a repeated letter in one operand")
    weights = einsum_weights(op.node) if len(terms) == 2 and op.constant(1) else None
    labels: dict[str, IntArray | None] = {}
    sizes: dict[str, int] = {}
    for letter in dict.fromkeys("".join(terms)):
        holders = [(p, term.index(letter)) for p, term in enumerate(terms) if letter in term]
        sizes[letter] = max(op.shape(p)[axis] for p, axis in holders)
        if any(op.shape(p)[axis] != sizes[letter] for p, axis in holders):
            raise Decline("Einsum that broadcasts an axis of size 1")
        if letter in result:
            live = op.label(holders[0][0])[holders[0][1]]
            for p, axis in holders[1:]:
                live = op.tie(live, op.label(p)[axis])
            labels[letter] = live
        else:
            if weights is not None and letter == terms[1][weights.in_axis]:
                op.contract(*holders, kernel=weights, produced=op.label(1)[weights.out_axis])
            else:
                op.contract(*holders)
            labels[letter] = op.label(holders[0][0])[holders[0][1]]
    op.macs(1.0, *(extent(labels[letter], sizes[letter]) for letter in labels))
    op.emit([labels[letter] for letter in result])
