"""Quantized models, as onnxruntime's quantizer makes them: pruned, and compared without their rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from ops import cases_contraction, cases_quantized
from ops.oracle import prune_and_verify
from ops.sample import Array, Sample
from transformer_models import Net, bert

from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.verification.dequantize import computes_rounded, write_twins

CPU = EngineOptions("cpu", threads=1)
MICROSOFT = "com.microsoft"
INTEGER = {np.dtype(np.int8), np.dtype(np.uint8)}


def _network() -> onnx.ModelProto:
    """Convolutions (one of them depthwise) with a shortcut, a gate and a Concat, then linear layers."""
    net = Net(opset=17)
    x = net.input("x", ["batch", 3, 8, 8])

    def conv(x: str, outs: int, ins: int, kernel: int, **attributes: Any) -> str:
        weights = net.weights(outs, ins, kernel, kernel, scale=(ins * kernel**2) ** -0.5)
        return net.add("Conv", x, weights, net.weights(outs, scale=0.3), **attributes)

    skip = net.add("Relu", conv(x, 8, 3, 3, pads=[1] * 4))
    x = net.add("LeakyRelu", conv(skip, 12, 8, 3, pads=[1] * 4), alpha=0.1)
    x = net.add("Add", conv(x, 8, 12, 1), skip)
    x = net.add("Mul", x, net.add("Sigmoid", conv(x, 8, 1, 3, pads=[1] * 4, group=8)))
    x = net.add("MaxPool", net.add("Concat", x, skip, axis=1), kernel_shape=[2, 2], strides=[2, 2])
    x = net.add("GlobalAveragePool", net.add("Relu", conv(x, 10, 16, 3)))
    x = net.add("Gemm", net.add("Flatten", x), net.weights(14, 10), net.weights(14, scale=0.3), transB=1)
    x = net.add("Relu", net.add("MatMul", net.add("Relu", x), net.weights(14, 12)))
    net.output(net.add("Gemm", x, net.weights(12, 4), net.weights(4, scale=0.3)), ["batch", 4])
    return net.model()


class _Samples:
    """Calibration data as onnxruntime's quantizer asks for it."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.found: Iterator[dict[str, Array]] = iter(
            [{"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(4)]
        )

    def get_next(self) -> dict[str, Array] | None:
        return next(self.found, None)


def _static(folder: Path, form: str, *, per_channel: bool, signed: bool) -> onnx.ModelProto:
    quantization = pytest.importorskip("onnxruntime.quantization")
    before, after = folder / "before.onnx", folder / "after.onnx"
    onnx.save(_network(), before)
    kind = quantization.QuantType.QInt8 if signed else quantization.QuantType.QUInt8
    quantization.quantize_static(
        str(before), str(after), _Samples(), quant_format=quantization.QuantFormat[form],
        per_channel=per_channel, weight_type=quantization.QuantType.QInt8, activation_type=kind,
    )  # fmt: skip
    return onnx.load(after)


def _dynamic(folder: Path, model: onnx.ModelProto, *, per_channel: bool) -> onnx.ModelProto:
    quantization = pytest.importorskip("onnxruntime.quantization")
    before, after = folder / "before.onnx", folder / "after.onnx"
    onnx.save(model, before)
    quantization.quantize_dynamic(str(before), str(after), per_channel=per_channel)
    return onnx.load(after)


def _widths(analysis: Analysis) -> list[int]:
    return sorted(group.width for group in analysis.structure.groups)


WIDTHS = [8, 10, 12, 12, 14]


@pytest.mark.parametrize("signed", [False, True], ids=["uint8", "int8"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_statically_quantized(tmp_path: Path, form: str, per_channel: bool, signed: bool) -> None:
    model = _static(tmp_path, form, per_channel=per_channel, signed=signed)
    kinds = {node.op_type for node in model.graph.node}
    expected = {"QLinearConv", "QLinearMatMul", "QGemm", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSigmoid"}
    assert kinds >= (expected if form == "QOperator" else {"QuantizeLinear", "DequantizeLinear", "Conv"})
    analysis = analyze(model, options=CPU)
    assert not analysis.structure.coupling.declined
    assert _widths(analysis) == WIDTHS
    assert all(group.exact for group in analysis.structure.groups)
    prune_and_verify(analysis.model, analysis.structure, 0)  # the results react, and equal the masked ones


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_scales_and_zero_points_of_channels_are_cut(tmp_path: Path, form: str) -> None:
    analysis = analyze(_static(tmp_path, form, per_channel=True, signed=False), options=CPU)
    units = next(group.units for group in analysis.structure.groups if group.width == 10)[[1, 4, 5]]
    pruned = apply(analysis.model, analysis.structure, units)
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in analysis.model.graph.initializer}
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in pruned.graph.initializer}
    cut = {name for name, values in after.items() if values.shape != before[name].shape}
    kept = [0, 2, 3, 6, 7, 8, 9]
    vectors = [name for name in cut if before[name].shape == (10,)]
    assert len(vectors) == 3 + (form == "QDQ") * 2  # scale, zero point and bias; of the bias as well
    for name in vectors:
        np.testing.assert_array_equal(after[name], before[name][kept])


@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
def test_dynamically_quantized(tmp_path: Path, per_channel: bool) -> None:
    model = _dynamic(tmp_path, _network(), per_channel=per_channel)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["ConvInteger"] == 5 and kinds["MatMulInteger"] == 3
    try:
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except ort.capi.onnxruntime_pybind11_state.NotImplemented:
        pytest.skip("this ONNX Runtime has no ConvInteger with weights in int8")
    analysis = analyze(model, options=CPU)
    assert not analysis.structure.coupling.declined
    assert _widths(analysis) == WIDTHS
    for group in analysis.structure.groups:  # fewer channels, another range, other rounding
        assert not group.exact
        assert "quantized by the range" in str(group.reasons[0])
    prune_and_verify(analysis.model, analysis.structure, 0)


def test_dynamically_quantized_bert(tmp_path: Path) -> None:
    analysis = analyze(_dynamic(tmp_path, bert(), per_channel=True), options=CPU)
    assert not analysis.structure.coupling.declined
    assert _widths(analysis) == [8, 8, 8, 8, 10, 32, 32, 48, 48]
    prune_and_verify(analysis.model, analysis.structure, 0)


WITH_TWINS = {
    "QGemm", "QLinearAdd", "QLinearAveragePool", "QLinearConcat", "QLinearGlobalAveragePool", "QLinearLeakyRelu",
    "QLinearMul", "QLinearSigmoid",
}  # fmt: skip
TWINS = {
    ("", "QLinearConv"): cases_contraction.CASES[("", "QLinearConv")],
    ("", "QLinearMatMul"): cases_contraction.CASES[("", "QLinearMatMul")],
} | {key: case for key, case in cases_quantized.CASES.items() if key[1] in WITH_TWINS}


def _step_sizes(sample: Sample) -> float:
    """The scale of the result."""
    places = {"QGemm": 7, "QLinearAdd": 6, "QLinearConcat": 0, "QLinearConv": 6, "QLinearMatMul": 6, "QLinearMul": 6}
    found = sample.inputs[places.get(sample.op, 3)]
    assert found is not None and found.size == 1
    return float(found.reshape(()))


@pytest.mark.parametrize("key", sorted(TWINS), ids="".join)
@settings(deadline=None, derandomize=True, max_examples=10, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_twins_compute_the_same_up_to_a_step(key: tuple[str, str], data: st.DataObject) -> None:
    sample = data.draw(TWINS[key])
    fed = sorted(sample.data)
    model = sample.fed_model(fed)
    assert computes_rounded(model)
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    write_twins(twin)
    last = bool(sample.attributes.get("channels_last"))
    assert computes_rounded(twin) == last  # the twins of these would need Transposes: they stay
    feeds = {sample.name(position): sample.inputs[position] for position in fed}
    one = Session(model, CPU, optimize=False).run(feeds)["out0"]  # type: ignore[arg-type]
    two = Session(twin, CPU, optimize=False).run(feeds)["out0"]  # type: ignore[arg-type]
    assert one.dtype in INTEGER and one.dtype == two.dtype and one.shape == two.shape
    assert np.abs(one.astype(int) - two.astype(int)).max() <= 1


def test_computed_weights_have_no_twin() -> None:
    scale, zero = numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.uint8(3), "z")
    values = [helper.make_tensor_value_info(name, TensorProto.UINT8, [1, 2, 1, 1]) for name in ("x", "w", "y")]
    node = helper.make_node("QLinearConv", ["x", "s", "z", "w", "s", "z", "s", "z"], ["y"])
    graph = helper.make_graph([node], "g", values[:2], values[2:], [scale, zero])
    model = helper.make_model(graph)
    write_twins(model)
    assert [node.op_type for node in model.graph.node] == ["QLinearConv"]


@pytest.mark.zoo
def test_quantized_style_transfer(zoo: Path) -> None:
    path = zoo / "trained" / "style_transform_qdq.onnx"
    if not path.exists():
        pytest.skip(f"no {path.name} in the model zoo")
    analysis = analyze(path, options=CPU)
    assert not analysis.structure.coupling.declined
    assert len(analysis.structure.groups) > 0
