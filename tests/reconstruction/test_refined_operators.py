"""Every linear operator is refined: the other channels compensate for redundant ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import weights

import onnxcop
from onnxcop.graph.traits import MICROSOFT
from onnxcop.reconstruction.divergence import Reference
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.refine import Refiner, RefineSet
from onnxcop.reconstruction.ridge import merge_channels
from onnxcop.runtime.segments import PartialExecutor
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions(provider="cpu", threads=1)
WIDTH, RANK, MADE = 8, 4, 5  # channels of the first layer, how many of them are independent, channels of the second
Case = tuple[str, Sequence[int], Sequence[int], dict[str, Any]]

CONVOLUTIONS: dict[str, Case] = {
    "one axis": ("Conv", (RANK, 9), (MADE, WIDTH, 3), {}),
    "two axes": ("Conv", (RANK, 6, 6), (MADE, WIDTH, 3, 3), {"pads": [1] * 4}),
    "same": ("Conv", (RANK, 6, 6), (MADE, WIDTH, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "grouped": ("Conv", (RANK, 6, 6), (6, WIDTH // 2, 3, 3), {"group": 2}),
    "transposed": ("ConvTranspose", (RANK, 4, 4), (WIDTH, MADE, 2, 2), {"strides": [2, 2]}),
    "transposed, grouped": ("ConvTranspose", (RANK, 4, 4), (WIDTH, 3, 3, 3), {"group": 2, "pads": [1] * 4}),
    "transposed, same": (
        "ConvTranspose", (RANK, 4, 4), (WIDTH, MADE, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
    ),
    "transposed, upper": ("ConvTranspose", (RANK, 5), (WIDTH, MADE, 4), {"strides": [3], "auto_pad": "SAME_UPPER"}),
    "transposed, sized": (
        "ConvTranspose", (RANK, 4, 4), (WIDTH, MADE, 3, 3), {"strides": [2, 2], "output_shape": [7, 6]},
    ),
    "fused": ("FusedConv", (RANK, 6, 6), (MADE, WIDTH, 3, 3), {"activation": "Relu"}),
    "clipped": ("FusedConv", (RANK, 9), (MADE, WIDTH, 3), {"activation": "Clip", "activation_params": [-1.0, 1.0]}),
}  # fmt: skip
COLUMNS: dict[str, Case] = {
    "Gemm": ("Gemm", (RANK,), (WIDTH, MADE), {}),
    "Gemm, transposed": ("Gemm", (RANK,), (MADE, WIDTH), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    "MatMul": ("MatMul", (3, RANK), (WIDTH, MADE), {}),
    "FusedMatMul": ("FusedMatMul", (3, RANK), (MADE, WIDTH), {"transB": 1, "alpha": 3.0}),
    "Einsum": ("Einsum", (3, RANK), (WIDTH, MADE), {"equation": "nsd,de->nse"}),
    "Einsum, transposed": ("Einsum", (3, RANK), (MADE, WIDTH), {"equation": "abd, ed"}),
    "Gemm, one number": ("Gemm", (RANK,), (WIDTH, MADE), {}),
    "FusedGemm": ("FusedGemm", (RANK,), (MADE, WIDTH), {"transB": 1, "activation": "Tanh"}),
    "FusedGemm, leaky": ("FusedGemm", (RANK,), (WIDTH, MADE), {"activation": "LeakyRelu", "activation_alpha": 0.2}),
}
ROWS: dict[str, Case] = {
    "Gemm, data transposed": ("Gemm", (RANK, 30), (WIDTH, MADE), {"transA": 1, "alpha": 2.0}),
    "Gemm, both transposed": ("Gemm", (RANK, 30), (MADE, WIDTH), {"transA": 1, "transB": 1, "beta": 0.5}),
    "MatMul, weights first": ("MatMul", (2, RANK, 7), (MADE, WIDTH), {}),
    "FusedMatMul, weights first": ("FusedMatMul", (2, RANK, 7), (WIDTH, MADE), {"transA": 1}),
}


def planted(shape: Sequence[int], axis: int, groups: int = 1) -> onnx.TensorProto:
    """Weights whose channels along an axis are mixes of the first half of those of each group."""
    stored = np.moveaxis(numpy_helper.to_array(weights("first", shape)), axis, 0).copy()
    mix = np.random.default_rng(3).uniform(0.5, 1.5, (WIDTH // 2, WIDTH // 2)) / WIDTH
    parts = stored.reshape(groups, WIDTH // groups, -1)
    half = WIDTH // groups // 2
    parts[:, half:] = mix[:half, :half] @ parts[:, :half]
    return numpy_helper.from_array(np.moveaxis(parts.reshape(stored.shape), 0, axis).astype(np.float32), "first")


def model_of(name: str) -> onnx.ModelProto:
    """`x → first → h → second → y`, with redundant channels in h."""
    operator, shape, size, attributes = ({**CONVOLUTIONS, **COLUMNS, **ROWS})[name]
    groups = attributes.get("group", 1)
    if name in CONVOLUTIONS:
        first = helper.make_node("Conv", ["x", "first"], ["h"], "first")
        tensor = planted((WIDTH, RANK, *[1] * (len(shape) - 1)), 0, groups)
    elif name in COLUMNS:
        first, tensor = helper.make_node("MatMul", ["x", "first"], ["h"], "first"), planted((RANK, WIDTH), 1)
    else:
        first, tensor = helper.make_node("MatMul", ["first", "x"], ["h"], "first"), planted((WIDTH, RANK), 0)
    made = size[1] * groups if operator == "ConvTranspose" else MADE if name not in CONVOLUTIONS else size[0]
    biased = "MatMul" not in operator and operator != "Einsum"
    made = 1 if "one number" in name else made
    inputs = ["second", "h"] if "weights first" in name else ["h", "second"]
    domain = MICROSOFT if operator.startswith("Fused") else ""
    second = helper.make_node(operator, [*inputs, *["bias"] * biased], ["y"], "second", domain=domain, **attributes)
    stored = [tensor, weights("second", size), *[weights("bias", (made,))] * biased]
    dims = shape if name in ROWS else ["N", *shape]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)
    graph = helper.make_graph([first, second], "planted", [given], [out], stored)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def feeds(name: str, count: int, seed: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    _, shape, _, _ = ({**CONVOLUTIONS, **COLUMNS, **ROWS})[name]
    lead = () if name in ROWS else (16,)
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((*lead, *shape)).astype(np.float32)} for _ in range(count)]


def refined(original: MaskedNetwork, working: MaskedNetwork, name: str) -> tuple[float, float, int]:
    """Errors on other samples before and after refinement, and how many layers were kept."""
    fit, judge, other = (feeds(name, 4, seed) for seed in (1, 2, 3))
    runs = {}
    for part in ("judge", "other"):
        runs[part] = Reference(PartialExecutor(original.partition, judge if part == "judge" else other, CPU).finish())

    def error() -> float:
        return runs["other"].compare(PartialExecutor(working.partition, other, CPU).finish()).value

    before = error()
    result = Refiner(original, working, RefineSet(fit, judge, runs["judge"]), CPU, 0).run()
    return before, error(), len(result.steps)


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *COLUMNS, *ROWS])
def test_redundant_channels_are_made_up_for(name: str) -> None:
    original = MaskedNetwork.of(onnxcop.analyze(model_of(name), options=CPU, biases=True))
    working = original.copy()
    (layer,) = working.layers
    half = layer.channels // layer.groups // 2
    gone = layer.units.reshape(layer.groups, -1)[:, half:]
    working.alive[np.unique(gone)] = False
    lost = np.isin(layer.units, gone)
    working.set_weights(layer, *merge_channels(working.weights(layer), None, 0.0, ~lost, lost))
    before, after, kept = refined(original, working, name)
    assert before > 1e-3
    assert kept == 1
    assert after < 0.01 * before


def test_a_disturbed_depthwise_layer_is_restored() -> None:
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], "depthwise", group=RANK, pads=[1] * 4)]
    graph = helper.make_graph(
        nodes, "depthwise",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", RANK, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weights("w", (RANK, 1, 3, 3)), weights("b", (RANK,))],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    original = MaskedNetwork.of(onnxcop.analyze(model, options=CPU, biases=True))
    working = original.copy()
    working.write("w", working.read("w") * 0.7 + 0.1)
    before, after, kept = refined(original, working, "two axes")
    assert kept == 1
    assert after < 0.01 * before
