"""Pooling and Reduce* operators."""

from __future__ import annotations

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.op import Op

# A sum of powers ignores zeros, so removing a channel equals masking it.
_SUMS = {"ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"}


def pool(op: Op) -> None:
    """Pooling over space: `n c * -> n c *`, and global pooling to size 1.

    Exact: batch and channels.
    Frozen: space; all axes of a MaxPool that returns indices.
    """
    label = op.label(0)
    op.freeze_axes(0, range(2, len(label)), "spatial axis of a pooling")
    if len(op.node.output) > 1 and op.node.output[1]:
        op.freeze_axes(0, (0, 1), "MaxPool returns indices")
        label = (None,) * len(label)
    for position in range(len(op.node.output)):
        op.emit((label[0], label[1], *(None for _ in label[2:])), position)


def channels_last_pool(op: Op) -> None:
    """NhwcMaxPool: `n * c -> n * c`.

    Exact: batch and channels.
    Frozen: space.
    """
    label = op.label(0)
    rank = len(label)
    op.freeze_axes(0, range(1, rank - 1), "spatial axis of a pooling")
    op.emit((label[0], *(None for _ in label[1:-1]), label[-1]))


def reduce(op: Op) -> None:
    """Reduce*: a sum over channels is a contraction, a mean changes with their number.

    Exact: axes that are not reduced, and axes that Sum, SumSquare, L1 and L2 reduce.
    Inexact: axes that Mean reduces.
    Frozen: axes that the others reduce.
    """
    label, rank = op.label(0), len(op.shape(0))
    axes = op.ints(1, "axes")
    if not axes and op.attr("noop_with_empty_axes", 0):
        op.emit(label)
        return
    reduced = {axis % rank for axis in axes} if axes else set(range(rank))
    live = [axis for axis in sorted(reduced) if label[axis] is not None]
    for axis in live:
        if op.node.op_type in _SUMS:
            op.contract((0, axis))
        elif op.node.op_type == "ReduceMean":
            op.inexact(label[axis], "mean over the pruned axis")
        else:
            op.freeze(label[axis], f"{op.node.op_type} over this axis")
    keep = bool(op.attr("keepdims", 1))
    result: list[IntArray | None] = []
    for axis in range(rank):
        if axis not in reduced:
            result.append(label[axis])
        elif keep:
            result.append(None)
    op.emit(result)
