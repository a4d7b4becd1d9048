"""Every gradient rule against central differences, over the attributes of its operator."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradient_oracle import agree

from onnxcop.gradient import DEFAULT_GRADIENTS


def rand(*shape: int, low: float = -2.0, high: float = 2.0, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random numbers, float32."""
    return np.random.default_rng([seed, *shape]).uniform(low, high, shape).astype(np.float32)


def ints(*values: Any) -> np.ndarray[Any, Any]:
    """Integers, int64."""
    return np.array(values, np.int64)


UNARY: list[tuple[str, float, float, dict[str, Any]]] = [
    ("Abs", -2, 2, {}), ("Acos", -0.9, 0.9, {}), ("Acosh", 1.1, 3, {}), ("Asin", -0.9, 0.9, {}), ("Asinh", -2, 2, {}),
    ("Atan", -2, 2, {}), ("Atanh", -0.8, 0.8, {}), ("Celu", -2, 2, {"alpha": 0.7}), ("Cos", -2, 2, {}),
    ("Cosh", -2, 2, {}), ("Dropout", -2, 2, {}), ("Elu", -2, 2, {"alpha": 0.6}), ("Erf", -2, 2, {}),
    ("Exp", -2, 2, {}), ("HardSigmoid", -3.9, 4, {"alpha": 0.3, "beta": 0.4}), ("HardSwish", -5, 5, {}),
    ("Identity", -2, 2, {}), ("LeakyRelu", -2, 2, {"alpha": 0.1}), ("LeakyRelu", -2, 2, {}), ("Log", 0.1, 3, {}),
    ("Mish", -3, 3, {}), ("Neg", -2, 2, {}), ("Reciprocal", 0.5, 2, {}), ("Relu", -2, 2, {}), ("Selu", -2, 2, {}),
    ("Selu", -2, 2, {"alpha": 1.2, "gamma": 0.9}), ("Shrink", -2, 2, {"lambd": 0.7, "bias": 0.2}),
    ("Sigmoid", -4, 4, {}), ("Sin", -2, 2, {}), ("Sinh", -2, 2, {}), ("Softplus", -3, 3, {}), ("Softsign", -2, 2, {}),
    ("Sqrt", 0.2, 3, {}), ("Tan", -1, 1, {}), ("Tanh", -2, 2, {}), ("ThresholdedRelu", -2, 2, {"alpha": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "low", "high", "attributes"), UNARY)
def test_operators_of_one_input(kind: str, low: float, high: float, attributes: dict[str, Any]) -> None:
    agree(kind, [rand(3, 7, low=low, high=high)], **attributes)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    agree("Gelu", [rand(3, 7)], opset=20, approximate=approximate)


def test_swish() -> None:
    agree("Swish", [rand(3, 7)], opset=24, alpha=0.8)


BROADCASTS = [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (4,)), ((2, 3, 4), (3, 1)), ((1, 3, 1), (2, 1, 4)), ((4,), (2, 3, 4)),
              ((2, 3), ()), ((2, 1, 4), (1, 3, 1))]  # fmt: skip


@pytest.mark.parametrize(("left", "right"), BROADCASTS)
@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div", "Pow"])
def test_operators_that_broadcast(kind: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    low = 0.5 if kind in ("Div", "Pow") else -2.0
    agree(kind, [rand(*left, low=low), rand(*right, low=low, seed=1)])


@pytest.mark.parametrize("kind", ["Sum", "Mean", "Max", "Min"])
def test_operators_of_many_inputs(kind: str) -> None:
    values = np.random.default_rng(0).permutation(40).astype(np.float32) / 20 - 1
    agree(kind, [values[:24].reshape(2, 3, 4), values[24:27].reshape(3, 1), values[27:35].reshape(2, 1, 4)])


def test_ties_are_shared_and_bounds_pass() -> None:
    from gradient_oracle import one_node, runner

    from onnxcop.gradient import differentiate

    def slopes(kind: str, *values: Any) -> list[Any]:
        model, feeds, names = one_node(kind, [np.array(v, np.float32) for v in values])
        found = differentiate(model, "loss", names)
        weights = np.random.default_rng(7).uniform(0.5, 1.5, np.shape(values[0])).astype(np.float32)
        return [result / weights for result in runner(found.model)(feeds)[1:]]

    np.testing.assert_allclose(slopes("Max", [1.0, 2.0], [1.0, 0.0]), [[0.5, 1], [0.5, 0]])
    np.testing.assert_allclose(slopes("Relu", [0.0, 1.0]), [[0, 1]])


def test_clip_prelu_where_mod() -> None:
    agree("Clip", [rand(3, 4), np.float32(-1.01), np.float32(0.93)], without=["x1", "x2"])
    agree("Clip", [rand(3, 4), None, np.float32(0.93)], without=["x2"])
    agree("PRelu", [rand(2, 3, 4), rand(3, 1, seed=1)])
    agree("Where", [np.array([[True], [False]]), rand(2, 3), rand(1, 3, seed=1)])
    agree("Dropout", [rand(3, 4), np.float32(0.5)], without=["x1"])
    agree("Mod", [rand(3, 4, low=0.6, high=0.9), np.float32(0.5)], fmod=1, without=["x1"])


MATRICES = [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((3, 4), (2, 4, 5)),
            ((2, 1, 3, 4), (3, 4, 2)), ((1, 3, 4), (2, 4, 5)), ((4,), (4, 5)), ((3, 4), (4,)), ((2, 3, 4), (4,)),
            ((4,), (2, 4, 5)), ((4,), (4,))]  # fmt: skip


@pytest.mark.parametrize(("left", "right"), MATRICES)
def test_matmul(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    agree("MatMul", [rand(*left), rand(*right, seed=1)])


@pytest.mark.parametrize(("a", "b", "bias"), list(itertools.product((0, 1), (0, 1), (None, (5,), (3, 1), (3, 5), ()))))
def test_gemm(a: int, b: int, bias: tuple[int, ...] | None) -> None:
    left, right = rand(*((4, 3) if a else (3, 4))), rand(*((5, 4) if b else (4, 5)), seed=1)
    third = [] if bias is None else [rand(*bias, seed=2)]
    agree("Gemm", [left, right, *third], transA=a, transB=b, alpha=0.7, beta=1.3)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [("bij,bjk->bik", [(2, 3, 4), (2, 4, 2)]), ("ij,jk,kl->il", [(2, 3), (3, 2), (2, 4)]), ("bhi,hoi->bo",
      [(2, 3, 2), (3, 2, 2)]), ("ij->ji", [(2, 3)]), ("i,j->ij", [(2,), (3,)])],
)  # fmt: skip
def test_einsum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    agree("Einsum", [rand(*shape, seed=place) for place, shape in enumerate(shapes)], equation=equation)


CONVS: list[dict[str, Any]] = [
    {"x": (2, 3, 6, 5), "w": (4, 3, 3, 3), "pads": [1, 1, 1, 1]},
    {"x": (2, 3, 6, 5), "w": (4, 3, 3, 3), "pads": [1, 0, 0, 1], "strides": [2, 2]},
    {"x": (2, 3, 7, 6), "w": (4, 3, 3, 2), "pads": [2, 1, 1, 0], "strides": [2, 3], "dilations": [2, 1]},
    {"x": (2, 4, 5, 5), "w": (4, 1, 3, 3), "pads": [1, 1, 1, 1], "group": 4},
    {"x": (2, 4, 6, 6), "w": (8, 1, 3, 3), "pads": [1, 1, 1, 1], "group": 4, "strides": [2, 2]},
    {"x": (2, 4, 5, 5), "w": (6, 2, 3, 3), "group": 2},
    {"x": (2, 3, 4, 4), "w": (5, 3, 1, 1)},
    {"x": (2, 3, 5, 4), "w": (5, 3, 1, 1), "strides": [2, 2]},
    {"x": (2, 4, 4, 4), "w": (6, 2, 1, 1), "group": 2},
    {"x": (2, 8, 4, 4), "w": (3, 8, 3, 3), "pads": [1, 1, 1, 1], "dilations": [1, 2]},
    {"x": (2, 8, 4, 4), "w": (3, 8, 2, 2), "pads": [0, 1, 1, 0]},
    {"x": (2, 8, 6), "w": (3, 8, 3), "pads": [1, 1]},
    {"x": (2, 2, 9), "w": (3, 2, 4), "strides": [3]},
    {"x": (1, 2, 3, 4, 3), "w": (2, 2, 2, 2, 2), "pads": [1, 0, 0, 0, 1, 0]},
    {"x": (2, 3, 6, 5), "w": (4, 3, 3, 3), "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"x": (2, 3, 6, 5), "w": (4, 3, 2, 2), "auto_pad": "SAME_LOWER"},
    {"x": (2, 3, 6, 5), "w": (4, 3, 3, 3), "auto_pad": "VALID"},
    {"x": (1, 2, 10, 3), "w": (1, 2, 3, 3), "strides": [5, 1], "pads": [0, 1, 0, 1]},
    {"x": (2, 8, 4, 3, 5), "w": (2, 8, 2, 3, 2), "pads": [1, 0, 2, 0, 2, 0], "dilations": [1, 1, 2]},
    {"x": (2, 9, 7, 6), "w": (3, 9, 5, 1), "pads": [4, 0, 1, 0]},
    {"x": (1, 8, 6, 7), "w": (2, 8, 3, 4), "auto_pad": "SAME_LOWER"},
    {"x": (1, 8, 9, 8), "w": (2, 8, 3, 3), "dilations": [3, 2]},
    {"x": (3, 4, 8, 7), "w": (4, 1, 3, 2), "group": 4, "strides": [3, 2], "dilations": [1, 2], "pads": [2, 0, 1, 1]},
    {"x": (2, 5, 9), "w": (5, 1, 4), "group": 5, "strides": [2], "pads": [1, 2]},
    {"x": (2, 3, 4, 5, 4), "w": (3, 1, 2, 2, 3), "group": 3, "pads": [0, 1, 1, 1, 0, 1]},
    {"x": (2, 4, 10, 4), "w": (4, 1, 2, 1), "group": 4, "strides": [4, 1]},
]  # fmt: skip


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("bias", [True, False])
def test_conv(case: dict[str, Any], bias: bool) -> None:
    settings = {key: value for key, value in case.items() if key not in "xw"}
    inputs = [rand(*case["x"]), rand(*case["w"], seed=1)] + [rand(case["w"][0], seed=2)] * bias
    agree("Conv", inputs, **settings)


TRANSPOSED: list[dict[str, Any]] = [
    {"x": (2, 3, 4, 3), "w": (3, 4, 3, 3), "pads": [1, 1, 1, 1]},
    {"x": (2, 3, 4, 3), "w": (3, 4, 2, 2), "strides": [2, 2]},
    {"x": (2, 3, 3, 3), "w": (3, 2, 3, 3), "strides": [2, 2], "pads": [1, 0, 1, 1], "output_padding": [1, 0]},
    {"x": (2, 4, 3, 3), "w": (4, 2, 3, 3), "group": 2, "strides": [2, 1], "dilations": [1, 2]},
    {"x": (2, 4, 5), "w": (4, 1, 4), "group": 4, "strides": [2], "pads": [1, 1]},
]  # fmt: skip


@pytest.mark.parametrize("case", TRANSPOSED)
def test_conv_transpose(case: dict[str, Any]) -> None:
    settings = {key: value for key, value in case.items() if key not in "xw"}
    channels = case["w"][1] * case.get("group", 1)
    agree("ConvTranspose", [rand(*case["x"]), rand(*case["w"], seed=1), rand(channels, seed=2)], **settings)


POOLS: list[dict[str, Any]] = [
    {"kernel_shape": [2, 2], "strides": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 0, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [1, 1], "auto_pad": "SAME_UPPER"},
]


@pytest.mark.parametrize("case", POOLS)
def test_pools(case: dict[str, Any]) -> None:
    values = np.random.default_rng(0).permutation(2 * 3 * 6 * 6).reshape(2, 3, 6, 6).astype(np.float32) / 20
    agree("MaxPool", [values], **case)
    agree("AveragePool", [values], **case)
    agree("AveragePool", [values], count_include_pad=1, **case)


def test_dilated_pools() -> None:
    values = np.random.default_rng(0).permutation(2 * 2 * 7 * 7).reshape(2, 2, 7, 7).astype(np.float32) / 20
    agree("MaxPool", [values], kernel_shape=[2, 2], dilations=[2, 3])
    agree("AveragePool", [values], kernel_shape=[2, 2], dilations=[2, 3], opset=19)
    agree("MaxPool", [values[:, :, 0]], kernel_shape=[3], strides=[2])
    agree("AveragePool", [values[:, :, 0]], kernel_shape=[3], strides=[2], pads=[1, 1])


@pytest.mark.parametrize("kind", ["GlobalAveragePool", "GlobalMaxPool"])
def test_global_pools(kind: str) -> None:
    values = np.random.default_rng(0).permutation(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(np.float32) / 20
    agree(kind, [values])
    agree(kind, [values[:, :, 0]])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_local_response_normalization(size: int) -> None:
    agree("LRN", [rand(2, 6, 3, 2)], size=size, alpha=0.5, beta=0.6, bias=1.2)


REDUCED = [{"axes": [1], "keepdims": 1}, {"axes": [0, 2], "keepdims": 0}, {"axes": [-1], "keepdims": 0},
           {"keepdims": 0}, {"keepdims": 1}, {"axes": [], "noop_with_empty_axes": 0}]  # fmt: skip


@pytest.mark.parametrize("case", REDUCED)
@pytest.mark.parametrize(
    "kind", ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Sum", "SumSquare"],
)  # fmt: skip
def test_reductions(kind: str, case: dict[str, Any]) -> None:
    axes = [ints(*case["axes"])] if "axes" in case else []
    settings = {key: value for key, value in case.items() if key != "axes"}
    values = np.random.default_rng(0).permutation(24).reshape(2, 3, 4).astype(np.float32) / 20 + 0.2
    agree(f"Reduce{kind}", [values, *axes], **settings)


@pytest.mark.parametrize("opset", [11, 13])
def test_reductions_of_older_opsets(opset: int) -> None:
    settings = {"axes": [1, 2]} if opset == 11 else {}
    agree("ReduceSum", [rand(2, 3, 4), *([] if opset == 11 else [ints(1, 2)])], opset=opset, keepdims=0, **settings)
    agree("ReduceMean", [rand(2, 3, 4)], opset=opset, keepdims=0, axes=[1, 2])


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
def test_softmaxes(kind: str, axis: int) -> None:
    agree(kind, [rand(2, 3, 4)], axis=axis)
    agree(kind, [rand(2, 3, 4)], axis=axis % 3, opset=11)


def test_normalizations() -> None:
    x, vectors = rand(3, 4, 5), [rand(4, seed=1), rand(4, seed=2)]
    statistics = [rand(4, seed=3), rand(4, low=0.5, seed=4)]
    agree("BatchNormalization", [x, *vectors, *statistics], epsilon=1e-2, without=["x3", "x4"])
    agree("InstanceNormalization", [x, *vectors], epsilon=1e-2)
    agree("GroupNormalization", [x, *vectors], num_groups=2, epsilon=1e-2, opset=21)
    for axis, shape in ((-1, (5,)), (1, (4, 5)), (-2, (4, 5))):
        agree("LayerNormalization", [x, rand(*shape, seed=1), rand(*shape, seed=2)], axis=axis, epsilon=1e-2)
    agree("LayerNormalization", [x, rand(5, seed=1)])
    agree("LpNormalization", [x], axis=1)
    agree("MeanVarianceNormalization", [rand(2, 3, 4, 4)])
    agree("RMSNormalization", [x, rand(5, seed=1)], opset=23, epsilon=1e-2)


def test_shapes() -> None:
    x = rand(2, 3, 4)
    agree("Reshape", [x, ints(2, -1)])
    agree("Reshape", [x, ints(0, 6, 2)])
    agree("Flatten", [x], axis=2)
    agree("Squeeze", [rand(2, 1, 3, 1), ints(1)])
    agree("Squeeze", [rand(2, 1, 3, 1)])
    agree("Unsqueeze", [x, ints(0, -1)])
    agree("Transpose", [x], perm=[2, 0, 1])
    agree("Transpose", [x])
    agree("Expand", [rand(3, 1), ints(2, 3, 4)])
    agree("Tile", [x, ints(2, 1, 3)])
    agree("CumSum", [x, np.array(1, np.int64)], exclusive=1)
    agree("CumSum", [x, np.array(-1, np.int64)], reverse=1)
    agree("Trilu", [rand(2, 4, 4), np.array(1, np.int64)], upper=0)
    agree("Trilu", [rand(2, 4, 4), np.array(-1, np.int64)], upper=1)
    agree("Cast", [x], to=1)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat_and_split(axis: int) -> None:
    agree("Concat", [rand(2, 3, 4), rand(2, 3, 4, seed=1)], axis=axis)
    sizes = {0: [1, 1], 1: [1, 2], -1: [3, 1]}[axis]
    agree("Split", [rand(2, 3, 4), ints(*sizes)], axis=axis, outputs=2, used=(0, 1))
    agree("Split", [rand(2, 3, 4), ints(*sizes)], axis=axis, outputs=2, used=(1,))


SLICES = [([1], [3], [1], None), ([-3], [-1], [-1], None), ([0, 1], [2, 100], [0, 2], [1, 2]), ([5], [-100], [2], [-2]),
          ([0, 0], [1, 2], None, None), ([1], [4], [1], [2]), ([3], [3], [1], None)]  # fmt: skip


@pytest.mark.parametrize(("starts", "ends", "axes", "steps"), SLICES)
def test_slice(starts: list[int], ends: list[int], axes: list[int] | None, steps: list[int] | None) -> None:
    rest = [None if value is None else ints(*value) for value in (axes, steps)]
    while rest and rest[-1] is None:
        rest.pop()
    agree("Slice", [rand(3, 5, 6), ints(*starts), ints(*ends), *rest])
    short = [None if value is None else value.astype(np.int32) for value in (ints(*starts), ints(*ends), *rest)]
    agree("Slice", [rand(3, 5, 6), *short])


def test_picking_and_scattering() -> None:
    x = rand(3, 4, 2)
    for axis in (0, 1, 2):
        agree("Gather", [x, ints([0, 1], [1, -1])], axis=axis)
        agree("Gather", [x, np.array(-1, np.int64)], axis=axis)
    agree("Gather", [rand(5), ints(1, 1, 3)])
    agree("GatherElements", [x, ints([[0, 1]], [[2, 2]])], axis=0)
    agree("GatherND", [x, ints([0, 1], [2, 3], [0, 1])])
    indices, updates = ints([[0, 1]], [[2, 0]]), rand(2, 1, 2, seed=1)
    agree("ScatterElements", [x, indices, updates], axis=0)
    agree("ScatterElements", [x, indices, updates], axis=0, reduction="add")
    agree("ScatterND", [x, ints([0, 1], [2, 3]), rand(2, 2, seed=1)])
    agree("ScatterND", [x, ints([0, 1], [0, 1]), rand(2, 2, seed=1)], reduction="add")
    apart = np.random.default_rng(0).permutation(12).reshape(3, 4).astype(np.float32)
    for axis, largest in ((-1, 1), (0, 1), (1, 0)):
        agree("TopK", [apart, ints(2)], outputs=2, axis=axis, largest=largest)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pad(mode: str) -> None:
    agree("Pad", [rand(2, 3, 4), ints(0, 1, 2, 0, 0, 1)], mode=mode)
    agree("Pad", [rand(2, 3, 4), ints(1, 2, 1, 0), None, ints(2, 1)], mode=mode)
    if mode == "constant":
        agree("Pad", [rand(2, 3, 4), ints(0, -1, 2, 0, 0, -1), np.float32(0.5)], mode=mode, without=["x2"])
    else:
        agree("Pad", [rand(2, 3, 4), ints(0, 2, 1, 1, 1, 3)], opset=19, mode="wrap")


def test_depth_and_space() -> None:
    for mode in ("DCR", "CRD"):
        agree("DepthToSpace", [rand(2, 8, 2, 3)], blocksize=2, mode=mode)
    agree("SpaceToDepth", [rand(2, 2, 4, 6)], blocksize=2)


RESIZES: list[dict[str, Any]] = [
    {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    {"mode": "nearest"},
    {"mode": "linear"},
    {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
    {"mode": "cubic"},
    {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
]


@pytest.mark.parametrize("case", RESIZES)
def test_resize(case: dict[str, Any]) -> None:
    x = rand(2, 2, 4, 3)
    for goal in ([2, 2, 7, 6], [2, 2, 2, 3]):
        agree("Resize", [x, None, None, ints(*goal)], **case)
    names = {"without": ["x2"]}
    agree("Resize", [x, None, np.array([1, 1, 2, 2.5], np.float32)], **names, **case)


def test_every_rule_is_compared() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    names = {name for domain, name in DEFAULT_GRADIENTS if not domain}
    assert not {name for name in names if f'"{name.removeprefix("Reduce")}"' not in text and f'"{name}"' not in text}
