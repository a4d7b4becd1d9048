"""Operators that only a library of the user has, and shapes that cannot be inferred."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from small_models import weights, written

import onnxcop
from onnxcop.analysis.inspect import inspect
from onnxcop.cli import main as cli
from onnxcop.errors import EngineError

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def with_operator(domain: str, operator: str, declared: list[int | str] | None = None) -> onnx.ModelProto:
    """Two convolutions, an operator that ONNX Runtime does not know, and two more convolutions."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "c1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "r1"),
        helper.make_node("Conv", ["b", "w2"], ["c"], "c2", pads=[1, 1, 1, 1]),
        helper.make_node(operator, ["c"], ["d", "rest"], "magic", domain=domain),
        helper.make_node("Conv", ["d", "w3"], ["e"], "c3", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["e"], ["f"], "r3"),
        helper.make_node("Conv", ["f", "w4"], ["y"], "c4", pads=[1, 1, 1, 1]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", c, 8, 8]) for n, c in (("x", 3), ("y", 4)))
    sizes = {"w1": (8, 3, 3, 3), "w2": (6, 8, 3, 3), "w3": (10, 6, 3, 3), "w4": (4, 10, 3, 3)}
    graph = helper.make_graph(nodes, "g", [x], [y], [weights(name, size) for name, size in sizes.items()])
    if declared is not None:
        graph.value_info.append(helper.make_tensor_value_info("d", TensorProto.FLOAT, declared))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_layers_behind_an_unknown_shape_say_so(caplog: pytest.LogCaptureFixture) -> None:
    analysis = onnxcop.analyze(with_operator("my.ops", "Magic"), options=CPU)
    declined = [str(reason) for _, reason in analysis.structure.coupling.declined]
    assert declined == [
        "no rule for operator my.ops.Magic (magic)",
        *(f"behind Magic magic, the shape of whose output is not known ({name})" for name in ("c3", "c4")),
    ]
    assert not caplog.messages
    inspect(analysis)
    (warning,) = caplog.messages
    assert "the shape of tensor 'd'" in warning
    assert "value_info; --input-shape does not set it" in warning


@pytest.mark.parametrize("declared", [[1, 6, 8, 8], ["N", 6, 8, 8]], ids=["fixed", "dynamic"])
def test_declared_shapes_are_used_if_the_model_does_not_run(
    declared: list[int | str], caplog: pytest.LogCaptureFixture
) -> None:
    analysis = onnxcop.analyze(with_operator("my.ops", "Magic", declared), options=CPU)
    inspect(analysis)
    assert not caplog.messages
    assert [group.width for group in analysis.structure.groups] == [8, 10]
    assert analysis.structure.coupling.shapes["d"].shape == (1, 6, 8, 8)


def test_sizes_that_nothing_settles_stay_unknown(caplog: pytest.LogCaptureFixture) -> None:
    analysis = onnxcop.analyze(with_operator("my.ops", "Magic", ["N", 6, "H", 8]), options=CPU)
    assert [group.width for group in analysis.structure.groups] == [8]
    inspect(analysis)
    assert caplog.messages


def test_a_model_that_does_not_run_is_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(with_operator("my.ops", "Magic"), tmp_path / "net.onnx")
    for recovery in ("auto", "none"):
        assert cli.run([str(path), "--provider", "cpu", "--recover", recovery]) == 1
        shown = capsys.readouterr().err
        assert "does not run even before it is pruned" in shown
        assert "give the library of that operator with --custom-ops" in shown


def test_libraries_that_are_none(tmp_path: Path) -> None:
    no_library = tmp_path / "ops.so"
    with pytest.raises(EngineError, match="there is no such library of operators; check --custom-ops"):
        onnxcop.EngineOptions(custom_ops=(str(no_library),))
    no_library.write_bytes(b"no library")
    with pytest.raises(EngineError, match="could not load the operators of"):
        onnxcop.analyze(with_operator("my.ops", "Magic"), options=onnxcop.EngineOptions(custom_ops=(str(no_library),)))


def test_a_library_makes_its_operators_run(tmp_path: Path) -> None:
    extensions = pytest.importorskip("onnxruntime_extensions", reason="no library of operators is installed")
    path = written(with_operator("ai.onnx.contrib", "NegPos"), tmp_path / "net.onnx")
    out = tmp_path / "small.onnx"
    library = ["--custom-ops", extensions.get_library_path(), "--provider", "cpu"]
    assert cli.run([str(path), "-o", str(out), "--macs", "0.7", "--latency-seconds", "0.02", *library]) == 0
    assert cli.run(["compare", str(path), str(out), "--latency-seconds", "0", *library]) == 0
    before, after = (onnxcop.analyze(file, options=CPU) for file in (path, out))
    assert len(after.original.SerializeToString()) < len(before.original.SerializeToString())
