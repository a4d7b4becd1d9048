"""Models in and out: types, external data, what is written, and what a model keeps of itself."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import chain, linear, outputs, shapes, weights, written, written_with_data

import onnxcop
from onnxcop.errors import ModelError
from onnxcop.graph import io as models
from onnxcop.pipeline.prune import prune
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions(provider="cpu", threads=1)


def pruned(model: onnx.ModelProto | Path, **settings: Any) -> onnx.ModelProto:
    return prune(model, options=CPU, recover="none", **settings).model


def tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def pictures(dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(dtype)


# Types


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(chain, np.float16), (chain, np.float32), (linear, np.float32), (linear, np.float64)],
)
def test_models_keep_their_type(make: Any, dtype: Any, tmp_path: Path) -> None:
    model = make(dtype)
    small = pruned(model)
    before, after = tensors(model), tensors(small)
    assert {name: t.data_type for name, t in after.items()} == {name: t.data_type for name, t in before.items()}
    path = tmp_path / "small.onnx"
    models.save(small, path)
    onnx.checker.check_model(str(path), full_check=True)
    result = outputs(path, pictures(dtype) if make is chain else pictures(dtype)[:, 0, :, 0])
    assert result.dtype == dtype
    assert np.isfinite(result).all()
    assert sum(map(sum, shapes(small).values())) < sum(map(sum, shapes(model).values()))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_pruning_by_hand_gives_the_same_bits(dtype: Any) -> None:
    model = chain(dtype)
    result = prune(model, options=CPU, recover="none")
    gone = {(cut.tensor, cut.axis): cut.indices for cut in result.plan.cuts}
    first, second = gone.get(("w1", 0), ()), gone.get(("w2", 0), ())
    assert first or second
    values = {name: numpy_helper.to_array(t) for name, t in tensors(model).items()}
    expected = {
        **values,
        "w1": np.delete(values["w1"], first, 0),
        "b1": np.delete(values["b1"], first, 0),
        "w2": np.delete(np.delete(values["w2"], first, 1), second, 0),
        "b2": np.delete(values["b2"], second, 0),
        "w3": np.delete(values["w3"], second, 1),
    }
    for name, tensor in tensors(result.model).items():
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected[name], name)


def test_values_in_typed_fields_are_read_and_kept() -> None:
    model = chain()
    for tensor in model.graph.initializer:
        if tensor.name in ("w2", "shift"):
            values = numpy_helper.to_array(tensor)
            tensor.ClearField("raw_data")
            tensor.float_data.extend(values.reshape(-1).tolist())
    small = pruned(model)
    np.testing.assert_array_equal(outputs(small, pictures()), outputs(pruned(chain()), pictures()))
    assert tensors(small)["shift"] == tensors(model)["shift"]


# What a model keeps


def test_what_is_not_pruned_stays_to_the_byte() -> None:
    model = chain()
    small = pruned(model)
    before, after = tensors(model), tensors(small)
    assert list(after) == list(before)
    same = [name for name in before if before[name].dims == after[name].dims]
    assert {"shift", "b3"} <= set(same)
    for name in same:
        assert after[name].SerializeToString() == before[name].SerializeToString()


def test_names_opset_metadata_and_documentation_survive() -> None:
    model = chain()
    helper.set_model_props(model, {"license": "free", "classes": "a,b,c"})
    model.graph.node[0].attribute[0].doc_string = "padding"
    small = pruned(model)
    assert [(n.name, n.op_type, n.doc_string) for n in small.graph.node] == [
        (n.name, n.op_type, n.doc_string) for n in model.graph.node
    ]
    assert [n.SerializeToString() for n in small.graph.node] == [n.SerializeToString() for n in model.graph.node]
    assert list(small.opset_import) == list(model.opset_import)
    assert list(small.metadata_props)[: len(model.metadata_props)] == list(model.metadata_props)
    for name in ("ir_version", "producer_name", "producer_version", "model_version", "doc_string"):
        assert getattr(small, name) == getattr(model, name)
    assert (small.graph.name, small.graph.doc_string) == (model.graph.name, model.graph.doc_string)
    assert list(small.graph.input) == list(model.graph.input)
    assert list(small.graph.output) == list(model.graph.output)


def test_dynamic_axes_survive_and_work() -> None:
    small = pruned(chain())
    assert small.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    x = np.concatenate([pictures(), pictures() + 1, pictures() * 2])
    whole = outputs(small, x)
    assert whole.shape == (6, 5)
    np.testing.assert_allclose(whole[2:3], outputs(small, x[2:3]), rtol=1e-4, atol=1e-6)


def test_stale_shapes_are_refreshed() -> None:
    model = onnx.shape_inference.infer_shapes(chain())
    assert len(model.graph.value_info) > 0
    small = pruned(model)
    widths = shapes(small)
    inferred = onnx.shape_inference.infer_shapes(small, strict_mode=True, data_prop=True)
    for value in inferred.graph.value_info:
        dims = [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        if value.name in ("c1", "r1"):
            assert dims == ["N", widths["w1"][0], 8, 8]
        if value.name in ("c2", "r2"):
            assert dims == ["N", widths["w2"][0], 8, 8]


def test_the_input_model_is_not_changed() -> None:
    model = chain()
    before = model.SerializeToString()
    pruned(model)
    assert model.SerializeToString() == before


def test_initializers_that_are_also_inputs_and_unused_ones_survive() -> None:
    model = chain()
    w1 = tensors(model)["w1"]
    model.graph.input.append(helper.make_tensor_value_info("w1", w1.data_type, w1.dims))
    model.graph.initializer.append(weights("idle", (4, 4)))
    small = pruned(model, macs=0.5, limits=onnxcop.Limits(multiple_of=1), keep_initializer_inputs=True)
    declared = next(value for value in small.graph.input if value.name == "w1")
    dims = tuple(dim.dim_value for dim in declared.type.tensor_type.shape.dim)
    assert dims == shapes(small)["w1"]
    assert dims[0] < w1.dims[0]
    assert tensors(small)["idle"] == tensors(model)["idle"]


def test_local_functions_are_inlined() -> None:
    body = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Sigmoid", ["b"], ["c"])]
    opset = helper.make_opsetid("", 17)
    function = helper.make_function("own", "Act", ["a"], ["c"], body, [opset])
    model = chain()
    node = model.graph.node[1]
    node.op_type, node.domain = "Act", "own"
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    small = pruned(model, macs=0.6)
    assert shapes(small)["w1"][0] < 8 or shapes(small)["w2"][0] < 16
    assert "Sigmoid" in [n.op_type for n in small.graph.node]


# External data


@pytest.mark.parametrize("location", ["net.data", "weights/all.bin", "näme with space.data"])
def test_external_data_is_read(tmp_path: Path, location: str) -> None:
    (tmp_path / location).parent.mkdir(exist_ok=True)
    path = written_with_data(chain(), tmp_path / "net.onnx", location)
    assert path.stat().st_size < 2000
    loaded = models.load(path)
    assert loaded == chain()
    assert pruned(path) == pruned(chain())


def test_external_data_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    written_with_data(chain(), folder / "net.onnx", "net.data")
    monkeypatch.chdir(tmp_path)
    assert models.load("a/net.onnx") == chain()
    monkeypatch.chdir(folder)
    assert models.load("net.onnx") == chain()
    assert models.load("../a/net.onnx") == chain()


def test_one_file_per_tensor_is_read(tmp_path: Path) -> None:
    copy = chain()
    onnx.save(
        copy, str(tmp_path / "net.onnx"), save_as_external_data=True,
        all_tensors_to_one_file=False, size_threshold=0,
    )  # fmt: skip
    assert models.load(tmp_path / "net.onnx") == chain()


def test_external_data_is_written(tmp_path: Path) -> None:
    model = chain(widths=(32, 64))
    before = model.SerializeToString()
    path = tmp_path / "out.onnx"
    models.save(model, path, external_data=True)
    assert model.SerializeToString() == before
    (data,) = [file for file in tmp_path.iterdir() if file != path]
    assert data.stat().st_size > 32 * 64 * 9 * 4
    assert path.stat().st_size < len(before) - 32 * 64 * 9 * 4 + 4096
    assert models.load(path) == model
    onnx.checker.check_model(str(path), full_check=True)
    np.testing.assert_array_equal(outputs(path, pictures()), outputs(model, pictures()))
    stored = onnx.load(path, load_external_data=False)
    for tensor in stored.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                assert entry.value == data.name
            if entry.key == "offset":
                assert int(entry.value) % 4096 == 0


def test_typed_fields_and_constants_are_stored_outside_too(tmp_path: Path) -> None:
    model = chain(widths=(32, 64))
    tensor = tensors(model)["w2"]
    values = numpy_helper.to_array(tensor)
    tensor.ClearField("raw_data")
    tensor.float_data.extend(values.reshape(-1).tolist())
    constant = helper.make_node("Constant", [], ["w3c"], value=tensors(model)["w3"])
    model.graph.node.insert(0, constant)
    model.graph.node[7].input[1] = "w3c"
    path = tmp_path / "out.onnx"
    models.save(model, path, external_data=True)
    assert path.stat().st_size < 8000
    loaded = models.load(path)
    np.testing.assert_array_equal(numpy_helper.to_array(tensors(loaded)["w2"]), values)
    np.testing.assert_array_equal(outputs(path, pictures()), outputs(model, pictures()))


def test_a_new_data_file_spares_that_of_the_old_model(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    old, new = chain(widths=(32, 64)), chain(np.float64, widths=(32, 64))
    models.save(old, path, external_data=True)
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file != path}
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(path.read_bytes())
    models.save(new, path, external_data=True)
    assert models.load(path) == new
    assert models.load(copy) == old
    for name, content in first.items():
        assert (tmp_path / name).read_bytes() == content


def test_weights_that_are_left_over_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, foreign = tmp_path / "out.onnx", tmp_path / "other.onnx.01234567.data"
    foreign.write_bytes(b"somebody else's")
    old, new = chain(widths=(32, 64)), chain(np.float64, widths=(32, 64))
    with caplog.at_level("INFO", logger="onnxcop"):
        models.save(old, path, external_data=True)
        models.save(old, path, external_data=True)  # the same weights, the same file
        assert not caplog.messages
        (stale,) = set(tmp_path.iterdir()) - {path, foreign}
        for external in (True, False):
            models.save(new, path, external_data=external)
            (line,) = caplog.messages
            assert "weights of earlier results are left" in line
            assert str(stale) in line
            assert str(foreign) not in line
            assert models.load(path) == new
            caplog.clear()
    assert stale.is_file()


def test_over_two_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of large models, walked with small ones by lowering what counts as large."""
    for name in ("graph.io", "verification.verify"):
        monkeypatch.setattr(f"onnxcop.{name}.LARGEST_SINGLE_FILE", 10_000)
    monkeypatch.setattr("onnxcop.runtime.session.LARGEST_IN_MEMORY", 10_000)
    source = written_with_data(chain(widths=(32, 64)), tmp_path / "net.onnx", "net.data")
    result = prune(source, options=CPU, recover="none")
    assert result.report.verification is not None
    assert result.report.verification.max_difference is not None
    path = tmp_path / "out" / "small.onnx"
    path.parent.mkdir()
    with pytest.raises(ModelError, match="--external-data"):
        result.save(path, external_data=False)
    assert list(path.parent.iterdir()) == []
    result.save(path)
    assert len(list(path.parent.iterdir())) == 2
    assert models.load(path) == result.model
    np.testing.assert_array_equal(outputs(path, pictures()), outputs(result.model, pictures()))


# Writing


def test_a_result_replaces_the_old_file_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.onnx"
    path.write_bytes(b"old")
    seen = []
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        seen.append((path.read_bytes(), Path(self).read_bytes() == chain().SerializeToString()))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    models.save(chain(), path)
    assert seen == [(b"old", True)]
    assert path.read_bytes() == chain().SerializeToString()
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]


def test_permissions_are_those_of_any_new_file_or_of_the_old_one(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        models.save(chain(), tmp_path / "new.onnx")
        old = tmp_path / "old.onnx"
        old.touch()
        old.chmod(0o604)
        models.save(chain(), old)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new.onnx").stat().st_mode) == 0o640
    assert stat.S_IMODE(old.stat().st_mode) == 0o604


def test_identity_ignores_the_place_of_weights(tmp_path: Path) -> None:
    model = chain()
    outside = written_with_data(model, tmp_path / "a.onnx", "a.data")
    inside = written(model, tmp_path / "b.onnx")
    assert models.sha256(models.load(outside)) == models.sha256(models.load(inside))
    assert models.sha256(models.load(inside)) == models.sha256(models.load(model))


def test_models_in_other_places_of_a_tensor_are_checked() -> None:
    """A weight inside a Constant node is as broken as an initializer."""
    broken = numpy_helper.from_array(np.zeros(3, np.float32), "inner")
    broken.raw_data = broken.raw_data[:-1]
    model = chain()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=broken))
    with pytest.raises(ModelError, match="'inner'"):
        models.load(model)


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT8E4M3FN, TensorProto.BFLOAT16])
def test_rare_types_of_weights_are_not_refused(kind: int) -> None:
    model = chain()
    model.graph.initializer.append(helper.make_tensor("rare", kind, [3], [1, 2, 3]))
    model.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"b"]))
    assert models.load(model) == model
