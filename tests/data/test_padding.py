"""Padding behind a mask: found and left out, but only if outputs do not depend on it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from transformer_models import bert

import onnxcop
from onnxcop.data.dataset import CalibrationData
from onnxcop.data.open import open_data, open_source
from onnxcop.data.options import DataOptions
from onnxcop.data.padding import TrimmedData, padding_of
from onnxcop.graph.input_spec import InputSpec
from onnxcop.recovery.setup import without_padding
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions("cpu", threads=1)
TOKENS = 6


def masked_mean(*, forgets: bool = True) -> onnx.ModelProto:
    """The mean of embeddings [batch, tokens, 4] where a mask is 1, or (`forgets=False`) over all tokens."""
    ints = {name: helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "s"]) for name in ("ids", "mask")}
    rng = np.random.default_rng(0)
    stored = [
        onnx.numpy_helper.from_array(rng.standard_normal((9, 8)).astype(np.float32), "table"),
        onnx.numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), "w"),
        onnx.numpy_helper.from_array(rng.standard_normal((8, 4)).astype(np.float32), "v"),
        onnx.numpy_helper.from_array(np.array([2], np.int64), "last"),
        onnx.numpy_helper.from_array(np.array([1], np.int64), "along"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("MatMul", ["z", "v"], ["e"]),
        helper.make_node("Cast", ["mask"], ["known"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["known", "last"], ["wide"]),
        helper.make_node("Mul", ["e", "wide"], ["held"]),
        helper.make_node("ReduceSum", ["held" if forgets else "e", "along"], ["total"], keepdims=0),
    ]
    output = helper.make_tensor_value_info("total", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(nodes, "mean", list(ints.values()), [output], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def padded(count: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = (np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (count, 1))).astype(np.int64)
    return {"ids": rng.integers(1, 9, (count, TOKENS)) * mask, "mask": mask}


def opened(model: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> CalibrationData:
    found = open_data(onnxcop.analyze(model, options=CPU), DataOptions(data=arrays, batch_size=8))
    assert found is not None
    return found


def test_batches_end_with_their_longest_sequence() -> None:
    arrays = padded()
    data = opened(masked_mean(), arrays)
    padding = padding_of(data)
    assert padding is not None and padding.mask == "mask" and dict(padding.axes) == {"ids": 1, "mask": 1}
    batches = list(TrimmedData.of(data, padding).batches())
    sizes = [batch["mask"].shape[1] for batch in batches]
    assert sizes == sorted(sizes) and sizes[0] < TOKENS
    assert sum(len(batch["ids"]) for batch in batches) == len(arrays["ids"])
    assert sum(int(batch["ids"].sum()) for batch in batches) == int(arrays["ids"].sum())
    fit, probe = TrimmedData.of(data, padding).split(0.25, 0)
    assert all(batch["mask"].any(axis=0).all() for part in (fit, probe, fit.take(9)) for batch in part.batches())


def test_batches_travel_by_places_unless_they_depend_on_the_samples() -> None:
    plain = open_source(np.arange(20.0).reshape(10, 2), [InputSpec("x", np.dtype(np.float32), ("n", 2))], batch_size=4)
    assert list(plain.items()) == [(0, 4), (4, 8), (8, 10)]
    data = opened(masked_mean(), padded())
    padding = padding_of(data)
    assert padding is not None
    trimmed = TrimmedData.of(data, padding)
    assert not any(isinstance(item, tuple) for item in trimmed.items())
    for each in (plain, data, trimmed):
        travelled = [feed for item in each.items() for feed in each.feeds_of(item)]
        for one, other in zip(travelled, each.batches(), strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("forgets", [True, False])
def test_padding_is_left_out_only_if_outputs_do_not_depend_on_it(forgets: bool) -> None:
    model = masked_mean(forgets=forgets)
    data = opened(model, padded())
    found = without_padding(onnxcop.analyze(model, options=CPU), data, CPU)
    assert isinstance(found, TrimmedData) == forgets
    assert forgets or found is data


@pytest.mark.parametrize("mask", ["holes", "full", "leading", "counts"])
def test_what_is_no_padding_stays(mask: str) -> None:
    arrays = padded()
    if mask == "holes":
        arrays["mask"][:, 1] = 0
    elif mask == "full":
        arrays["mask"][:] = 1
    elif mask == "leading":
        arrays["mask"] = np.ascontiguousarray(arrays["mask"][:, ::-1])
    else:
        arrays["mask"] *= 2
    assert padding_of(opened(masked_mean(), arrays)) is None


def test_a_fixed_length_stays() -> None:
    arrays = {"input_ids": padded()["ids"], "attention_mask": padded()["mask"], "token_type_ids": padded()["mask"] * 0}
    assert padding_of(opened(bert(), arrays)) is None
