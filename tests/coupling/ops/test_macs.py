"""Multiply-accumulates that rules state, against counts over the elements of the operands."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from onnxcop.coupling.tracing import trace
from onnxcop.graph.shapes import infer
from ops.oracle import trace_alone
from ops.sample import Sample, floats, positive

MICROSOFT = "com.microsoft"

_BATCH, _INS, _OUTS = 2, 4, 6


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("space", [(5,), (5, 4)], ids=str)
def test_a_deconvolution_multiplies_every_input_with_its_kernels(groups: int, space: tuple[int, ...]) -> None:
    kernel = (3, 2)[: len(space)]
    inputs = (floats((_BATCH, _INS, *space)), floats((_INS, _OUTS // groups, *kernel), 1))
    attributes = {"group": groups, "strides": [2] * len(space)}
    assert _macs(Sample("ConvTranspose", inputs, {0: (1,)}, attributes)) == inputs[0].size * prod(inputs[1].shape[1:])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("space", [(5,), (5, 4)], ids=str)
def test_a_convolution_multiplies_for_every_output(groups: int, space: tuple[int, ...]) -> None:
    kernel = (3, 2)[: len(space)]
    inputs = (floats((_BATCH, _INS, *space)), floats((_OUTS, _INS // groups, *kernel), 1))
    made = _BATCH * _OUTS * prod(size - width + 1 for size, width in zip(space, kernel, strict=True))
    assert _macs(Sample("Conv", inputs, {0: (1,)}, {"group": groups})) == made * prod(inputs[1].shape[1:])


def _macs(sample: Sample) -> float:
    facts = trace_alone(sample).findings.macs
    return sum(fact.scale * prod(len(axis) for axis in fact.axes) for fact in facts)


def _filled(*shapes: tuple[int, ...] | None) -> tuple[Any, ...]:
    return tuple(None if shape is None else floats(shape, seed) for seed, shape in enumerate(shapes))


B, T, S, H, D, E = 2, 3, 5, 4, 6, 2  # batch, queries, keys, heads, dimensions of keys, and of values
PAST = 7
_PRODUCTS = B * T * S * H * (D + E)
_ATTENTION: dict[str, tuple[Sample, int]] = {
    "apart": (
        Sample("MultiHeadAttention", _filled((B, T, H * D), (B, S, H * D), (B, S, H * E)), {}, {"num_heads": H},
               domain=MICROSOFT), _PRODUCTS,
    ),
    "heads of their own": (
        Sample("MultiHeadAttention", _filled((B, T, H * D), (B, H, S, D), (B, H, S, D)), {}, {"num_heads": H},
               domain=MICROSOFT), B * T * S * H * 2 * D,
    ),
    "with projections": (
        Sample("Attention", _filled((B, T, 5), (5, H * (2 * D + E)), (H * (2 * D + E),)), {},
               {"num_heads": H, "qkv_hidden_sizes": [H * D, H * D, H * E]}, domain=MICROSOFT),
        B * T * 5 * H * (2 * D + E) + B * T * T * H * (D + E),
    ),
    "with projections and a past": (
        Sample("Attention", _filled((B, T, 5), (5, 3 * H * D), (3 * H * D,), None, (2, B, H, PAST, D)), {},
               {"num_heads": H}, outputs=2, domain=MICROSOFT),
        B * T * 5 * 3 * H * D + B * T * (T + PAST) * H * 2 * D,
    ),
    "groups of heads with a past": (
        Sample("GroupQueryAttention",
               (*_filled((1, T, H * 16), (1, T, 2 * 16), (1, T, 2 * 16), (1, 2, PAST, 16), (1, 2, PAST, 16)),
                np.array([T + PAST - 1], np.int32), np.array(T + PAST, np.int32)),
               {}, {"num_heads": H, "kv_num_heads": 2}, outputs=3, domain=MICROSOFT),
        T * (T + PAST) * H * 2 * 16,
    ),
    "of ONNX, folded": (
        Sample("Attention", _filled((B, T, H * D), (B, S, 2 * D), (B, S, 2 * E)), {},
               {"q_num_heads": H, "kv_num_heads": 2}, 23), _PRODUCTS,
    ),
    "of ONNX, apart": (Sample("Attention", _filled((B, H, T, D), (B, H, S, D), (B, H, S, E)), {}, {}, 23), _PRODUCTS),
}  # fmt: skip


@pytest.mark.parametrize("name", _ATTENTION)
def test_attention_multiplies_queries_with_keys_and_weights_with_values(name: str) -> None:
    sample, expected = _ATTENTION[name]
    assert _macs(sample) == expected


@pytest.mark.parametrize(
    ("shapes", "keys"), [([(B, T, H, 3, D)], T), ([(B, T, H * D), (B, S, H, 2, D)], S)], ids=["all", "keys and values"]
)
def test_attention_on_packed_tensors(shapes: list[tuple[int, ...]], keys: int) -> None:
    """ONNX Runtime computes them on other devices than the CPU."""
    model = Sample("MultiHeadAttention", _filled(*shapes), {}, {"num_heads": H}, domain=MICROSOFT).stored_model()
    coupling = trace(model, infer(model, {}, {"out0": (TensorProto.FLOAT, (B, T, H * D))}))
    assert coupling.declined == ()
    assert sum(fact.scale * prod(len(axis) for axis in fact.axes) for fact in coupling.findings.macs) == (
        B * T * keys * H * 2 * D
    )


@pytest.mark.parametrize("fusion", [0, 1])
def test_experts_that_are_chosen_multiply(fusion: int) -> None:
    gates, chosen, width, inner, count = 1 + fusion, 2, 8, 12, 4
    inputs = _filled((B, T, width), (B * T, count), (count, gates * inner, width), None, (count, width, inner))
    kind = {"k": chosen, "activation_type": "swiglu" if fusion else "relu", "swiglu_fusion": fusion}
    sample = Sample("MoE", inputs, {}, kind, domain=MICROSOFT)
    assert _macs(sample) == B * T * chosen * (gates + 1) * width * inner


@pytest.mark.parametrize("fed", [[], [0]])
def test_a_product_of_bytes(fed: list[int]) -> None:
    """Sizes that no layer makes count as much as those of stored operands."""
    one, zero = np.array(0.1, np.float32), np.array(9, np.uint8)
    a, b = np.ones((3, 4), np.uint8), np.ones((4, 6), np.uint8)
    attributes = {"transA": 0, "transB": 0, "alpha": 1.0}
    sample = Sample("QGemm", (a, one, zero, b, one, zero, None, one, zero), {}, attributes, domain=MICROSOFT)
    model = sample.fed_model(fed)
    shapes = infer(model, {"in0": (3, 4)} if fed else {}, {"out0": (TensorProto.UINT8, (3, 6))})
    facts = trace(model, shapes).findings.macs
    assert sum(fact.scale * prod(len(axis) for axis in fact.axes) for fact in facts) == 3 * 4 * 6


def test_products_of_matrices() -> None:
    packed = np.zeros((5, 3, 8), np.uint8)
    blocks = Sample("MatMulNBits", (floats((B, T, 48)), packed, positive((5, 3))), {},
                    {"K": 48, "N": 5, "bits": 4, "block_size": 16}, domain=MICROSOFT)  # fmt: skip
    assert _macs(blocks) == B * T * 48 * 5
    assert _macs(Sample("MatMul", _filled((B, T, 4), (4, 6)), {})) == B * T * 4 * 6
    assert _macs(Sample("MatMul", _filled((B, 1, T, 4), (3, 4, 6)), {})) == B * 3 * T * 4 * 6
    assert _macs(Sample("Gemm", _filled((4, T), (6, 4)), {}, {"transA": 1, "transB": 1})) == T * 4 * 6
    assert _macs(Sample("Einsum", _filled((2, 3, 4), (4, 3, 5)), {}, {"equation": "abc,cbd->ad"})) == 2 * 3 * 4 * 5
