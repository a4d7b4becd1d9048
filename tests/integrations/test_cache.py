"""Decoders with a cache of keys and values: the cache keeps its shape, and query heads are pruned layer by layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_runs import CPU as CPU_OPTIONS
from doc_pages import commands_of
from onnx import TensorProto, helper
from transformer_models import Net

from onnxcop.cli import main as cli
from onnxcop.runtime.session import EngineOptions, Session

CPU = EngineOptions("cpu", 1)
LAYERS, HEADS, SHARED, SIZE, WORDS = 2, 6, 2, 8, 50
Arrays = dict[str, np.ndarray[Any, Any]]


def decoder(form: str) -> onnx.ModelProto:
    """Two layers of grouped attention and an MLP, with past and present keys and values, as runtimes exchange them.

    Args:
        form: `fused`, with GroupQueryAttention, as onnxruntime-genai's builder writes it; `written out`, with a
            Concat of past and new keys and values, as exports of Hugging Face models have it.
    """
    net, width = Net(opset=21), HEADS * SIZE
    ids = net.input("input_ids", ["batch", "tokens"], TensorProto.INT64)
    mask = net.input("attention_mask", ["batch", "all_tokens"], TensorProto.INT64)
    x = net.add("Gather", net.weights(WORDS, width, scale=1.0), ids)
    counted = net.add("ReduceSum", mask, net.ints(1), keepdims=0)
    lengths = net.add("Cast", net.add("Sub", counted, net.ints(1)), to=TensorProto.INT32)
    total = net.add("Gather", net.add("Shape", mask), net.constant(1, np.int64))
    total = net.add("Cast", total, to=TensorProto.INT32)
    for layer in range(LAYERS):
        first = len(net.nodes)
        past = [
            net.input(f"past_key_values.{layer}.{part}", ["batch", SHARED, "past", SIZE]) for part in ("key", "value")
        ]
        normed = net.norm(x, width)
        query, key, value = (net.linear(normed, width, count * SIZE) for count in (HEADS, SHARED, SHARED))
        if form == "fused":
            mixed = net.add(
                "GroupQueryAttention", query, key, value, *past, lengths, total, outputs=3, domain="com.microsoft",
                num_heads=HEADS, kv_num_heads=SHARED,
            )  # fmt: skip
            present = [f"{mixed}_1", f"{mixed}_2"]
        else:
            mixed, present = written_out(net, (query, key, value), past, mask)
        x = net.add("Add", x, net.linear(mixed, width, width))
        for node in net.nodes[first:]:
            node.name = f"/model/layers.{layer}/attn/{node.name}"
        x = net.add("Add", x, net.linear(net.gelu(net.linear(net.norm(x, width), width, 64)), 64, width))
        for part, name in zip(("key", "value"), present, strict=True):
            net.nodes.append(helper.make_node("Identity", [name], [f"present.{layer}.{part}"], f"present{layer}{part}"))
            net.output(f"present.{layer}.{part}", ["batch", SHARED, "all_tokens", SIZE])
    net.nodes.append(helper.make_node("Identity", [net.linear(x, width, WORDS)], ["logits"], "out"))
    net.output("logits", ["batch", "tokens", WORDS])
    return net.model()


def written_out(net: Net, made: tuple[str, str, str], past: list[str], mask: str) -> tuple[str, list[str]]:
    """Attention in single operators; returns its result and the present keys and values."""
    query = net.heads(made[0], HEADS, SIZE)
    present = [
        net.add("Concat", old, net.heads(new, SHARED, SIZE), axis=2) for old, new in zip(past, made[1:], strict=True)
    ]
    repeated = []
    for name in present:
        batch, tokens = (net.add("Gather", net.add("Shape", name), net.ints(axis)) for axis in (0, 2))
        wide = net.add("Unsqueeze", name, net.ints(2))
        whole = net.add("Concat", batch, net.ints(SHARED, HEADS // SHARED), tokens, net.ints(SIZE), axis=0)
        flat = net.add("Concat", batch, net.ints(HEADS), tokens, net.ints(SIZE), axis=0)
        repeated.append(net.add("Reshape", net.add("Expand", wide, whole), flat))
    scores = net.add("MatMul", query, net.add("Transpose", repeated[0], perm=[0, 1, 3, 2]))
    wide = net.add("Unsqueeze", net.add("Cast", mask, to=TensorProto.FLOAT), net.ints(1, 2))
    absent = net.add("Mul", net.add("Sub", net.constant(1.0), wide), net.constant(-1e4))
    scores = net.add("Add", net.add("Mul", scores, net.constant(SIZE**-0.5)), absent)
    shares = net.add("Softmax", scores, axis=-1)
    return net.merged(net.add("MatMul", shares, repeated[1]), HEADS * SIZE), present


def prompts(count: int = 24, past: int = 4, tokens: int = 3) -> Arrays:
    """Calibration data: the end of texts whose beginning is in the cache."""
    rng = np.random.default_rng(0)
    feeds: Arrays = {"input_ids": rng.integers(0, WORDS, (count, tokens))}
    feeds["attention_mask"] = np.ones((count, past + tokens), np.int64)
    for layer in range(LAYERS):
        for part in ("key", "value"):
            feeds[f"past_key_values.{layer}.{part}"] = rng.standard_normal((count, SHARED, past, SIZE), np.float32)
    return feeds


def interface(model: onnx.ModelProto) -> list[bytes]:
    return [value.SerializeToString() for value in (*model.graph.input, *model.graph.output)]


def heads_of(model: onnx.ModelProto) -> list[tuple[int, int]]:
    """Query heads, and heads of keys and values, of every fused attention."""
    found = []
    for node in (node for node in model.graph.node if node.op_type == "GroupQueryAttention"):
        numbers = {entry.name: entry.i for entry in node.attribute}
        found.append((numbers["num_heads"], numbers["kv_num_heads"]))
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "decoder").mkdir()
    np.savez(tmp_path / "prompts.npz", **prompts())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("form", ["fused", "written out"])
def test_the_cache_keeps_its_shape_and_query_heads_go(form: str, folder: Path) -> None:
    """The command of the page on transformers."""
    original = decoder(form)
    onnx.save(original, folder / "decoder" / "model.onnx")
    (command,) = commands_of("transformers.md", "decoder with a cache")
    assert cli.run([*command, *CPU_OPTIONS]) == 0
    small = onnx.load(folder / "decoder-small" / "model.onnx")
    assert interface(small) == interface(original)
    assert sum(tensor.ByteSize() for tensor in small.graph.initializer) < 0.9 * sum(
        tensor.ByteSize() for tensor in original.graph.initializer
    )
    if form == "fused":  # written out, query heads are one axis with those of the cache
        assert all(kept == SHARED and queries % SHARED == 0 for queries, kept in heads_of(small))
        assert sum(queries for queries, _ in heads_of(small)) < LAYERS * HEADS


def test_heads_are_pruned_layer_by_layer(folder: Path) -> None:
    """A layer keeps its heads if it is told to, beside another one that loses some."""
    onnx.save(decoder("fused"), folder / "model.onnx")
    nodes = onnx.load("model.onnx").graph.node
    makers = {name: node for node in nodes for name in node.output}
    attention = next(node for node in nodes if node.op_type == "GroupQueryAttention")
    queries = makers[makers[attention.input[0]].input[1]].name  # the product before the bias
    command = ["model.onnx", "-o", "small.onnx", "--only", queries, "--macs", "0.95", "--criterion", "l2", *CPU_OPTIONS]
    assert cli.run([*command, "--data", "prompts.npz", "--recover", "none", "--latency-seconds", "0"]) == 0
    (less, shared), other = heads_of(onnx.load("small.onnx"))
    assert less < HEADS and shared == SHARED and other == (HEADS, SHARED)


def test_a_layer_keeps_its_heads(folder: Path) -> None:
    """The second command of the page on transformers."""
    onnx.save(decoder("fused"), folder / "decoder" / "model.onnx")
    (command,) = commands_of("transformers.md", "heads of some layers")
    assert cli.run([*command, *CPU_OPTIONS]) == 0
    small = onnx.load(folder / "decoder-small" / "model.onnx")
    kept, (less, shared) = heads_of(small)
    assert kept == (HEADS, SHARED) and less < HEADS and shared == SHARED
    assert interface(small) == interface(onnx.load(folder / "decoder" / "model.onnx"))


def test_words_one_by_one_give_what_a_whole_text_gives(folder: Path) -> None:
    """What a runtime does with a pruned decoder: it feeds the present keys and values as the next past."""
    onnx.save(decoder("fused"), folder / "model.onnx")
    command = ["model.onnx", "-o", "small.onnx", "--macs", "0.7", "--criterion", "l2", "--data", "prompts.npz"]
    assert cli.run([*command, "--recover", "none", "--latency-seconds", "0", *CPU_OPTIONS]) == 0
    words = np.random.default_rng(1).integers(0, WORDS, (2, 6))
    empty = {name: array[:2, :, :0] for name, array in prompts().items() if name.startswith("past")}
    with Session(folder / "small.onnx", CPU) as session:
        whole = session.run({"input_ids": words, "attention_mask": np.ones((2, 6), np.int64), **empty})["logits"]
        cache, one_by_one = empty, []
        for place in range(6):
            feed = {"input_ids": words[:, place : place + 1], "attention_mask": np.ones((2, place + 1), np.int64)}
            found = session.run({**feed, **cache})
            one_by_one.append(found["logits"])
            cache = {re.sub("^present", "past_key_values", name): v for name, v in found.items() if name != "logits"}
    np.testing.assert_allclose(np.concatenate(one_by_one, axis=1), whole, rtol=1e-3, atol=1e-4)
