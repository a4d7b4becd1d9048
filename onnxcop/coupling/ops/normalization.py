"""Operators that compute a statistic over axes. Pruning such an axis changes the statistic."""

from __future__ import annotations

from onnxcop.coupling.ops.elementwise import per_channel
from onnxcop.coupling.ops.op import Decline, Op


def instance_normalization(op: Op) -> None:
    """InstanceNormalization: statistics over space, so channels are exact: `n c *, c, c -> n c *`.

    Exact: channels; the parameters are cut too.
    Inexact: space, which holds channels if a GroupNormalization is written this way.
    """
    for live in op.label(0)[2:]:
        op.inexact(live, "statistics over the pruned axis")
    per_channel(op, 1, (1, 2))


def layer_normalization(op: Op) -> None:
    """LayerNormalization (and simplified): statistics over the axes from `axis` on.

    Exact: axes before `axis`.
    Inexact: normalized axes; the parameters are cut too.
    """
    label, rank = op.label(0), len(op.shape(0))
    first = op.attr("axis", -1) % rank
    live = list(label)
    for position in (1, 2):
        if op.has(position):
            parameter, offset = op.label(position), rank - len(op.shape(position))
            for axis in range(max(first, offset), rank):
                if op.shape(position)[axis - offset] > 1:
                    live[axis] = op.tie(live[axis], parameter[axis - offset])
    for axis in range(first, rank):
        op.inexact(live[axis], "statistics over the pruned axis")
    op.emit(live)
    for position in (1, 2):
        op.emit((*live[:first], *(None for _ in range(first, rank))), position)


def group_normalization(op: Op) -> None:
    """GroupNormalization: whole groups are exact; otherwise an equal share of every group is not.

    Exact: whole groups.
    Inexact: an equal share of every group.
    Frozen: space.
    """
    shape, label = op.shape(0), op.label(0)
    groups = int(op.attr("num_groups", 1))
    op.freeze_axes(0, range(2, len(shape)), "spatial axis of a normalization")
    if label[1] is None:
        op.freeze(op.label(1)[0], "scales an axis that is never pruned")
        op.freeze(op.label(2)[0], "shifts an axis that is never pruned")
        op.emit((label[0], None, *(None for _ in shape[2:])))
        return
    channels = label[1].reshape(groups, -1)
    per_group = op.shape(1)[0] == groups and groups != shape[1]
    whole = groups > 1 and op.choose(2, label[1], 0) == 0
    if whole:
        op.tie(channels.reshape(-1), channels[:, :1].repeat(channels.shape[1], axis=1).reshape(-1))
        op.ratio("num_groups", label[1], channels.shape[1])
    else:
        op.tie(channels.reshape(-1), channels[:1].repeat(groups, axis=0).reshape(-1))
        op.inexact(label[1], "statistics over the pruned axis")
    for position in (1, 2):
        parameter = op.label(position)[0]
        if not per_group:
            op.tie(label[1], parameter)
        elif whole:
            op.tie(channels[:, 0].copy(), parameter)
        else:
            op.freeze(parameter, "one value per group")
    op.emit((label[0], label[1], *(None for _ in shape[2:])))


def over_axis(op: Op) -> None:
    """LpNormalization: a norm over `axis`.

    Exact: the other axes.
    Inexact: the normalized axis.
    """
    label = op.label(0)
    op.inexact(label[op.attr("axis", -1)], "statistics over the pruned axis")
    op.emit(label)


def mean_variance(op: Op) -> None:
    """MeanVarianceNormalization over the given axes (batch and space by default).

    Exact: the other axes.
    Inexact: the axes of the statistic.
    """
    label = op.label(0)
    for axis in op.attr("axes", [0, 2, 3]):
        op.inexact(label[axis], "statistics over the pruned axis")
    op.emit(label)


def local_response(op: Op) -> None:
    """LRN sums over neighbouring channels, and pruning changes who the neighbours are.

    Exact: the batch.
    Inexact: channels.
    Frozen: space.
    """
    label = op.label(0)
    op.inexact(label[1], "statistics over neighbouring channels")
    op.freeze_axes(0, range(2, len(label)), "spatial axis of a normalization")
    op.emit((label[0], label[1], *(None for _ in label[2:])))


def softmax(op: Op) -> None:
    """Softmax, LogSoftmax, Hardmax: before opset 13 over all axes from `axis` on.

    Exact: the other axes.
    Frozen: its axis; before opset 13 all from `axis` on.
    """
    label, rank = list(op.label(0)), len(op.shape(0))
    axis = op.attr("axis", -1 if op.opset >= 13 else 1) % max(rank, 1)
    for frozen in range(axis, axis + 1 if op.opset >= 13 else rank):
        op.freeze(label[frozen], f"{op.node.op_type} over this axis", given=True)
        label[frozen] = None
    op.emit(label)


def along_axis(op: Op) -> None:
    """CumSum, TopK, ArgMax and their like: the order along the axis matters.

    Exact: the other axes.
    Frozen: its axis.
    """
    label, rank = list(op.label(0)), len(op.shape(0))
    default = -1 if op.node.op_type == "TopK" else 0
    if op.node.op_type in ("CumSum", "CumProd"):
        axis_value = op.value(1)
        if axis_value is None:
            raise Decline("an axis computed from data")
        axis = int(axis_value.reshape(-1)[0])
    else:
        axis = int(op.attr("axis", default))
    axis %= rank
    op.freeze(label[axis], f"{op.node.op_type} over this axis")
    label[axis] = None
    if op.node.op_type.startswith("Arg") and not op.attr("keepdims", 1):
        del label[axis]
    for position in range(len(op.node.output)):
        op.emit(label, position)
