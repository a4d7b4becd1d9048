"""What removal makes of the nodes and stored tensors of a graph, node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from ops.oracle import CPU, analyse
from small_models import weights

from onnxcop._base.types import Array
from onnxcop.coupling.groups import Structure
from onnxcop.graph.io import WeightFile
from onnxcop.rewrite.apply import apply
from onnxcop.rewrite.merge import refill
from onnxcop.runtime.session import Session
from onnxcop.verification.verify import verify


def graph(border: str, body: str, stored: dict[str, Any], opset: int = 17) -> onnx.ModelProto:
    """A model in text; tuples stand for random weights of a shape."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {border} {{ {body} }}')
    for name, value in stored.items():
        random = isinstance(value, tuple)
        model.graph.initializer.append(weights(name, value) if random else numpy_helper.from_array(value, name))
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type.lower()}{number}"
    return model


def pruned(model: onnx.ModelProto, lost: dict[str, int], **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """The model without the first so many columns of some matrices, which is equal to the masked original."""
    structure = analyse(model, shapes or None)
    removed = np.unique(np.concatenate([columns(structure, name)[:count] for name, count in lost.items()]))
    result = apply(model, structure, removed)
    verify(model, result, structure, removed, CPU)
    names = [node.name for node in result.graph.node]
    assert len(set(names)) == len(names)
    return result


def columns(structure: Structure, name: str) -> Array:
    """Units of the columns of a matrix."""
    atoms = structure.coupling.labels[name][-1]
    assert atoms is not None
    units = structure.units_on(atoms)
    assert (units >= 0).all()
    return np.asarray(units)


def stored(model: onnx.ModelProto) -> dict[str, Any]:
    """Values of the stored tensors."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def kinds(model: onnx.ModelProto) -> list[str]:
    """Operators, in the order of the graph."""
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("opset", [12, 13])
def test_a_squeeze_of_all_axes_of_size_one_says_which(opset: int) -> None:
    """With one channel left, it would drop the channels too."""
    body = "h = MatMul (x, w0) r = Relu (h) s = Squeeze (r) y = MatMul (s, w1)"
    model = graph("(float[2,1,6] x) => (float[2,3] y)", body, {"w0": (6, 4), "w1": (4, 3)}, opset)
    for lost, axes in ((2, []), (3, [1])):
        result = pruned(model, {"w0": lost})
        squeeze = result.graph.node[2]
        if opset == 12:
            assert [list(a.ints) for a in squeeze.attribute] == [axes] * bool(axes)
            assert list(squeeze.input) == ["r"]
        else:
            assert not squeeze.attribute
            assert squeeze.input[0] == "r"
            assert [stored(result)[name].tolist() for name in squeeze.input[1:]] == [axes] * bool(axes)


@pytest.mark.parametrize("opset", [12, 13, 18])
def test_a_split_into_equal_parts_says_their_sizes_once_they_differ(opset: int) -> None:
    parts = "<axis = 1, num_outputs = 2>" if opset >= 18 else "<axis = 1>"
    body = f"h = MatMul (x, w0) a, b = Split {parts} (h) y = MatMul (a, w1) z = MatMul (b, w2)"
    border = "(float[N,6] x) => (float[N,3] y, float[N,3] z)"
    model = graph(border, body, {"w0": (6, 8), "w1": (4, 3), "w2": (4, 3)}, opset)
    result = pruned(model, {"w0": 3})
    split = result.graph.node[1]
    names = {"axis"} | ({"split"} if opset == 12 else set())
    assert {attribute.name for attribute in split.attribute} == names
    if opset == 12:
        sizes = next(list(a.ints) for a in split.attribute if a.name == "split")
    else:
        sizes = stored(result)[split.input[1]].tolist()
    assert sizes == [1, 4]


def test_a_written_part_of_a_computed_size_is_replaced_in_its_place() -> None:
    """No arithmetic at run time: ONNX Runtime fuses the Concat with the Reshape."""
    body = """
      h = MatMul (x, w0)
      sizes = Shape (h)
      n = Gather (sizes, zero)
      rows = Concat <axis = 0> (n, heads, four)
      r = Reshape (h, rows)
      t = Transpose <perm = [0, 2, 1]> (r)
      y = MatMul (t, w1)
    """
    constants = {"zero": np.array([0]), "heads": np.array([2]), "four": np.array([4])}
    model = graph("(float[N,6] x) => (float[N,4,3] y)", body, {"w0": (6, 8), "w1": (2, 3), **constants})
    model.graph.output[0].type.tensor_type.shape.dim[1].ClearField("dim_value")
    structure = analyse(model, {"x": (5, 6)})
    assert len(structure.unit_class) == 2
    result = pruned(model, {"w0": 1}, x=(5, 6))
    assert sorted(kinds(result)) == sorted(kinds(model))
    (joined,) = (node for node in result.graph.node if node.op_type == "Concat")
    values = stored(result)
    assert [values[name].tolist() if name in values else name for name in joined.input] == ["n", [1], [4]]


def test_a_size_that_is_an_output_stays_what_it_was() -> None:
    body = "h = MatMul (x, w0) s = Shape (h) y = MatMul (h, w1)"
    model = graph("(float[N,6] x) => (float[N,3] y, int64[2] s)", body, {"w0": (6, 8), "w1": (8, 3)})
    result = pruned(model, {"w0": 3}, x=(5, 6))
    assert [node.name for node in result.graph.node] == [
        "matmul0",
        "shape1",
        "s_pruned_scale",
        "s_pruned_divide",
        "matmul2",
    ]
    assert [output.name for output in result.graph.output] == ["y", "s"]
    with Session(result, CPU) as session:
        assert session.run({"x": np.zeros((9, 6), np.float32)})["s"].tolist() == [9, 8]


def test_a_size_that_a_body_gives_out_stays_what_it_was() -> None:
    border = "(float[N,6] x, bool c) => (float[N,3] y, int64[2] t)"
    body = """
      h = MatMul (x, w0)
      t = If (c) <
        then_branch = a () => (int64[2] s1) { s1 = Shape (h) },
        else_branch = b () => (int64[2] s2) { s2 = Shape (x) }
      >
      y = MatMul (h, w1)
    """
    model = graph(border, body, {"w0": (6, 8), "w1": (8, 3)})
    result = pruned(model, {"w0": 3}, x=(5, 6), c=())
    assert stored(result)["w0"].shape == (6, 5)
    with Session(result, CPU) as session:
        for chosen, size in ((True, 8), (False, 6)):
            feeds = {"x": np.zeros((9, 6), np.float32), "c": np.array(chosen)}
            assert session.run(feeds)["t"].tolist() == [9, size]


def test_a_number_that_no_input_changes_is_written_down() -> None:
    """The square root of a count of channels, although it is read from a tensor of any batch."""
    body = """
      h = MatMul (x, w0)
      sizes = Shape (h)
      n = Gather (sizes, one)
      f = Cast <to = 1> (n)
      root = Sqrt (f)
      q = Div (h, root)
      y = MatMul (q, w1)
    """
    model = graph("(float[N,6] x) => (float[N,3] y)", body, {"w0": (6, 9), "w1": (9, 3), "one": np.array(1)})
    result = pruned(model, {"w0": 4}, x=(5, 6))
    assert kinds(result) == ["MatMul", "Div", "MatMul"]
    assert stored(result)[result.graph.node[1].input[1]].tolist() == 3


def test_one_computed_size_is_corrected_for_each_of_its_readers() -> None:
    """Nodes of both corrections have names of their own."""
    body = """
      h = MatMul (x, w0)
      sizes = Shape (h)
      a = Reshape (h, sizes)
      k = MatMul (x, w2)
      b = Reshape (k, sizes)
      y = MatMul (a, w1)
      z = MatMul (b, w3)
    """
    shapes = {"w0": (6, 8), "w1": (8, 3), "w2": (6, 8), "w3": (8, 3)}
    model = graph("(float[N,6] x) => (float[N,3] y, float[N,3] z)", body, shapes)
    result = pruned(model, {"w0": 2, "w2": 3}, x=(5, 6))
    assert {name: value.shape for name, value in stored(result).items() if name.startswith("w")} == {
        "w0": (6, 6), "w1": (6, 3), "w2": (6, 5), "w3": (5, 3),
    }  # fmt: skip


def test_what_is_said_of_a_node_stays_with_it() -> None:
    body = "h = MatMul (x, w0) r = Reshape (h, size) y = MatMul (r, w1)"
    model = graph("(float[2,6] x) => (float[2,3] y)", body, {"w0": (6, 8), "w1": (8, 3), "size": np.array([2, 8])})
    for node in model.graph.node:
        node.doc_string = f"about {node.name}"
        node.metadata_props.add(key="place", value=node.name)
    model.ir_version = 10
    result = pruned(model, {"w0": 3})
    assert stored(result)["size"].tolist() == [2, 5]
    assert [node.doc_string for node in result.graph.node] == ["about matmul0", "about reshape1", "about matmul2"]
    found = [[(entry.key, entry.value) for entry in node.metadata_props] for node in result.graph.node]
    assert found == [[("place", "matmul0")], [("place", "reshape1")], [("place", "matmul2")]]


def test_large_matrices_alone_go_into_the_file() -> None:
    """A mebibyte is not large yet; vectors stay in the graph, whatever their form."""
    shapes = {"least": (513, 512), "most": (512, 512), "row": (1, 2**19), "line": (2**19,)}
    body = "h = MatMul (x, w) y = MatMul (h, v)"
    model = graph("(float[N,4] x) => (float[N,3] y)", body, {"w": (4, 4), "v": (4, 3)})
    model.graph.initializer.extend(
        numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in shapes.items()
    )
    structure = analyse(model)
    file = WeightFile()
    light = apply(model, structure, np.array([], np.int64), file)
    assert [t.name for t in light.graph.initializer if t.data_location == t.EXTERNAL] == ["least"]
    assert apply(model, structure, np.array([], np.int64)) == model


def test_matrices_of_two_columns_go_into_the_file_and_those_of_one_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcop.rewrite.apply._LARGE", 1)
    monkeypatch.setattr("onnxcop.graph.io._SMALL", 1)
    body = "h = MatMul (x, two) k = Relu (h) y = MatMul (k, one)"
    model = graph("(float[N,2] x) => (float[N,1] y)", body, {"two": (2, 8), "one": (8, 1)})
    structure = analyse(model)
    light = apply(model, structure, columns(structure, "two")[:3], WeightFile())
    external = {tensor.name: tensor.data_location == tensor.EXTERNAL for tensor in light.graph.initializer}
    assert external == {"two": True, "one": False}
    assert [list(tensor.dims) for tensor in light.graph.initializer] == [[2, 5], [5, 1]]


@pytest.mark.parametrize("dtype", ["float32", "int8", "bool", "complex64", "bfloat16", "float8_e5m2", "int4"])
def test_new_values_of_a_tensor_are_those_that_onnx_would_store(dtype: str) -> None:
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    values = (np.arange(12).reshape(3, 4) % 5).astype(kind)
    wanted = numpy_helper.from_array(values[:, :3], "t")
    tensor = numpy_helper.from_array(values, "t")
    tensor.doc_string = wanted.doc_string = "about it"
    refill(tensor, np.ascontiguousarray(values[:, :3]), None)
    assert tensor == wanted
