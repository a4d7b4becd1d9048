"""LSTM, GRU and RNN: the input width is a contraction, the hidden size a family of tied axes."""

from __future__ import annotations

import numpy as np

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.op import Decline, Op
from onnxcop.graph.linear import Kernel

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
X, W, R, B, LENGTHS, H0, C0, P = range(8)
_WHY = "belongs to a recurrent state that is given or never pruned"


def recurrent(op: Op) -> None:
    """One hidden atom represents its rows in every gate of W, R, B and P, and its state.

    Exact: the input's width; the hidden size if there is no initial state, or one that is
        stored or computed by the graph.
    Frozen: sequence, batch and directions; the hidden size if a state is an input;
        all axes with batch-major layout.
    """
    if len(op.shape(X)) != 3:
        raise Decline(f"a recurrent layer of an input with {len(op.shape(X))} axes")
    if op.attr("layout", 0):
        raise Decline("a recurrent layer with batch-major layout")
    gates = _GATES[op.node.op_type]
    op.freeze_axes(X, (0, 1), "is a sequence or a batch")
    if op.has(LENGTHS):
        op.freeze_axes(LENGTHS, range(len(op.label(LENGTHS))), "holds lengths")
    rows = op.shape(W)[1]
    op.contract(
        (X, 2),
        (W, 2),
        kernel=Kernel(input=W, in_axis=2, out_axis=1, kind="recurrent"),
        produced=op.label(W)[1],
    )
    hidden = _hidden(op, rows // gates, gates)
    shape = op.shape(X)
    inner = op.label(W)[2]
    width: IntArray | int = inner if inner is not None else shape[2]
    state: IntArray | int = hidden if hidden is not None else rows // gates
    steps = float(shape[0] * shape[1] * op.shape(W)[0] * gates)
    op.macs(steps, state, width)
    op.macs(steps, state, state)
    op.emit((None, None, None, hidden), 0)
    op.emit((None, None, hidden), 1)
    op.emit((None, None, hidden), 2)


def _hidden(op: Op, size: int, gates: int) -> IntArray | None:
    """Tie every axis that runs over the hidden size; None if it cannot be pruned."""
    rows = [(W, 1, gates), (R, 1, gates), (R, 2, 1)]
    if op.has(B):
        rows.append((B, 1, 2 * gates))
    if op.has(H0):
        rows.append((H0, 2, 1))
    if op.has(C0) and op.node.op_type == "LSTM":
        rows.append((C0, 2, 1))
    if op.has(P) and op.node.op_type == "LSTM":
        rows.append((P, 1, 3))
    labels = [(op.label(position)[axis], times) for position, axis, times in rows]
    for position in (W, R, B, H0, C0, P):
        if op.has(position) and len(op.label(position)) > 0:
            op.freeze(op.label(position)[0], "is a direction")
            if position in (H0, C0):
                op.freeze(op.label(position)[1], "is a batch")
    if size == 1 or any(label is None for label, _ in labels) or not op.constant(R):
        why = "belongs to a recurrent layer whose weights are computed" if not op.constant(R) else _WHY
        for label, _ in labels:
            op.freeze(label, why)
        return None
    hidden = op.pool.allocate(size)
    for label, times in labels:
        if label is not None:
            op.tie(label, np.tile(hidden, times))
    op.contract((R, 2))
    op.size("hidden_size", 0, hidden)
    return hidden
