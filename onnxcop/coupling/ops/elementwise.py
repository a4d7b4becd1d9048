"""Operators that act on every element alone, with broadcasting between operands."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.op import Decline, Label, Op


def unary(op: Op) -> None:
    """Output i equals input 0 in shape: `... -> ...`.

    Exact: every axis.
    """
    for position in range(len(op.node.output)):
        op.emit(op.label(0), position)


def dropout(op: Op) -> None:
    """Dropout, with its optional mask output; ratio and training mode are no data.

    Exact: every axis.
    Frozen: all axes in training mode.
    """
    training = op.value(2)
    if op.has(2) and (training is None or training.any()):
        raise Decline("Dropout in training mode")
    unary(op)


def broadcast(op: Op) -> None:
    """All inputs broadcast against each other, as numpy does.

    Exact: every axis, tied between the operands; constants are cut too.
    Frozen: axes combined with one that is never pruned.
    """
    op.emit(broadcast_labels(op, range(op.count)))


def comparison(op: Op) -> None:
    """Comparisons, which broadcast. Over an axis of constants alone they make a one-hot encoding.

    Exact: every axis, tied between the operands; constants are cut too.
    Frozen: axes combined with one that is never pruned, and those of constants alone.
    """
    label = broadcast_labels(op, range(op.count))
    data = [position for position in range(op.count) if not op.constant(position)]
    for axis in range(-len(label), 0) if data else ():
        if all(len(op.shape(p)) < -axis or op.shape(p)[axis] == 1 for p in data):
            op.freeze(label[axis], "one-hot encoding")
    op.emit(label)


def clip(op: Op) -> None:
    """Clip: the bounds are scalars.

    Exact: every axis.
    """
    unary(op)


def broadcast_labels(op: Op, positions: Sequence[int] | range, skip_last: int = 0) -> Label:
    """Tie the operands' axes that meet, and return the label of the result.

    Args:
        op: The node.
        positions: Which inputs take part.
        skip_last: How many trailing axes do not broadcast (a matrix product's two).

    Returns:
        One entry per broadcast axis. An axis of one operand stretched over another's is rigid there.
    """
    if op.opset < 7 and "broadcast" in op.attributes:
        raise Decline("broadcasting by attribute, as before opset 7")
    given = [position for position in positions if op.has(position)]
    cut = {p: len(op.shape(p)) - skip_last for p in given}
    shapes = {p: op.shape(p)[: cut[p]] for p in given}
    labels = {p: op.label(p)[: cut[p]] for p in given}
    rank = max((len(shape) for shape in shapes.values()), default=0)
    result: list[IntArray | None] = []
    for axis in range(-rank, 0):
        size = max((shape[axis] for shape in shapes.values() if len(shape) >= -axis), default=1)
        result.append(tie_axis(op, axis, size, shapes, labels))
    return tuple(result)


def tie_axis(
    op: Op, axis: int, size: int, shapes: dict[int, tuple[int, ...]], labels: dict[int, Label]
) -> IntArray | None:
    """Tie one axis of all operands that have it at full size."""
    full = [p for p, shape in shapes.items() if len(shape) >= -axis and shape[axis] == size]
    if size == 1:
        return None
    first = labels[full[0]][axis]
    for position in full[1:]:
        first = op.tie(first, labels[position][axis])
    if first is None:
        for position in full:
            op.freeze(labels[position][axis], "is combined with an axis that is never pruned")
    return first


def per_channel(op: Op, axis: int, parameters: Sequence[int]) -> None:
    """Tie axis `axis` of input 0 with the only axis of each parameter input; the rest passes through."""
    label = list(op.label(0))
    live = label[axis]
    for position in parameters:
        if op.has(position) and op.shape(position) not in ((), (1,)):
            live = op.tie(live, op.label(position)[0])
    label[axis] = live
    op.emit(label)
    for position in range(1, len(op.node.output)):
        op.emit((), position)


def prelu(op: Op) -> None:
    """PRelu: the slope broadcasts to the input (only one way).

    Exact: every axis; the slope is cut too.
    Frozen: axes combined with one that is never pruned.
    """
    op.emit(broadcast_labels(op, (0, 1)))


def where(op: Op) -> None:
    """Where: condition and both values broadcast.

    Exact: every axis, tied between the operands.
    Frozen: axes combined with one that is never pruned.
    """
    broadcast(op)


def quantize(op: Op) -> None:
    """QuantizeLinear and DequantizeLinear, per tensor or per axis; blocked scales are declined.

    Exact: every axis; scales and zero points of an axis are cut too.
    Frozen: all axes if scales come in blocks.
    """
    if op.attr("block_size", 0):
        raise Decline("blocked quantization")
    rank = len(op.shape(0))
    if rank == 0:
        op.emit(())
        return
    per_channel(op, op.attr("axis", 1) % rank, (1, 2))


def batch_normalization(op: Op) -> None:
    """BatchNormalization: `n c ..., c, c, c, c -> n c ...`, exact per channel.

    Exact: every axis; the parameters are cut by channel.
    Frozen: all axes in training mode, or with parameters for every element.
    """
    if op.attr("training_mode", 0) or op.attr("is_test", 1) == 0:
        raise Decline("BatchNormalization in training mode")
    if op.attr("spatial", 1) == 0:
        raise Decline("BatchNormalization with parameters for every element")
    per_channel(op, 1, (1, 2, 3, 4))
