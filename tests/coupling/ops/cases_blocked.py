"""Cases for weights that are packed in blocks, and for mixtures of experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ops.cases_contraction import _bytes
from ops.draws import shapes, some_axes, total
from ops.sample import Array, Sample, floats, positive

Draw = Any
Cases = dict[tuple[str, str], st.SearchStrategy[Sample]]
MICROSOFT = "com.microsoft"
BLOCK = 16  # the smallest that onnxruntime takes


@st.composite
def _matmul_nbits(draw: Draw) -> Sample:
    rows, columns = draw(shapes(1, 2)), draw(st.integers(2, 5))
    blocks, bits = draw(st.integers(1, 4)), draw(st.sampled_from([4, 8]))
    width = blocks * BLOCK - draw(st.sampled_from([0, 5]))
    live = draw(some_axes((*rows, width)))
    inputs: tuple[Array | None, ...] = (
        floats((*rows, width)), _bytes((columns, blocks, BLOCK * bits // 8), 1), positive((columns, blocks)) * 0.01,
    )  # fmt: skip
    together = 1
    zeros = draw(st.sampled_from(["none", "packed", *(["floats"] if bits == 4 else [])]))  # all that it takes
    if zeros == "packed":
        inputs = (*inputs, _bytes((columns, -(-blocks * bits // 8)), 2))
        together = 8 // bits
    elif zeros == "floats":
        inputs = (*inputs, positive((columns, blocks)) * 8)
    if draw(st.booleans()):
        inputs = (*inputs, *[None] * (5 - len(inputs)), floats((columns,), 5))
    groups = -(-blocks // together)
    units = columns + total(rows, [axis for axis in live if axis < len(rows)])
    units += groups if len(rows) in live and groups > 1 else 0
    attributes = {"K": width, "N": columns, "bits": bits, "block_size": BLOCK}
    # One block is one unit, which the layer cannot spare.
    return Sample("MatMulNBits", inputs, {0: live}, attributes, units=None if groups == 1 else units, domain=MICROSOFT)


@st.composite
def _experts(draw: Draw) -> Sample:
    # ONNX Runtime 1.31 lets a MoE of two axes write over the input that it still reads, if nothing else reads it.
    tokens, count = (2, draw(st.integers(2, 3))), draw(st.integers(2, 4))
    width, inner = 8, 4 * draw(st.integers(1, 3))
    kind, fusion = draw(st.sampled_from([("relu", 0), ("gelu", 0), ("silu", 0), ("swiglu", 1)]))
    gates = 2 if fusion else 1
    attributes: dict[str, Any] = {"k": draw(st.integers(1, count)), "activation_type": kind}
    if fusion:
        attributes["swiglu_fusion"] = fusion
    biased = draw(st.booleans())
    inputs: tuple[Array | None, ...] = (
        floats((*tokens, width)), floats((int(np.prod(tokens)), count), 1),
        floats((count, gates * inner, width), 2) * 0.3, floats((count, gates * inner), 3) if biased else None,
        floats((count, width, inner), 4) * 0.3, floats((count, width), 5) if biased else None,
    )  # fmt: skip
    live = (len(tokens),)
    return Sample("MoE", inputs, {0: live}, attributes, units=width + inner, domain=MICROSOFT)


CASES: Cases = {(MICROSOFT, "MatMulNBits"): _matmul_nbits(), (MICROSOFT, "MoE"): _experts()}
