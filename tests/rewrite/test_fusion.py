"""Nothing in the way of fusion: fixed sizes are written down, and optimized graphs keep their operators."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from transformer_models import Net

import onnxcop
from onnxcop.analysis.analyze import analyze
from onnxcop.rewrite.apply import apply
from onnxcop.rewrite.sizes import FixedSizes

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
BLOCK = 16  # channels of the widest kernels: with these widths no layer leaves the blocked layout


def attention(batch: int | str = "N", tokens: int | str = "S", width: int = 24, heads: int = 3) -> onnx.ModelProto:
    """Attention as legacy exports write it: the head size under the root is read off a tensor."""
    net = Net()
    x = net.input("x", [batch, tokens, width])
    sizes = net.add("Shape", x)
    rows, columns = (net.add("Gather", sizes, net.constant([axis], np.int64), axis=0) for axis in (0, 1))
    apart = [rows, columns, net.constant([heads], np.int64), net.constant([width // heads], np.int64)]
    q, k, v = (
        net.add("Transpose", net.add("Reshape", net.linear(x, width, width), net.add("Concat", *apart, axis=0)),
                perm=[0, 2, 1, 3])
        for _ in range(3)
    )  # fmt: skip
    last = net.add("Slice", net.add("Shape", q), net.constant([-1], np.int64), net.constant([2**31 - 1], np.int64))
    root = net.add("Sqrt", net.add("Cast", last, to=onnx.TensorProto.FLOAT))
    scores = net.add("Div", net.add("MatMul", q, net.add("Transpose", k, perm=[0, 1, 3, 2])), root)
    mixed = net.add("Transpose", net.add("MatMul", net.add("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    together = net.add("Concat", rows, columns, net.constant([width], np.int64), axis=0)
    y = net.linear(net.add("Reshape", mixed, together), width, 4)
    net.output(y, [batch, tokens, 4])
    return net.model()


def operators(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Types of the nodes that ONNX Runtime is left with after all its optimizations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnx.save(model, folder / "model.onnx")
    ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node
    return Counter(f"{node.domain}:{node.op_type}".removeprefix(":") for node in nodes)


def in_blocks(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at 70 % of its arithmetic in whole blocks."""
    limits = onnxcop.Limits(multiple_of=BLOCK)
    return onnxcop.prune(model, macs=0.7, criterion="l2", recover="none", options=CPU, limits=limits).model


def narrowed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with two channels less in every head."""
    analysis = analyze(model, options=CPU)
    groups = [group for group in analysis.structure.groups if group.width == 8]
    assert groups
    return apply(analysis.model, analysis.structure, np.sort(np.concatenate([group.units[-2:] for group in groups])))


@pytest.mark.parametrize("batch", ["N", 2])
@pytest.mark.parametrize("tokens", ["S", 5])
def test_the_root_of_the_head_size_is_written_down(batch: int | str, tokens: int | str) -> None:
    model = attention(batch, tokens)
    pruned = narrowed(model)
    before, after = (Counter(node.op_type for node in one.graph.node) for one in (model, pruned))
    assert "Sqrt" not in after
    assert not after - before  # no arithmetic on sizes is added
    (scale,) = [node for node in pruned.graph.node if node.op_type == "Div"]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in pruned.graph.initializer}
    np.testing.assert_allclose(stored[scale.input[1]], np.sqrt(8), rtol=1e-6)


def test_what_is_written_down_is_right_for_other_sizes() -> None:
    model = attention()
    result = onnxcop.prune(model, macs=0.7, criterion="l2", recover="none", options=CPU)
    assert result.report.verification is not None
    assert result.report.verification.other_shapes
    assert result.report.verification.max_difference is not None
    assert result.report.verification.max_difference < 1e-5


def test_dynamic_and_fixed_sizes_are_distinguished() -> None:
    model = attention("N", 5)
    analysis = analyze(model, options=CPU)
    shapes = analysis.structure.coupling.shapes
    fixed = FixedSizes(analysis.model, shapes)
    joined = next(node.output[0] for node in analysis.model.graph.node if node.op_type == "Concat")
    assert fixed(joined).tolist() == [False, True, True, True]
    root = next(node.output[0] for node in analysis.model.graph.node if node.op_type == "Sqrt")
    assert fixed(root).all()
    assert not fixed("x").any()


def test_a_model_of_the_repository_keeps_its_operators(models_dir: Path, tmp_path: Path) -> None:
    model = onnx.load(models_dir / "digits_resnet.onnx")
    assert operators(in_blocks(model), tmp_path) == operators(model, tmp_path)


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("trained/imagenet_mobilenet_v2", {}),
        ("trained/cifar_resnet20", {}),
        ("trained/yolov8n_320", {}),
        ("trained/ppocr_v4_rec", {}),
        ("trained/nlp_minilm", {}),
        ("skeletons/vit_tiny_patch16_224.legacy", {"com.microsoft:FusedMatMul": 12}),  # its scale is a number now
    ],
)
def test_with_aligned_widths_the_optimized_graph_has_the_operators_of_the_original(
    zoo: Path, tmp_path: Path, name: str, fused: dict[str, int]
) -> None:
    model = onnx.load(zoo / f"{name}.onnx")
    if name.startswith("skeletons"):
        model = filled(zoo, model)
    before, after = operators(model, tmp_path), operators(in_blocks(model), tmp_path)
    assert after - before == fused
    assert before == after or fused


def filled(zoo: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """A skeleton with weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(zoo))
        made: onnx.ModelProto = import_module("skeleton").fill(model)
    return made
