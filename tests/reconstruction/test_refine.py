"""Layer-by-layer least squares on what a pruned network really sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_models import chain, finished, weights

import onnxcop
from onnxcop.reconstruction import refine
from onnxcop.reconstruction.divergence import Reference
from onnxcop.reconstruction.linear_layers import LinearLayer, linear_layer, shortcut_of, wanted_names, wanted_output
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.normal_equations import FittedLayer, RowSums
from onnxcop.reconstruction.refine import FitStep, Refined, Refiner, RefineSet
from onnxcop.reconstruction.refine_batches import OwnBatches
from onnxcop.runtime.segments import PartialExecutor
from onnxcop.runtime.session import EngineOptions, Session

CPU = EngineOptions(provider="cpu", threads=1)
Array = np.ndarray[Any, Any]
MICROSOFT = "com.microsoft"


def single(op: str, shape: Sequence[int], tensors: dict[str, Sequence[int]], **attributes: Any) -> onnx.ModelProto:
    """One layer on its own."""
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *tensors], ["y"], "layer", **attributes)],
        "single",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weights(name, size) for name, size in tensors.items()],
    )
    return finished(onnx.shape_inference.infer_shapes(helper.make_model(graph)).graph)


def fused(op: str, shape: Sequence[int], tensors: dict[str, Sequence[int]], **attributes: Any) -> onnx.ModelProto:
    """One layer of ONNX Runtime's own on its own, with five outputs or four channels."""
    made = ["N", 5] if len(shape) == 1 else ["N", 4, *shape[1:]]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *tensors], ["y"], "layer", domain=MICROSOFT, **attributes)],
        "fused",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, made)],
        [weights(name, size) for name, size in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def ran(model: onnx.ModelProto, x: Array, name: str = "y") -> Array:
    with Session(model, CPU) as session:
        return np.asarray(session.run({"x": x})[name])


def drawn(shape: Sequence[int], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(model: onnx.ModelProto) -> MaskedNetwork:
    return MaskedNetwork.of(onnxcop.analyze(model, options=CPU))


def described(model: onnx.ModelProto, index: int = 0) -> LinearLayer:
    layer = linear_layer(network(model), index)
    assert layer is not None
    return layer


def made_of_rows(layer: LinearLayer, x: Array, y: Array, count: int = 10**6) -> tuple[Array, Array, Array]:
    """Inputs, what weights and bias make of them, and outputs, at positions that were drawn."""
    matrix, bias = layer.read()
    a, b = layer.rows(x, y, count, np.random.default_rng(0))
    return a, np.einsum("rgf,gfo->rgo", a, matrix) + (0 if bias is None else bias), b


CONVOLUTIONS: dict[str, tuple[Sequence[int], dict[str, Sequence[int]], dict[str, Any]]] = {
    "plain": ((3, 7, 6), {"w": (4, 3, 3, 2), "b": (4,)}, {}),
    "pointwise": ((5, 4, 4), {"w": (6, 5, 1, 1), "b": (6,)}, {}),
    "padded": ((3, 6, 6), {"w": (4, 3, 3, 3), "b": (4,)}, {"pads": [1, 0, 2, 1]}),
    "strided": ((3, 8, 7), {"w": (4, 3, 3, 3), "b": (4,)}, {"strides": [2, 3]}),
    "dilated": ((3, 9, 9), {"w": (4, 3, 3, 2), "b": (4,)}, {"dilations": [2, 3]}),
    "grouped": ((6, 5, 5), {"w": (9, 2, 3, 3), "b": (9,)}, {"group": 3}),
    "depthwise": ((4, 6, 6), {"w": (4, 1, 3, 3), "b": (4,)}, {"group": 4, "pads": [1, 1, 1, 1]}),
    "no bias": ((3, 5, 5), {"w": (4, 3, 3, 3)}, {}),
    "same": ((3, 6, 5), {"w": (4, 3, 4, 3), "b": (4,)}, {"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
    "same, lower": ((3, 6, 5), {"w": (4, 3, 4, 2)}, {"auto_pad": "SAME_LOWER"}),
    "valid": ((3, 5, 5), {"w": (4, 3, 3, 3), "b": (4,)}, {"auto_pad": "VALID", "strides": [2, 2]}),
    "one axis": ((4, 12), {"w": (6, 2, 3), "b": (6,)}, {"group": 2, "pads": [2, 1], "strides": [2]}),
    "three axes": ((2, 4, 5, 4), {"w": (3, 2, 2, 3, 2), "b": (3,)}, {"pads": [0, 1, 1, 1, 0, 0]}),
    "all": ((4, 11, 9), {"w": (6, 2, 3, 3), "b": (6,)},
            {"group": 2, "pads": [2, 1, 0, 3], "strides": [2, 1], "dilations": [1, 2]}),
}  # fmt: skip


TRANSPOSED: dict[str, tuple[Sequence[int], dict[str, Sequence[int]], dict[str, Any]]] = {
    "plain": ((3, 4, 5), {"w": (3, 4, 2, 3), "b": (4,)}, {}),
    "strided": ((3, 4, 5), {"w": (3, 4, 3, 3), "b": (4,)}, {"strides": [2, 3], "pads": [1, 0, 2, 1]}),
    "longer": ((3, 4, 5), {"w": (3, 4, 3, 3), "b": (4,)}, {"strides": [2, 2], "output_padding": [1, 1]}),
    "grouped": ((6, 4, 4), {"w": (6, 3, 2, 2), "b": (9,)}, {"group": 3, "strides": [2, 2]}),
    "depthwise": ((4, 5, 5), {"w": (4, 1, 3, 3)}, {"group": 4, "dilations": [2, 1]}),
    "one axis": ((4, 7), {"w": (4, 3, 4), "b": (6,)}, {"group": 2, "strides": [2], "pads": [1, 1]}),
}  # fmt: skip
LAYERS = {("Conv", name) for name in CONVOLUTIONS} | {("ConvTranspose", name) for name in TRANSPOSED}


@pytest.mark.parametrize(("operator", "name"), sorted(LAYERS))
def test_rows_times_weights_are_the_convolution(operator: str, name: str) -> None:
    shape, tensors, attributes = (CONVOLUTIONS if operator == "Conv" else TRANSPOSED)[name]
    model = single(operator, shape, tensors, **attributes)
    layer, x = described(model), drawn((3, *shape))
    y = ran(model, x)
    a, made, b = made_of_rows(layer, x, y)
    assert len(a) == 3 * int(np.prod(y.shape[2:]))
    np.testing.assert_allclose(made, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(b.reshape(3, -1, y.shape[1]), y.reshape(3, y.shape[1], -1).transpose(0, 2, 1))


def test_some_positions_of_every_sample() -> None:
    model = single("Conv", (3, 8, 8), {"w": (4, 3, 3, 3), "b": (4,)}, pads=[1] * 4)
    layer, x = described(model), drawn((5, 3, 8, 8))
    y = ran(model, x)
    a, made, b = made_of_rows(layer, x, y, 7)
    assert len(a) == 5 * 7
    np.testing.assert_allclose(made, b, rtol=1e-4, atol=1e-5)
    assert len(np.unique(b.reshape(35, 4), axis=0)) == 35  # no position is drawn twice
    again, _ = layer.rows(x, y, 7, np.random.default_rng(0))
    np.testing.assert_array_equal(a, again)


PRODUCTS: dict[str, tuple[str, Sequence[int], dict[str, Sequence[int]], dict[str, Any]]] = {
    "Gemm": ("Gemm", (4,), {"w": (4, 5), "b": (5,)}, {}),
    "Gemm, transposed": ("Gemm", (4,), {"w": (5, 4), "b": (1, 5)}, {"transB": 1}),
    "Gemm, scaled": ("Gemm", (4,), {"w": (4, 5), "b": (5,)}, {"alpha": 0.5, "beta": 3.0}),
    "Gemm, transposed and scaled": ("Gemm", (4,), {"w": (5, 4), "b": (5,)}, {"transB": 1, "alpha": 4.0, "beta": 0.5}),
    "Gemm, bias off": ("Gemm", (4,), {"w": (4, 5), "b": (5,)}, {"beta": 0.0}),
    "MatMul": ("MatMul", (3, 4), {"w": (4, 5)}, {}),
    "FusedMatMul": ("FusedMatMul", (4,), {"w": (4, 5)}, {}),
    "FusedMatMul, transposed": ("FusedMatMul", (4,), {"w": (5, 4)}, {"transB": 1, "alpha": 0.25}),
    "FusedConv": ("FusedConv", (3, 6, 6), {"w": (4, 3, 3, 3), "b": (4,)}, {"pads": [1] * 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_times_weights_are_the_product(name: str) -> None:
    operator, shape, tensors, attributes = PRODUCTS[name]
    model = (fused if operator.startswith("Fused") else single)(operator, shape, tensors, **attributes)
    layer, x = described(model), drawn((6, *shape))
    y = ran(model, x)
    _, made, b = made_of_rows(layer, x, y)
    np.testing.assert_allclose(made, b, rtol=1e-4, atol=1e-5)
    matrix, bias = layer.read()
    assert (bias is None) == (len(tensors) == 1 or attributes.get("beta") == 0.0)
    layer.write(matrix * 2, None if bias is None else bias * 2)
    np.testing.assert_allclose(ran(layer.working.model, x), 2 * y, rtol=1e-4, atol=1e-4)


SIDES: dict[str, tuple[str, dict[str, Sequence[int]], dict[str, Any]]] = {
    "Gemm, data transposed": ("Gemm", {"x": (7, 4), "w": (7, 5), "b": (5,)}, {"transA": 1, "alpha": 2.0}),
    "Gemm, both transposed": ("Gemm", {"x": (7, 4), "w": (5, 7), "b": (5,)}, {"transA": 1, "transB": 1, "beta": 2.0}),
    "MatMul, weights first": ("MatMul", {"w": (5, 7), "x": (2, 7, 4)}, {}),
    "FusedMatMul, data transposed": ("FusedMatMul", {"x": (2, 7, 4), "w": (7, 5)}, {"transA": 1}),
    "FusedMatMul, weights first": ("FusedMatMul", {"w": (7, 5), "x": (2, 7, 4)}, {"transA": 1, "alpha": 0.5}),
    "FusedMatMul, both": ("FusedMatMul", {"w": (7, 5), "x": (2, 4, 7)}, {"transA": 1, "transB": 1}),
}


def sided(operator: str, tensors: dict[str, Sequence[int]], **attributes: Any) -> onnx.ModelProto:
    """A matrix product with data and weights in the given order."""
    domain = MICROSOFT if operator.startswith("Fused") else ""
    shape = (*tensors["x"][:-2], 4, 5) if next(iter(tensors)) == "x" else (*tensors["x"][:-2], 5, 4)
    graph = helper.make_graph(
        [helper.make_node(operator, list(tensors), ["y"], "layer", domain=domain, **attributes)],
        "sides",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, tensors["x"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weights(name, size) for name, size in tensors.items() if name != "x"],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("name", SIDES)
def test_data_may_come_transposed_and_weights_on_either_side(name: str) -> None:
    operator, tensors, attributes = SIDES[name]
    model = sided(operator, tensors, **attributes)
    layer, x = described(model), drawn(tensors["x"])
    y = ran(model, x)
    a, made, b = made_of_rows(layer, x, y)
    assert a.shape[1:] == (1, 7)
    assert b.shape[1:] == (1, 5)
    np.testing.assert_allclose(made, b, rtol=1e-4, atol=1e-5)
    matrix, bias = layer.read()
    layer.write(matrix * 2, None if bias is None else bias * 2)
    np.testing.assert_allclose(ran(layer.working.model, x), 2 * y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_matrix_product_with_its_addition(axis: int) -> None:
    sizes = {"w": (4, 5), "b": (5,)} if axis == -1 else {"w": (5, 3), "b": (5, 1)}
    names = ["x", "w"] if axis == -1 else ["w", "x"]
    nodes = [helper.make_node("MatMul", names, ["m"], "m"), helper.make_node("Add", ["b", "m"], ["y"], "y")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3, 5] if axis == -1 else ["N", 5, 4])]
    stored = [weights(name, size) for name, size in sizes.items()]
    layer = described(model := finished(helper.make_graph(nodes, "g", inputs, outputs, stored)))
    assert (layer.own.output, layer.own.stop, layer.own.bias) == ("y", 2, "b")
    x = drawn((4, 3, 4))
    a, made, b = made_of_rows(layer, x, ran(model, x), 4)
    assert len(a) == (12 if axis == -1 else 16)
    np.testing.assert_allclose(made, b, rtol=1e-5, atol=1e-6)
    fewer, _ = layer.rows(x, ran(model, x), 2, np.random.default_rng(0))
    assert len(fewer) == 8


@pytest.mark.parametrize("model", [
    single("Gemm", (4,), {"w": (4, 5), "b": (1,)}),
    single("Gemm", (4,), {"w": (4, 5), "b": (1, 1)}),
    single("MatMul", (2, 4), {"w": (2, 4, 5)}),
], ids=["one bias", "one bias of two axes", "batched"])  # fmt: skip
def test_layers_that_are_left_alone(model: onnx.ModelProto) -> None:
    assert linear_layer(network(model), 0) is None


def test_a_number_added_to_all_outputs_is_no_bias() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], "m"), helper.make_node("Add", ["m", "b"], ["y"], "y")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])]
    model = finished(helper.make_graph(nodes, "g", inputs, outputs, [weights("w", (4, 5)), weights("b", (1,))]))
    own = described(model).own
    assert (own.output, own.stop, own.bias) == ("m", 1, None)


@pytest.mark.parametrize("size", [(), (1,), (16,), (1, 16)])
def test_a_merge_shifts_a_bias_per_output(size: Sequence[int]) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], "one"), helper.make_node("Relu", ["h"], ["r"], "r"),
             helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], "two")]  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 16])]
    sizes = {"w1": (4, 6), "b1": (6,), "w2": (6, 16), "b2": size}
    model = finished(helper.make_graph(nodes, "g", inputs, outputs, [weights(n, s) for n, s in sizes.items()]))
    working = MaskedNetwork.of(onnxcop.analyze(model, options=CPU))
    (layer,) = working.layers
    before = working.read("b2")
    working.set_weights(layer, working.weights(layer), np.arange(16.0))
    change = working.read("b2") - before
    np.testing.assert_allclose(change.ravel(), np.arange(16) if before.size == 16 else np.zeros(1), atol=1e-6)


def pictures(count: int, seed: int) -> list[dict[str, Array]]:
    return [{"x": drawn((8, 3, 8, 8), seed + i)} for i in range(count)]


def refiner(original: MaskedNetwork, working: MaskedNetwork, seed: int = 0) -> Refiner:
    fit, judge = pictures(6, 100), pictures(3, 200)
    reference = Reference(PartialExecutor(original.partition, judge, CPU).finish())
    return Refiner(original, working, RefineSet(fit, judge, reference), CPU, seed)


def distance(original: MaskedNetwork, working: MaskedNetwork) -> float:
    other = pictures(3, 300)
    return Reference(PartialExecutor(original.partition, other, CPU).finish()).compare(
        PartialExecutor(working.partition, other, CPU).finish()
    ).value  # fmt: skip


def test_a_disturbed_layer_is_restored() -> None:
    original = MaskedNetwork.of(onnxcop.analyze(chain(), options=CPU))
    working = original.copy()
    kernel, bias = working.read("w2"), working.read("b2")
    working.write("w2", kernel * 0.7 + 0.1 * drawn(kernel.shape))
    working.write("b2", bias + 0.5)
    before = distance(original, working)
    refined = refiner(original, working).run()
    assert refined.tried == 2  # the head sees what is left of the disturbance
    assert refined.steps
    assert distance(original, working) < 1e-3 * before
    fresh = [{"x": drawn((16, 3, 8, 8), 400)}]
    wanted, found = (next(PartialExecutor(w.partition, fresh, CPU).stream(3, ["c2"])) for w in (original, working))
    error = np.linalg.norm(found["c2"] - wanted["c2"])
    assert error < 0.01 * np.linalg.norm(wanted["c2"] - wanted["c2"].mean(axis=(0, 2, 3), keepdims=True))
    for name in ("w1", "b1"):
        np.testing.assert_array_equal(working.read(name), original.read(name))


def test_an_intact_network_is_left_as_it_is() -> None:
    original = MaskedNetwork.of(onnxcop.analyze(chain(), options=CPU))
    working = original.copy()
    assert refiner(original, working).run() == Refined(0, {})
    assert working.model == original.model


def test_a_step_that_does_not_help_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    original = MaskedNetwork.of(onnxcop.analyze(chain(), options=CPU))
    working = original.copy()
    working.write("w2", working.read("w2") * 0.9)
    disturbed = working.model.SerializeToString()

    def worse(layer: FittedLayer, *_: object) -> Iterator[tuple[FitStep, tuple[Array, Array | None]]]:
        yield FitStep(1.0), (-3 * layer.weights, layer.bias)
        yield FitStep(), (0 * layer.weights, layer.bias)

    monkeypatch.setattr(refine, "candidates", worse)
    assert refiner(original, working).run() == Refined(2, {})
    assert working.model.SerializeToString() == disturbed


def test_every_kept_step_brings_the_output_nearer() -> None:
    original = MaskedNetwork.of(onnxcop.analyze(chain(), options=CPU))
    working = original.copy()
    for name in ("w1", "w2", "w3"):
        working.write(name, working.read(name) + 0.05 * drawn(working.read(name).shape))
    run = refiner(original, working)
    judge = run.samples.judge
    before = run.samples.reference.compare(PartialExecutor(working.partition, judge, CPU).finish()).value
    refined = run.run()
    after = run.samples.reference.compare(PartialExecutor(working.partition, judge, CPU).finish()).value
    assert refined.tried == 3
    assert refined.steps
    assert after < 0.1 * before


def test_removed_channels_stay_removed() -> None:
    original = MaskedNetwork.of(onnxcop.analyze(chain(), options=CPU))
    working = original.copy()
    layer = next(entry for entry in working.layers if working.model.graph.node[entry.node].name == "conv2")
    working.alive[layer.units[:3]] = False
    changed = working.weights(layer)
    changed[:, :3] = 0.0
    working.set_weights(layer, changed)
    before = distance(original, working)
    assert refiner(original, working).run().steps
    assert distance(original, working) < before
    assert not working.read("w2")[:, :3].any()
    assert working.read("w2")[:, 3:].all()


class Counted:
    """Batches that note how many rows are asked for, and give none."""

    def __init__(self, refiner: Refiner, sizes: list[int]) -> None:
        self.all, self.given = refiner._fit, sizes
        self.rows, self.chosen = 0, dict[int, Sequence[int]]()

    def sizes(self, layer: LinearLayer) -> list[int]:
        return self.given

    def sums(self, layer: LinearLayer, _: object, count: int, rng: object, chosen: Any) -> tuple[RowSums, RowSums]:
        self.rows = count
        self.chosen = {held: chosen(held) for held in (0, 105, 210, 420)}
        empty = RowSums.empty(1, 1, 1)
        return empty, empty


def test_rows_are_drawn_from_as_many_batches_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """69 samples for 400 rows; a sample that gives 5 to 20 of them."""
    monkeypatch.setattr(refine, "_PER_SAMPLE", 2)
    monkeypatch.setattr(refine, "_MOST_ROWS", 400)
    original = MaskedNetwork.of(onnxcop.analyze(chain(), options=CPU))
    run = refiner(original, original.copy())
    batches = Counted(run, [8, 8, 5])
    run._batches = batches  # type: ignore[assignment]
    assert run._refine(described(chain())) is None
    assert batches.rows == 5
    fit = batches.all
    assert sorted(fit) == [3, 4, 5, 6, 7, 8]
    assert batches.chosen == {0: fit, 105: fit, 210: fit[:4], 420: fit[:2]}
    monkeypatch.setattr(refine, "_PER_SAMPLE", 30)
    assert run._refine(described(chain())) is None
    assert batches.rows == 30


def test_the_same_seed_gives_the_same_weights() -> None:
    original = MaskedNetwork.of(onnxcop.analyze(chain(), options=CPU))
    results = []
    for _ in range(2):
        working = original.copy()
        working.write("w2", working.read("w2") * 0.8)
        refiner(original, working, seed=3).run()
        results.append(working.model.SerializeToString())
    assert results[0] == results[1]


def residual() -> onnx.ModelProto:
    """`x → stem → inner → outer`, and `outer + stem`."""
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["stem"], "stem", pads=[1] * 4),
        helper.make_node("Conv", ["stem", "w1", "b1"], ["inner"], "inner", pads=[1] * 4),
        helper.make_node("Relu", ["inner"], ["active"], "active"),
        helper.make_node("Conv", ["active", "w2", "b2"], ["outer"], "outer", pads=[1] * 4),
        helper.make_node("Add", ["outer", "stem"], ["y"], "sum"),
    ]
    sizes = {"w0": (6, 3, 3, 3), "b0": (6,), "w1": (8, 6, 3, 3), "b1": (8,), "w2": (6, 8, 3, 3), "b2": (6,)}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6, 8, 8])]
    return finished(helper.make_graph(nodes, "residual", inputs, outputs, [weights(n, s) for n, s in sizes.items()]))


def test_shortcuts_are_found() -> None:
    working = MaskedNetwork.of(onnxcop.analyze(residual(), options=CPU))
    outer, inner = linear_layer(working, 3), linear_layer(working, 1)
    assert outer is not None
    assert inner is not None
    assert (shortcut_of(outer), shortcut_of(inner)) == ("stem", None)


def test_a_branch_makes_up_for_its_shortcut() -> None:
    original = MaskedNetwork.of(onnxcop.analyze(residual(), options=CPU))
    working = original.copy()
    shift = np.linspace(-1, 1, 6, dtype=np.float32)
    run = refiner(original, working)
    working.write("b0", working.read("b0") + shift)  # a constant error runs down the shortcut
    layer = linear_layer(working, 3)
    assert layer is not None
    batches = run._batches
    assert isinstance(batches, OwnBatches)
    for executor in (batches._target, batches._pruned):
        executor.advance(3)
    live = next(batches._target.stream(4, wanted_names(layer), [3]))
    wanted = [wanted_output(layer, live, batches._pruned.states[3])]
    plain = list(batches._target.stream(4, ["outer"], [3]))
    np.testing.assert_allclose(wanted[0], plain[0]["outer"] - shift[:, None, None], rtol=1e-4, atol=1e-5)


# The last pass, on all samples


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_step_is_repeated_as_regression_on_all_rows(share: float) -> None:
    original = MaskedNetwork.of(onnxcop.analyze(single("Gemm", [4], {"w": (4, 3), "b": (3,)}), options=CPU))
    working = original.copy()
    before, offset = working.read("w") + drawn((4, 3), 7), working.read("b") + 1
    working.write("w", before)
    working.write("b", offset)
    fit, judge = ([{"x": drawn((8, 4), seed + i)} for i in range(2)] for seed in (10, 20))
    reference = Reference(PartialExecutor(original.partition, judge, CPU).finish())
    run = Refiner(original, working, RefineSet(fit, judge, reference), CPU, 0)
    run.repeat({0: FitStep(0.1, share, scarce=True)})
    rows = np.concatenate([batch["x"] for batch in (*fit, *judge)]).astype(np.float64)
    wanted = rows @ original.read("w") + original.read("b")
    left = wanted - rows @ before - offset
    centred = rows - rows.mean(axis=0)
    gram = centred.T @ centred / len(rows)
    loaded = gram + 0.1 * np.diag(np.diagonal(gram))
    change = np.linalg.solve(loaded, centred.T @ (left - left.mean(axis=0)) / len(rows))
    shift = left.mean(axis=0) - rows.mean(axis=0) @ change
    np.testing.assert_allclose(working.read("w"), before + share * change, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(working.read("b"), offset + share * shift, rtol=1e-4, atol=1e-5)


def test_moments_are_matched_once_more_on_all_rows() -> None:
    original = MaskedNetwork.of(onnxcop.analyze(single("Gemm", [4], {"w": (4, 3), "b": (3,)}), options=CPU))
    working = original.copy()
    working.write("w", 0.8 * working.read("w"))
    fit, judge = ([{"x": drawn((8, 4), seed + i)} for i in range(2)] for seed in (10, 20))
    reference = Reference(PartialExecutor(original.partition, judge, CPU).finish())
    Refiner(original, working, RefineSet(fit, judge, reference), CPU, 0).repeat({0: FitStep(scarce=True)})
    rows = np.concatenate([batch["x"] for batch in (*fit, *judge)])
    made, wanted = (rows @ network.read("w") + network.read("b") for network in (working, original))
    np.testing.assert_allclose(made.mean(axis=0), wanted.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made.std(axis=0), wanted.std(axis=0), rtol=1e-4)


def test_layers_with_rows_enough_keep_their_fit() -> None:
    original = MaskedNetwork.of(onnxcop.analyze(chain(), options=CPU))
    working = original.copy()
    working.write("w2", working.read("w2") * 0.9)
    disturbed = working.model.SerializeToString()
    index = next(i for i in range(working.partition.count) if linear_layer(working, i) is not None)
    refiner(original, working).repeat({index: FitStep(1e-3)})
    assert working.model.SerializeToString() == disturbed


@pytest.mark.parametrize(("most", "scarce"), [(60, False), (40_000, True)])
def test_samples_are_scarce_if_a_fit_takes_all_of_them(
    monkeypatch: pytest.MonkeyPatch, most: int, scarce: bool
) -> None:
    """Nine batches of eight maps, each of 64 positions."""
    monkeypatch.setattr(refine, "_MOST_ROWS", most)
    original = MaskedNetwork.of(onnxcop.analyze(chain(), options=CPU))
    working = original.copy()
    working.write("w2", working.read("w2") * 0.7)
    steps = refiner(original, working).run().steps
    assert steps
    assert {step.scarce for step in steps.values()} == {scarce}
