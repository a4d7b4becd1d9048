"""Attention as exporters write it and as single operators: what can be removed, and that it is exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import transformer_models as models
from onnx import TensorProto, helper, numpy_helper
from ops.oracle import prune_and_verify
from ops.sample import REFUSED

from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.analysis.census import census
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.session import EngineOptions
from onnxcop.verification.verify import verify

CPU = EngineOptions("cpu", threads=1)
MICROSOFT = "com.microsoft"

# By model: widths of the exact groups and of the inexact ones (the residual stream, across a
# LayerNormalization), with dimensions of heads preferred and with whole heads preferred.
WRITTEN_OUT: dict[str, tuple[Callable[[], onnx.ModelProto], list[int], list[int], list[int]]] = {
    "bert": (models.bert, [8, 8, 8, 8, 10, 32, 48, 48], [4, 4, 10, 32, 48, 48], [32]),
    "vit, gathered": (lambda: models.vit("gather"), [8, 8, 48, 48], [3, 3, 48, 48], [24]),
    "vit, split": (lambda: models.vit("split"), [8, 8, 48, 48], [3, 3, 48, 48], [24]),
    "vit, sliced": (lambda: models.vit("slice"), [8, 8, 8, 8, 48, 48], [3, 3, 48, 48], [24]),
    "grouped, expanded": (lambda: models.grouped("expand"), [8, 8], [2], [48]),
    "grouped, tiled": (lambda: models.grouped("tile"), [8, 8], [2], [48]),
    "grouped, gathered": (lambda: models.grouped("gather"), [8, 8], [2], [48]),
    "rotary": (models.rotary, [4, 8], [4], [32]),  # queries and keys by pairs of dimensions
    "rotary, neighbours": (lambda: models.rotary(pairs="neighbours"), [4, 8], [4], [32]),
    "rotary, fed": (lambda: models.rotary("fed"), [8], [4], [32]),
    "swin": (models.swin, [4], [3], [12, 24]),
    "segformer": (models.segformer, [8, 8, 24], [2, 24], [16, 16]),
    "mobilevit": (models.mobilevit, [4, 7, 10, 10, 20], [3, 7, 10, 10, 20], [12]),
    "edgenext": (models.edgenext, [4, 20], [4, 20], [8]),  # attention between channels: only whole heads
}


def _widths(analysis: Analysis, *, exact: bool) -> list[int]:
    return sorted(group.width for group in analysis.structure.groups if group.exact == exact)


def _check(model: onnx.ModelProto, policy: str = "finest", allowed: tuple[str, ...] = ()) -> Analysis:
    """Analyze a model, remove some units and most, and compare with the masked original."""
    analysis = analyze(model, policy=policy, options=CPU)
    assert not analysis.structure.coupling.declined
    prune_and_verify(analysis.model, analysis.structure, 0, allowed)
    return analysis


@pytest.mark.parametrize("policy", ["finest", "coarsest"])
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_attention_written_out(name: str, policy: str) -> None:
    make, fine, coarse, inexact = WRITTEN_OUT[name]
    analysis = _check(make(), policy)
    assert _widths(analysis, exact=True) == (fine if policy == "finest" else coarse)
    assert _widths(analysis, exact=False) == inexact
    frozen = [layer for layer in census(analysis) if layer.prunable < layer.filters]
    given_out = [layer for layer in frozen if "reaches a graph output" in str(next(iter(layer.reasons)))]
    turned_from_outside = 2 if (name, policy) == ("rotary, fed", "finest") else 0  # queries and keys
    assert len(given_out) == 1 and len(frozen) == 1 + turned_from_outside


def test_queries_give_way_to_keys_that_share_a_matrix_with_values() -> None:
    """With as many heads as dimensions queries could lose either; keys and values lose dimensions."""
    net, heads, size, deep, tokens = models.Net(), 4, 4, 12, 5
    width = heads * size
    x = net.linear(net.input("x", ["batch", tokens, 6]), 6, width)
    both = net.add("Reshape", net.linear(x, width, heads * (size + deep)), net.ints(0, 0, heads, -1))
    k = net.add("Split", both, net.ints(size, deep), outputs=2, axis=3)
    k, v = net.add("Transpose", k, perm=[0, 2, 3, 1]), net.add("Transpose", f"{k}_1", perm=[0, 2, 1, 3])
    scores = net.add("MatMul", net.heads(net.linear(x, width, width), heads, size), k)
    mixed = net.merged(net.add("MatMul", net.add("Softmax", scores, axis=-1), v), heads * deep)
    net.output(net.linear(mixed, heads * deep, 3), ["batch", tokens, 3])
    analysis = _check(net.model())
    assert _widths(analysis, exact=True) == [4, 12, 16]


def _optimized(tmp_path: Path, *, multi_head: bool) -> onnx.ModelProto:
    """BERT as the optimizer for transformers that onnxruntime ships makes it."""
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    options = pytest.importorskip("onnxruntime.transformers.fusion_options").FusionOptions("bert")
    options.use_multi_head_attention = multi_head
    path = tmp_path / "bert.onnx"
    path.write_bytes(models.bert().SerializeToString())
    found = optimizer.optimize_model(
        str(path), model_type="bert", num_heads=4, hidden_size=32, opt_level=0, optimization_options=options
    ).model
    model = onnx.ModelProto.FromString(found.SerializeToString())
    if MICROSOFT not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return model


@pytest.mark.parametrize("multi_head", [False, True])
def test_bert_with_fused_operators(tmp_path: Path, multi_head: bool) -> None:
    model = _optimized(tmp_path, multi_head=multi_head)
    found = Counter(node.op_type for node in model.graph.node if node.domain == MICROSOFT)
    attention = "MultiHeadAttention" if multi_head else "Attention"
    assert found == {attention: 2, "SkipLayerNormalization": 4, "BiasGelu": 2}
    analysis = _check(model)
    assert _widths(analysis, exact=True) == [4, 4, 10, 32, 48, 48]  # of attention whole heads
    assert _widths(analysis, exact=False) == [32]


def test_bert_of_an_opset_without_layer_normalization(tmp_path: Path) -> None:
    model = _optimized(tmp_path, multi_head=False)  # onnxruntime had the operator before ONNX did
    next(entry for entry in model.opset_import if not entry.domain).version = 13
    analysis = _check(model, allowed=(REFUSED,))
    assert _widths(analysis, exact=True) == [4, 4, 10, 32, 48, 48]
    assert _widths(analysis, exact=False) == [32]


def test_bert_optimized_by_the_runtime(tmp_path: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(models.bert().SerializeToString(), options, providers=["CPUExecutionProvider"])
    model = onnx.load(tmp_path / "fused.onnx")
    assert {"FusedMatMul", "SkipLayerNormalization"} <= {node.op_type for node in model.graph.node}
    analysis = _check(model, allowed=(REFUSED,))
    assert _widths(analysis, exact=False) == [32]


def _fused(op: str, bias: bool, dims: tuple[int, int] = (8, 6)) -> onnx.ModelProto:
    """One attention of four heads whose products get a bias from a graph input, where `bias` is set."""
    net, (size, value), heads, tokens = models.Net(opset=23), dims, 4, 5
    x = net.input("x", ["batch", tokens, 10])
    y = net.linear(x, 10, 16)
    if op == "packed":
        widths = [heads * size, heads * size, heads * value]
        inputs = [y, net.weights(16, sum(widths)), net.weights(sum(widths), scale=0.5)]
        extra = {"domain": MICROSOFT, "num_heads": heads, "qkv_hidden_sizes": widths}
        name, place = "Attention", 5
    else:
        inputs = [net.linear(y, 16, heads * width) for width in (size, size, value)]
        name, place, extra = "Attention", 3, {"q_num_heads": heads, "kv_num_heads": heads}
        if op == "apart":
            name, place, extra = "MultiHeadAttention", 5, {"domain": MICROSOFT, "num_heads": heads}
            inputs.append(net.weights(heads * (2 * size + value), scale=0.5))
    if bias:
        inputs += [""] * (place - len(inputs))
        inputs.append(net.input("bias", [1, heads, tokens, tokens]))
    mixed = net.add(name, *inputs, **extra)
    net.output(net.linear(mixed, heads * value, 3), ["batch", tokens, 3])
    return net.model()


@pytest.mark.parametrize("op", ["packed", "apart", "standard"])
def test_fused_attention_gives_heads_or_else_dimensions(op: str) -> None:
    assert _widths(_check(_fused(op, bias=False)), exact=True) == [4, 16]
    # A bias for every head comes from outside, so no head may go; dimensions may, of q and k or of v.
    assert _widths(_check(_fused(op, bias=True)), exact=True) == [6, 8, 16]


@pytest.mark.parametrize("op", ["packed", "apart", "standard"])
def test_default_scale_is_written_down_with_fewer_dimensions(op: str) -> None:
    analysis = analyze(_fused(op, bias=True), options=CPU)
    groups = {group.width: group.units for group in analysis.structure.groups}
    for width, expected in ((8, 8**-0.5), (6, None)):
        pruned = apply(analysis.model, analysis.structure, groups[width][:2])
        verify(analysis.model, pruned, analysis.structure, groups[width][:2], CPU)
        node = next(node for node in pruned.graph.node if "Attention" in node.op_type)
        found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert found.get("scale") == (None if expected is None else pytest.approx(expected))
        if op == "packed":
            assert found["qkv_hidden_sizes"] == ([24, 24, 24] if width == 8 else [32, 32, 16])


def _grouped_fused(op: str, *, freeze: bool) -> onnx.ModelProto:
    """Six query heads in two groups; where `freeze` is set keys and values of the past come from outside."""
    net, heads, groups, size, tokens = models.Net(opset=23), 6, 2, 16, 3
    y = net.input("x", ["batch", tokens, 10])
    inputs = [net.linear(y, 10, count * size) for count in (heads, groups, groups)]
    past = [1, groups, 2, size]
    caches = [net.input(f"past{k}", past) if freeze else net.constant(net.rng.standard_normal(past)) for k in (0, 1)]
    if op == "standard":
        counts = {"q_num_heads": heads, "kv_num_heads": groups}
        mixed = net.add("Attention", *inputs, "", *caches, **counts, outputs=3)
    else:
        lengths = [net.constant([tokens + 1], np.int32), net.constant(tokens + 2, np.int32)]
        counts = {"num_heads": heads, "kv_num_heads": groups}
        mixed = net.add("GroupQueryAttention", *inputs, *caches, *lengths, outputs=3, domain=MICROSOFT, **counts)
    net.output(net.linear(mixed, heads * size, 3), [1, tokens, 3])
    net.inputs[0].type.tensor_type.shape.dim[0].dim_value = 1
    return net.model()


@pytest.mark.parametrize("op", ["standard", "microsoft"])
def test_groups_of_query_heads_or_else_their_members(op: str) -> None:
    whole = _check(_grouped_fused(op, freeze=False))
    assert _widths(whole, exact=True) == [2]
    members = _check(_grouped_fused(op, freeze=True))
    assert _widths(members, exact=True) == [3]  # of every group the same: keys and values stay
    units = members.structure.groups[0].units[:1]
    pruned = apply(members.model, members.structure, units)
    node = next(node for node in pruned.graph.node if "Attention" in node.op_type)
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert found["kv_num_heads"] == 2
    assert found["q_num_heads" if op == "standard" else "num_heads"] == 4


@pytest.mark.parametrize("cut", ["slice", "gather"])
def test_table_of_positions_keeps_rows_for_longer_inputs(cut: str) -> None:
    net = models.Net()
    ids = net.input("ids", ["batch", "tokens"], TensorProto.INT64)
    x = net.add("Gather", net.weights(11, 8), ids, axis=0)
    length = net.add("Gather", net.add("Shape", ids), net.ints(1), axis=0)
    if cut == "slice":
        rows = net.add("Slice", net.weights(1, 64, 8), net.ints(0), length, net.ints(1))
    else:
        stop = net.add("Squeeze", length, net.ints(0))
        places = net.add("Range", net.constant(0, np.int64), stop, net.constant(1, np.int64))
        rows = net.add("Gather", net.weights(64, 8), places, axis=0)
    net.output(net.linear(net.add("Add", x, rows), 8, 3), ["batch", "tokens", 3])
    analysis = analyze(net.model(), input_shapes={"ids": (1, 5)}, options=CPU)
    assert _widths(analysis, exact=True) == [8]
    pruned = apply(analysis.model, analysis.structure, analysis.structure.groups[0].units[:3])
    table = next(t for t in pruned.graph.initializer if 64 in t.dims)
    assert numpy_helper.to_array(table).shape[-2:] == (64, 5)
