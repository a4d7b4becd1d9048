"""Models are written part by part, in the bytes that protobuf would write."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from small_models import chain, linear, weights

from onnxcop.graph import serialize
from onnxcop.graph.serialize import file_size, write_message

EXPORTS = sorted((Path(__file__).parents[1] / "exports").glob("*.onnx"))


def serialized(model: onnx.ModelProto) -> bytes:
    file = io.BytesIO()
    write_message(model, file)
    return file.getvalue()


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.stem)
def test_exports_are_written_as_protobuf_writes_them(path: Path) -> None:
    model = onnx.load(path)
    assert serialized(model) == model.SerializeToString()
    assert file_size(model) == model.ByteSize()


@pytest.mark.parametrize("count", [1, 127, 128, 129, 16383, 16384, 2**21])
def test_lengths_of_every_number_of_bytes(count: int) -> None:
    model = chain()
    int8 = onnx.TensorProto.INT8
    model.graph.initializer.append(onnx.TensorProto(name="t", dims=[count], data_type=int8, raw_data=bytes(count)))
    model.graph.doc_string = "d" * count
    assert serialized(model) == model.SerializeToString()
    assert file_size(model) == model.ByteSize()


def test_fields_of_newer_versions_are_kept() -> None:
    plain = linear().SerializeToString()
    model = onnx.ModelProto.FromString(plain + b"\xfa\x3e\x03new")  # field 1007, which no version has
    assert serialized(model) == model.SerializeToString()
    inner = onnx.GraphProto.FromString(model.graph.SerializeToString() + b"\xfa\x3e\x03new")
    model = linear()
    model.graph.CopyFrom(inner)
    assert b"new" in serialized(model)
    assert serialized(model) == model.SerializeToString()


@pytest.mark.parametrize("count", [0, 5, 300])
def test_tensors_that_do_not_have_the_values_of_their_shape(count: int) -> None:
    model = chain()
    odd = model.graph.initializer.add(name="odd", dims=[3], data_type=onnx.TensorProto.FLOAT, raw_data=bytes(count))
    assert serialized(model) == model.SerializeToString()
    odd.ParseFromString(odd.SerializeToString() + b"\xfa\x3e\x03new")
    assert b"new" in serialized(model)
    assert serialized(model) == model.SerializeToString()


def test_values_of_no_fixed_size() -> None:
    model = chain()
    model.graph.initializer.add(name="words", dims=[2], data_type=onnx.TensorProto.STRING, string_data=[b"a", b"bc"])
    model.graph.initializer.add(name="nibbles", dims=[3], data_type=onnx.TensorProto.INT4, raw_data=b"\x21\x03")
    model.graph.initializer.add(name="none", dims=[0], data_type=onnx.TensorProto.FLOAT, raw_data=b"")
    assert serialized(model) == model.SerializeToString()
    assert file_size(model) == model.ByteSize()


def test_no_more_than_a_tensor_is_written_at_once() -> None:
    model = chain()
    for number in range(20):
        model.graph.initializer.append(weights(f"extra{number}", (100, 100)))

    class Pieces(io.BytesIO):
        largest = 0

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.largest = max(self.largest, len(data))
            return super().write(data)

    file = Pieces()
    write_message(model, file)
    assert file.getvalue() == model.SerializeToString()
    assert file.largest < 1.1 * 4 * 100 * 100


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.stem)
def test_initializers_in_a_second_part_are_read_as_in_one(path: Path) -> None:
    model = onnx.load(path)
    data = serialize.serialized(model)
    assert onnx.ModelProto.FromString(data) == model
    if model.graph.initializer:
        assert data != model.SerializeToString()


def test_runtimes_read_a_model_in_two_parts() -> None:
    model, data = chain(), np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    whole, parts = (
        onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, {"x": data})[0]
        for source in (model.SerializeToString(), serialize.serialized(model))
    )
    np.testing.assert_array_equal(whole, parts)


def test_quick_bytes_keep_fields_of_newer_versions() -> None:
    model = onnx.ModelProto.FromString(linear().SerializeToString() + b"\xfa\x3e\x03new")
    assert serialize.serialized(model) == model.SerializeToString()
