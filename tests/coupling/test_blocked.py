"""Models that onnxruntime quantized in blocks or fused around dynamic quantization, pruned by the command."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cli_runs import BARE
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from onnxcop.cli import main as cli

MICROSOFT = "com.microsoft"


def feed_forward(*widths: int) -> onnx.ModelProto:
    """Matrix products with biases and Relu between them."""
    rng = np.random.default_rng(0)
    nodes, stored, name = [], [], "x"
    for number, (before, after) in enumerate(pairwise(widths)):
        values = {"w": rng.standard_normal((before, after)) * before**-0.5, "b": rng.standard_normal(after) * 0.1}
        stored += [numpy_helper.from_array(a.astype(np.float32), f"{n}{number}") for n, a in values.items()]
        last = number == len(widths) - 2
        nodes += [
            helper.make_node("MatMul", [name, f"w{number}"], [f"p{number}"], f"product{number}"),
            helper.make_node("Add", [f"p{number}", f"b{number}"], ["y" if last else f"s{number}"], f"sum{number}"),
        ]
        if not last:
            nodes.append(helper.make_node("Relu", [f"s{number}"], [f"r{number}"], f"relu{number}"))
            name = f"r{number}"
    ends = [
        [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["rows", width])]
        for end, width in (("x", widths[0]), ("y", widths[-1]))
    ]
    graph = helper.make_graph(nodes, "feed_forward", *ends, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def in_blocks(model: onnx.ModelProto, *, symmetric: bool) -> onnx.ModelProto:
    """The model with products of 4 bits, as onnxruntime's quantizer writes them."""
    quiet = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    quiet.setLevel(logging.ERROR)
    quantizer = MatMulNBitsQuantizer(model, block_size=16, is_symmetric=symmetric)
    quantizer.process()
    return quantizer.model.model


def prune_by_command(path: Path, capsys: pytest.CaptureFixture[str], macs: float) -> tuple[onnx.ModelProto, str]:
    out = path.with_suffix(".pruned.onnx")
    assert cli.run([str(path), "-o", str(out), "--macs", str(macs), "--criterion", "l2", *BARE]) == 0
    return onnx.load(out), capsys.readouterr().out


@pytest.mark.parametrize("symmetric", [True, False])
def test_products_in_blocks_lose_whole_blocks_and_equal_the_masked_original(
    symmetric: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bits.onnx"
    onnx.save(in_blocks(feed_forward(24, 128, 96, 8), symmetric=symmetric), path)
    pruned, said = prune_by_command(path, capsys, 0.6)
    assert "equals the masked original" in said
    stored = {tensor.name: tensor.dims for tensor in pruned.graph.initializer}
    products = [node for node in pruned.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 3
    inner = []
    for node in products:
        given = {a.name: a.i for a in node.attribute}
        assert tuple(stored[node.input[1]]) == (given["N"], -(-given["K"] // 16), 8)
        assert tuple(stored[node.input[2]]) == (given["N"], -(-given["K"] // 16))
        inner.append(given["K"])
    assert inner[0] == 24 and inner[1] < 128
    assert all(width % 16 == 0 for width in inner[1:])


def test_scales_in_one_row_are_declined_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = in_blocks(feed_forward(32, 64, 64, 8), symmetric=True)
    flat = next(node.input[2] for node in model.graph.node if node.op_type == "MatMulNBits")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == flat)
    tensor.dims[:] = [int(np.prod(tensor.dims))]
    path = tmp_path / "flat.onnx"
    onnx.save(model, path)
    _, said = prune_by_command(path, capsys, 0.9)
    assert "MatMulNBits with scales or zero points in one row" in said


def test_products_fused_with_dynamic_quantization_lose_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, dynamic, fused = (tmp_path / f"{name}.onnx" for name in ("plain", "dynamic", "fused"))
    onnx.save(feed_forward(24, 64, 48, 8), plain)
    quantize_dynamic(plain, dynamic, weight_type=QuantType.QUInt8)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(fused)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(str(dynamic), options, providers=["CPUExecutionProvider"])
    assert sum(node.op_type == "DynamicQuantizeMatMul" for node in onnx.load(fused).graph.node) == 3
    pruned, said = prune_by_command(fused, capsys, 0.6)
    assert "units are inexact" in said
    assert sum(node.op_type == "DynamicQuantizeMatMul" for node in pruned.graph.node) == 3
    kept = {tensor.name: tuple(tensor.dims) for tensor in pruned.graph.initializer}
    shapes = [kept[node.input[1]] for node in pruned.graph.node if node.op_type == "DynamicQuantizeMatMul"]
    assert shapes[0][1] == shapes[1][0] < 64


def mixture() -> onnx.ModelProto:
    """A router and four experts, between two products."""
    rng = np.random.default_rng(1)
    shapes = {
        "a": (12, 16),
        "r": (16, 4),
        "f": (4, 24, 16),
        "fb": (4, 24),
        "s": (4, 16, 24),
        "sb": (4, 16),
        "z": (16, 5),
    }
    stored = [
        numpy_helper.from_array((rng.standard_normal(shape) * 0.3).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "embed"),
        helper.make_node("MatMul", ["h", "r"], ["p"], "router"),
        helper.make_node("MoE", ["h", "p", "f", "fb", "s", "sb"], ["m"], "experts", domain=MICROSOFT, k=2),
        helper.make_node("Add", ["h", "m"], ["t"], "sum"),
        helper.make_node("MatMul", ["t", "z"], ["y"], "head"),
    ]
    ends = [
        [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["rows", width])] for end, width in (("x", 12), ("y", 5))
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(helper.make_graph(nodes, "mixture", *ends, stored), opset_imports=opsets, ir_version=9)


def test_experts_lose_inner_channels_alike_and_stay_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experts.onnx"
    onnx.save(mixture(), path)
    pruned, said = prune_by_command(path, capsys, 0.6)
    assert "equals the masked original" in said and "holds probabilities of experts" in said
    kept = {tensor.name: tuple(tensor.dims) for tensor in pruned.graph.initializer}
    assert kept["f"][0] == kept["s"][0] == 4
    assert kept["f"][1] == kept["s"][2] == kept["fb"][1]
    assert (kept["f"][1], kept["a"][1]) != (24, 16)


def quantized_mixture() -> onnx.ModelProto:
    """The mixture with experts of 8 bits, beside two products that have nothing to do with them."""
    model, rng = mixture(), np.random.default_rng(2)
    del model.graph.initializer[2:6]
    stored = {
        "f": rng.integers(100, 156, (4, 24, 16), np.uint8),
        "fs": np.full((4, 24), 0.02, np.float32),
        "s": rng.integers(100, 156, (4, 16, 24), np.uint8),
        "ss": np.full((4, 16), 0.02, np.float32),
        "e": (rng.standard_normal((12, 40)) * 0.3).astype(np.float32),
        "g": (rng.standard_normal((40, 5)) * 0.3).astype(np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in stored.items())
    experts = helper.make_node(
        "QMoE", ["h", "p", "f", "fs", "", "s", "ss", ""], ["m"], "experts", domain=MICROSOFT, k=2, expert_weight_bits=8
    )
    model.graph.node[2].CopyFrom(experts)
    model.graph.node[-1].output[0] = "o"
    model.graph.node.extend(
        [
            helper.make_node("MatMul", ["x", "e"], ["beside"], "beside"),
            helper.make_node("Relu", ["beside"], ["active"], "active"),
            helper.make_node("MatMul", ["active", "g"], ["away"], "away"),
            helper.make_node("Add", ["o", "away"], ["y"], "both"),
        ]
    )
    return model


def test_quantized_experts_stay_and_the_rest_is_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experts.onnx"
    onnx.save(quantized_mixture(), path)
    assert cli.run(["inspect", str(path)]) == 0
    assert "no rule for operator com.microsoft.QMoE (experts)" in capsys.readouterr().out
    pruned, said = prune_by_command(path, capsys, 0.8)
    assert "equals the masked original" in said
    kept = {tensor.name: tuple(tensor.dims) for tensor in pruned.graph.initializer}
    assert kept["f"] == (4, 24, 16) and kept["s"] == (4, 16, 24) and kept["a"] == (12, 16)
    assert kept["e"][1] == kept["g"][0] < 40
