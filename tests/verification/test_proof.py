"""Every result is proven, or says that it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_runs import BARE
from onnx import TensorProto, helper
from small_models import chain, finished, linear, weights, written

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.errors import EngineError, VerificationError
from onnxcop.graph import constants
from onnxcop.rewrite import apply as rewriter
from onnxcop.verification import masked_model

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def old_file(listed: bool, make: Callable[[], onnx.ModelProto] = chain) -> onnx.ModelProto:
    """A file of IR version 3, whose initializers are inputs as well, or against the rules are not."""
    model = make()
    model.ir_version, model.opset_import[0].version = 3, 11
    if listed:
        model.graph.input.extend(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in model.graph.initializer
        )
    return model


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("recover", ["none", "auto"])
@pytest.mark.parametrize("make", [chain, linear])
def test_files_of_old_ir_versions_are_proven(listed: bool, recover: str, make: Callable[[], onnx.ModelProto]) -> None:
    result = onnxcop.prune(old_file(listed, make), macs=0.7, recover=recover, options=CPU, keep_initializer_inputs=True)
    found = result.report.verification
    assert found is not None
    assert found.max_difference is not None
    assert found.unproven == ""
    assert result.model.ir_version == (3 if listed else 4)
    onnx.checker.check_model(result.model, full_check=True)


def test_a_result_that_was_not_compared_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineError("no such kernel")

    monkeypatch.setattr("onnxcop.verification.verify.difference", fail)
    path = written(chain(), tmp_path / "net.onnx")
    assert cli.run([str(path), "-o", str(tmp_path / "small.onnx"), *BARE]) == 0
    shown = capsys.readouterr()
    assert "warning: the result is not proven: its outputs were not compared with the masked original" in shown.err
    assert "no such kernel" in shown.err
    assert "verified: valid and runs, but not proven" in shown.out


def test_a_result_of_inexact_groups_alone_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], "one"),
        helper.make_node("LayerNormalization", ["m", "scale"], ["n"], axis=-1),
        helper.make_node("MatMul", ["n", "w2"], ["y"], "two"),
    ]
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in (("x", 8), ("y", 4))]
    stored = [weights("w1", (8, 16)), weights("w2", (16, 4)), weights("scale", (16,))]
    path = written(finished(helper.make_graph(nodes, "g", border[:1], border[1:], stored)), tmp_path / "net.onnx")
    assert cli.run([str(path), "-o", str(tmp_path / "small.onnx"), *BARE]) == 0
    shown = capsys.readouterr()
    assert "warning: the result is not proven: all removed units are inexact" in shown.err
    assert "not proven: all removed units are inexact, so there is nothing that it should equal" in shown.out


def test_half_precision_in_brain_floats_keeps_standard_output_clean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    nodes = [
        helper.make_node("Cast", ["w1"], ["w1_single"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w1_single"], ["m1"]),
        helper.make_node("Relu", ["m1"], ["r1"]),
        helper.make_node("MatMul", ["r1", "w2"], ["y"]),
    ]
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in (("x", 8), ("y", 4))]
    values = np.random.default_rng(0).standard_normal(128).astype(np.float32).view(np.uint32) >> 16
    brain = helper.make_tensor("w1", TensorProto.BFLOAT16, (8, 16), values.astype(np.uint16).tobytes(), raw=True)
    model = finished(helper.make_graph(nodes, "g", border[:1], border[1:], [brain, weights("w2", (16, 4))]))
    path = written(model, tmp_path / "net.onnx")
    command = [str(path), "-o", str(tmp_path / "small.onnx"), *BARE]
    assert cli.run([*command, "-q"]) == 0
    assert capsys.readouterr().out == ""
    assert cli.run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output"].endswith("small.onnx")


# The proof is independent of the rewriter


@pytest.mark.parametrize("forgotten", ["w1", "b1", "w2"])
@pytest.mark.parametrize("how", ["whole", "first"])
def test_a_tensor_that_the_rewriter_forgets_fails_the_proof(
    forgotten: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = rewriter.constant_tensors
    plain = rewriter.sliced_constants

    def without(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
        return {name: tensor for name, tensor in original(model).items() if name != forgotten}

    def first(*arguments: Any) -> dict[str, np.ndarray[Any, Any]]:  # so that the result has its shapes, and runs
        found = plain(*arguments)
        whole = onnx.numpy_helper.to_array(original(arguments[0])[forgotten])
        found[forgotten] = whole[tuple(slice(size) for size in found[forgotten].shape)]
        return found

    if how == "whole":  # whoever shares this function misses the tensor too
        for module in (rewriter, constants):
            monkeypatch.setattr(module, "constant_tensors", without)
    else:
        monkeypatch.setattr(rewriter, "sliced_constants", first)
    with pytest.raises(VerificationError):
        onnxcop.prune(chain(), macs=0.3, criterion="l2", recover="none", options=CPU)
    monkeypatch.undo()
    assert onnxcop.prune(chain(), macs=0.3, criterion="l2", recover="none", options=CPU).report.verification


def test_the_mask_finds_tensors_of_bodies_and_constant_nodes() -> None:
    then = helper.make_graph(
        [helper.make_node("Constant", [], ["inner"], value=weights("inner", (2,)))],
        "then",
        [],
        [],
        [weights("w", (3,))],
    )
    other = helper.make_graph([], "else", [], [], [weights("v", (4,))])
    branch = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    made = helper.make_node("Constant", [], ["outer"], value=weights("named otherwise", (1,)))
    filled = helper.make_node("ConstantOfShape", ["size"], ["filled"], value=weights("fill", (1,)))  # stores no tensor
    graph = helper.make_graph([made, filled, branch], "main", [], [], [weights("u", (5,))])
    assert set(masked_model._stored(graph)) == {"inner", "w", "v", "outer", "u"}
