"""Large models are verified without holding their weights once more for every copy and session."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import REPO_ROOT
from onnx import numpy_helper
from small_models import chain, linear, weights, written

import onnxcop
from onnxcop.analysis.analyze import analyze
from onnxcop.criteria.filters import filter_norms, per_filter
from onnxcop.errors import VerificationError
from onnxcop.graph.io import VALUES, WeightFile, values_of, whole
from onnxcop.graph.serialize import copy_fields
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.session import Session
from onnxcop.verification.masked_model import masked
from onnxcop.verification.verify import verify

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def bench() -> Any:
    """The benchmark of memory, which makes encoders."""
    spec = importlib.util.spec_from_file_location("bench_memory", REPO_ROOT / "tools" / "bench_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_memory"] = module
    spec.loader.exec_module(module)
    return module


def encoder(tool: Any) -> onnx.ModelProto:
    """A network of layers of one size."""
    model: onnx.ModelProto = tool.encoder(4, 768, 3072, 8000)
    return model


def one_large_layer(tool: Any) -> onnx.ModelProto:
    """A network with most of its weights in one layer, which every passing copy of a layer shows up in."""
    net = tool.Network()
    hidden = net.add("Relu", [net.linear("x", "first", 6144, 4096)], "hidden")
    net.linear(hidden, "last", 4096, 10)
    shape = ["N", 6144]
    return net.model("wide", onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape), ["N", 10])


@pytest.mark.skipif(sys.platform != "linux", reason="measures what Linux counts")
@pytest.mark.parametrize("make", [encoder, one_large_layer])
def test_a_run_holds_a_model_at_most_four_times(make: Any, tmp_path: Path) -> None:
    tool = bench()
    path = written(make(tool), tmp_path / "net.onnx")
    found, _, code = tool.peak(tool.Case("", path, ("--criterion", "l2", "--recover", "none")), tmp_path / "out.onnx")
    assert code == 0
    script = "import onnxruntime, onnx_graphsurgeon, scipy.sparse, resource, onnxcop.pipeline.prune;"
    script += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    empty = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert found - 1024 * empty <= 4 * path.stat().st_size


@pytest.mark.parametrize("make", [chain, linear])
def test_light_models_compute_the_same_and_share_their_weights(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcop.graph.io._SMALL", 1)
    found = analyze(make(), options=CPU)
    removed = np.array([0, 3, 20])
    file = WeightFile()
    light, plain = masked(found.model, found.structure, removed, file), masked(found.model, found.structure, removed)
    assert WeightFile.of(light) is file
    assert WeightFile.of(plain) is None
    assert light.ByteSize() < plain.ByteSize()
    before = (file.folder / file.name).stat().st_size
    assert WeightFile.of(file.light(found.model)) is file
    after = (file.folder / file.name).stat().st_size
    assert after - before <= sum(len(t.raw_data) for t in found.model.graph.initializer) + 4096 * 9
    assert file.light(found.model) == file.light(found.model)
    assert (file.folder / file.name).stat().st_size == after  # what is there already is not written again
    rng = np.random.default_rng(0)
    with Session(light, CPU) as one, Session(plain, CPU) as two:
        shape = [2 if isinstance(size, str) else size or 1 for size in one.inputs[0].shape]
        feeds = {one.inputs[0].name: rng.standard_normal(shape).astype(np.float32)}
        for name, value in two.run(feeds).items():
            np.testing.assert_allclose(one.run(feeds)[name], value, rtol=1e-5, atol=1e-6)
    folder = file.folder
    assert sorted(path.suffix for path in folder.iterdir()) == [".weights"]
    del file, one, two
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize("limit", [0, 1 << 40])
def test_large_models_are_verified_as_small_ones_are(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcop.verification.verify.LARGEST_COPIED", limit)
    monkeypatch.setattr("onnxcop.graph.io._SMALL", 1)
    found = analyze(linear(), options=CPU)
    removed = np.array([0, 3, 20])
    pruned = apply(found.model, found.structure, removed)
    good = verify(found.model, pruned, found.structure, removed, CPU)
    assert (good.exact_units, good.inexact_units, good.notes) == (3, 0, ())
    assert good.max_difference is not None
    assert good.max_difference < 1e-6
    assert good.other_shapes != {}
    wrong = onnx.ModelProto.FromString(pruned.SerializeToString())
    tensor = next(t for t in wrong.graph.initializer if t.name == "w3")
    tensor.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(tensor), "w3"))
    with pytest.raises(VerificationError, match="differs from the masked original by 0"):
        verify(found.model, wrong, found.structure, removed, CPU)
    wrong.graph.node[0].op_type = "Mul"
    with pytest.raises(VerificationError, match="fails the ONNX checker"):
        verify(found.model, wrong, found.structure, removed, CPU)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8", "uint8", "bool", "int64", "bfloat16"])
@pytest.mark.parametrize("count", [3, 40])
def test_arrays_go_into_the_file_as_they_are(dtype: str, count: int) -> None:
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    values = (np.random.default_rng(0).standard_normal((count, 50)) * 9).astype(kind)[:, ::2]  # not contiguous
    file = WeightFile()
    tensor = file.tensor("t", values)
    whole = numpy_helper.from_array(values, "t")
    assert (tensor.data_location == tensor.EXTERNAL) == (values.nbytes >= 1024)
    assert (tensor.name, tensor.dims, tensor.data_type) == ("t", whole.dims, whole.data_type)
    assert values_of(tensor).tobytes() == values.tobytes()


def test_fields_are_copied_without_reading_what_is_left_out() -> None:
    """Reading the values of a tensor copies them."""
    source = weights("w", (4, 4))
    source.doc_string = "kept"
    target = onnx.TensorProto()
    copy_fields(source, target, VALUES)
    assert (target.name, list(target.dims), target.data_type, target.doc_string) == ("w", [4, 4], 1, "kept")
    assert not target.HasField("raw_data")
    model = chain()
    everything = onnx.ModelProto()
    copy_fields(model, everything, ())
    assert everything == model


def context_of(model: onnx.ModelProto) -> onnxcop.PruningContext:
    """What a criterion sees of a model."""
    found = analyze(model, options=CPU)
    return onnxcop.PruningContext.of(found.model, found.structure, found.cost)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("block", [1, 50, 1 << 20])
@pytest.mark.parametrize("make", [chain, linear])
def test_norms_in_parts_are_those_of_the_whole(
    make: Any, order: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(make())
    whole = per_filter(context, lambda filters: np.linalg.norm(filters, order, axis=1))
    monkeypatch.setattr("onnxcop.criteria.filters._BLOCK", block)
    np.testing.assert_allclose(filter_norms(context, order), whole, rtol=1e-12)
    assert len(set(whole.tolist())) > 8


def test_a_large_layer_is_never_held_in_double_precision() -> None:
    context = context_of(one_large_layer(bench()))
    size = 4 * 6144 * 4096
    tracemalloc.start()
    try:
        norms = filter_norms(context, 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(norms) == 4096
    assert peak < 2 * size  # one copy as it is stored, and parts of it


@pytest.mark.parametrize("make", [chain, linear])
def test_a_model_is_cut_alike_with_its_weights_in_a_file(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcop.rewrite.apply._LARGE", 1)
    monkeypatch.setattr("onnxcop.graph.io._SMALL", 1)
    found, removed, file = analyze(make(), options=CPU), np.array([0, 3, 20]), WeightFile()
    light = apply(found.model, found.structure, removed, file)
    cut = apply(found.model, found.structure, removed)
    assert WeightFile.of(light) is file
    assert {t.name for t in light.graph.initializer if t.data_location == t.EXTERNAL} == {
        t.name for t in cut.graph.initializer if sum(size > 1 for size in t.dims) > 1
    }
    assert whole(light) == cut


def test_tensors_of_the_file_may_be_written_without_changing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    file, values = WeightFile(), np.arange(600, dtype=np.float32).reshape(30, 20)
    tensor = file.tensor("t", values)
    for source in (tensor, numpy_helper.from_array(values, "t")):
        own = file.writable(source)
        own[3] = -1
        np.testing.assert_array_equal(np.delete(own, 3, 0), np.delete(values, 3, 0))
        np.testing.assert_array_equal(values_of(source), values)
    assert isinstance(file.writable(tensor), np.memmap)
