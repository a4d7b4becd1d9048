"""Values as bytes that other processes read."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import chain

from onnxcop.graph.io import WeightFile, inlined
from onnxcop.parallel.packing import pack, unpack


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_value_comes_back(tmp_path: Path, in_memory: bool) -> None:
    array = np.random.default_rng(0).normal(size=(70, 90))
    value = {"large": array, "small": np.arange(3), "same": array, "model": chain(), "text": "ö"}
    pack(value, path := tmp_path / "value")
    back = unpack(path.read_bytes() if in_memory else path)
    np.testing.assert_array_equal(back["large"], array)
    assert back["large"] is back["same"]
    assert back["small"].tolist() == [0, 1, 2] and back["text"] == "ö"
    assert back["model"].SerializeToString() == value["model"].SerializeToString()


def test_arrays_can_be_written_to_and_the_file_stays(tmp_path: Path) -> None:
    pack(np.zeros(100_000), path := tmp_path / "value")
    one, other = unpack(path), unpack(path)
    assert one.ctypes.data % 64 == 0
    one += 1
    assert other.sum() == 0 and unpack(path).sum() == 0


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    digests = [pack(np.full(10_000, value), tmp_path / str(place)) for place, value in enumerate((1, 1, 2))]
    assert digests[0] == digests[1] != digests[2]


def test_weights_in_a_shared_file_are_packed_by_value(tmp_path: Path) -> None:
    weights = onnx.numpy_helper.from_array(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [weights])
    file = WeightFile()
    light = file.light(onnx.helper.make_model(graph))
    assert light.graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL
    pack(light, path := tmp_path / "value")
    (back,) = unpack(path).graph.initializer
    assert back.data_location != onnx.TensorProto.EXTERNAL
    assert back.raw_data == weights.raw_data == inlined(light.graph.initializer[0]).raw_data
