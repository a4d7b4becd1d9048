"""Models reduced to some of their classes: their outputs are the original's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_runs import BARE
from onnx import TensorProto, helper
from small_models import chain, finished, weights, written

import onnxcop
from onnxcop.analysis.kept_classes import ClassWish
from onnxcop.cli import main as cli
from onnxcop.errors import OnnxcopError, VerificationError
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.verification.kept_classes import analyze_kept

CPU = EngineOptions(provider="cpu", threads=1)
F = TensorProto.FLOAT


def _run(model: onnx.ModelProto | Path, x: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    with Session(model, CPU) as session:
        return session.run({session.inputs[0].name: x})


def _images(size: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(5).standard_normal((3, 3, size, size)).astype(np.float32)


def _kept(model: onnx.ModelProto | Path, wish: str) -> onnx.ModelProto:
    return analyze_kept(model, ClassWish.of(wish), options=CPU).original


def _classifier(last: str) -> onnx.ModelProto:
    """`chain`, with one more node behind its logits."""
    model = chain(classes=7)
    attributes: dict[str, Any] = {"Sigmoid": {}, "ArgMax": {"axis": 1, "keepdims": 0}}.get(last, {"axis": 1})
    model.graph.node.append(helper.make_node(last, ["y"], ["given"], "last", **attributes))
    del model.graph.output[:]
    kind, shape = (TensorProto.INT64, ["N"]) if last == "ArgMax" else (F, ["N", 7])
    model.graph.output.append(helper.make_tensor_value_info("given", kind, shape))
    return model


def _detector(classes: int = 5) -> onnx.ModelProto:
    """Two scales, each with a layer of boxes and one of classes: `[N, 4 + C, places]`, boxes in pixels."""
    nodes, kinds = [helper.make_node("MaxPool", ["x"], ["x1"], kernel_shape=[2, 2], strides=[2, 2])], []
    for scale, source in enumerate(["x", "x1"]):
        for kind, width in (("box", 4), ("class", classes)):
            name = f"{kind}{scale}"
            kinds.append(weights(name, (width, 3, 3, 3)))
            nodes.append(helper.make_node("Conv", [source, name], [f"{name}c"], name, pads=[1] * 4))
        nodes.append(helper.make_node("Concat", [f"box{scale}c", f"class{scale}c"], [f"both{scale}"], axis=1))
        nodes.append(helper.make_node("Reshape", [f"both{scale}", "flat"], [f"row{scale}"]))
    kinds += [
        onnx.numpy_helper.from_array(np.array([0, 4 + classes, -1], np.int64), "flat"),
        onnx.numpy_helper.from_array(np.array([4, classes], np.int64), "parts"),
        onnx.numpy_helper.from_array(np.array(32.0, np.float32), "stride"),
    ]
    nodes += [
        helper.make_node("Concat", ["row0", "row1"], ["rows"], axis=2),
        helper.make_node("Split", ["rows", "parts"], ["boxes", "logits"], axis=1),
        helper.make_node("Mul", ["boxes", "stride"], ["pixels"]),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
        helper.make_node("Concat", ["pixels", "scores"], ["y"], axis=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "detector", [value("x", F, ["N", 3, 8, 8])], [value("y", F, ["N", 4 + classes, 80])], kinds
    )
    model = finished(graph)
    model.metadata_props.add(key="names", value=repr({number: f"thing {number}" for number in range(classes)}))
    return model


def _anchored(named: bool, classes: int = 6, anchors: int = 3) -> onnx.ModelProto:
    """A layer of anchors times entries, box, whether there is anything, classes: `[1, places, 5 + C]`."""
    entries = 5 + classes
    nodes = [
        helper.make_node("Conv", ["x", "head"], ["c"], "head", pads=[1] * 4),
        helper.make_node("Reshape", ["c", "apart"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 1, 3, 4, 2]),
        helper.make_node("Sigmoid", ["t"], ["s"]),
        helper.make_node("Split", ["s", "parts"], ["box", "rest"], axis=4),
        helper.make_node("Mul", ["box", "stride"], ["pixels"]),
        helper.make_node("Concat", ["pixels", "rest"], ["both"], axis=4),
        helper.make_node("Reshape", ["both", "flat"], ["y"]),
    ]
    numbers = {"apart": [1, anchors, entries, 8, 8], "parts": [4, 1 + classes], "flat": [1, -1, entries]}
    stored = [onnx.numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    stored.append(onnx.numpy_helper.from_array(np.array([8, 8, 32, 32], np.float32), "stride"))
    stored.append(weights("head", (anchors * entries, 3, 3, 3)))
    value = helper.make_tensor_value_info
    output = value("y", F, [1, anchors * 64, entries])
    model = finished(helper.make_graph(nodes, "anchored", [value("x", F, [1, 3, 8, 8])], [output], stored))
    if named:
        model.metadata_props.add(key="names", value=repr([f"thing {number}" for number in range(classes)]))
    return model


def test_a_classifier_gives_out_its_other_numbers_no_more() -> None:
    model, x = chain(), _images()
    found = _kept(model, "4,0,2")
    assert [dim.dim_value for dim in found.graph.output[0].type.tensor_type.shape.dim] == [0, 3]
    np.testing.assert_allclose(_run(found, x)["y"], _run(model, x)["y"][:, [0, 2, 4]], rtol=1e-5, atol=1e-6)


def test_a_vector_that_two_layers_share_is_stored_once_again() -> None:
    model = chain(widths=(8, 8))
    next(node for node in model.graph.node if node.name == "conv2").input[2] = "b1"
    assert [t.name for t in model.graph.initializer if t.name != "b2"] == [
        t.name for t in _kept(model, "4,0,2").graph.initializer if t.name != "b2"
    ]


@pytest.mark.parametrize("last", ["Softmax", "LogSoftmax", "Sigmoid"])
def test_a_softmax_runs_over_what_stays(last: str) -> None:
    model, x = _classifier(last), _images()
    whole = _run(model, x)["given"][:, [1, 5]]
    if last == "Softmax":
        whole = whole / whole.sum(axis=1, keepdims=True)
    elif last == "LogSoftmax":
        whole = whole - np.log(np.exp(whole).sum(axis=1, keepdims=True))
    analysis = analyze_kept(model, ClassWish.of([1, 5]), options=CPU)
    np.testing.assert_allclose(_run(analysis.original, x)["given"], whole, rtol=1e-4, atol=1e-6)
    assert analysis.kept is not None and analysis.kept.renormalized == (last != "Sigmoid")


def test_logarithms_of_probabilities_of_several_samples() -> None:
    """Each sample has its own sum over the classes that stay."""
    model = _classifier("LogSoftmax")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    analysis = analyze_kept(model, ClassWish.of([1, 5]), options=CPU)
    assert analysis.kept is not None and analysis.kept.renormalized
    np.testing.assert_allclose(np.exp(_run(analysis.original, _images())["given"]).sum(axis=1), 1, rtol=1e-5)


def test_a_model_that_returns_zeros_keeps_its_classes() -> None:
    """Its outputs have no scale to compare by."""
    model = chain()
    for tensor in model.graph.initializer:
        if tensor.name in ("w3", "b3", "shift"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(tensor), tensor.name))
    np.testing.assert_array_equal(_run(_kept(model, "1,3"), _images())["y"], np.zeros((3, 2)))


@pytest.mark.parametrize("returned", ["0,1,2,3", "0,1", "0,1,4"])
def test_a_cut_that_returns_other_numbers_is_refused(returned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof does not rely on the cut."""
    wrong = _kept(chain(), returned)
    monkeypatch.setattr("onnxcop.verification.kept_classes.cut_classes", lambda *arguments: wrong)
    with pytest.raises(VerificationError, match="output 'y' of the cut model is not what the original gives"):
        _kept(chain(), "0,1,2")


def test_a_detector_keeps_its_boxes() -> None:
    model, x = _detector(), _images()
    found = _kept(model, "thing 3,1")
    np.testing.assert_allclose(_run(found, x)["y"], _run(model, x)["y"][:, [0, 1, 2, 3, 5, 7]], rtol=1e-4, atol=1e-4)
    named = {entry.key: entry.value for entry in found.metadata_props}["names"]
    assert named == repr({0: "thing 1", 1: "thing 3"})
    widths = {tensor.name: tensor.dims[0] for tensor in found.graph.initializer if len(tensor.dims) == 4}
    assert widths == {"box0": 4, "class0": 2, "box1": 4, "class1": 2}


@pytest.mark.parametrize("named", [True, False])
def test_filters_of_all_anchors_are_removed_together(named: bool) -> None:
    model, x = _anchored(named), _images()[:1]
    found = _kept(model, "thing 0,thing 5" if named else "0,5")
    np.testing.assert_allclose(_run(found, x)["y"], _run(model, x)["y"][..., [0, 1, 2, 3, 4, 5, 10]], rtol=1e-4)
    assert next(tensor for tensor in found.graph.initializer if tensor.name == "head").dims[0] == 3 * (5 + 2)


@pytest.mark.parametrize(
    ("last", "wish", "says"),
    [
        ("ArgMax", "0,1", "'given': ArgMax over this axis (last)"),
        ("Softmax", "3", "keep two classes or more"),
        ("Sigmoid", "0,7", "no class 7; output 'given' has 0 to 6"),
        ("Sigmoid", "0,cat", "no class called 'cat'; its metadata name none"),
        ("Sigmoid", "q:0,1", "no output 'q'; its outputs are given"),
        ("Sigmoid", "0,0", "each named once"),
    ],
)
def test_what_cannot_be_cut_is_said_in_one_line(last: str, wish: str, says: str, tmp_path: Path, capsys: Any) -> None:
    path, target = written(_classifier(last), tmp_path / "m.onnx"), tmp_path / "o.onnx"
    assert cli.run([str(path), "-o", str(target), "--classes", wish, *BARE]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and says in error[0], error
    assert not target.exists()


def test_of_two_heads_one_is_named() -> None:
    model = chain()
    model.graph.node.append(helper.make_node("Gemm", ["f", "w4"], ["z"], "other", transB=1))
    model.graph.initializer.append(weights("w4", (3, 16)))
    model.graph.output.append(helper.make_tensor_value_info("z", F, ["N", 3]))
    with pytest.raises(OnnxcopError, match=r"y \(axis 1, 5\), z \(axis 1, 3\); write --classes OUTPUT:0,2,5"):
        _kept(model, "0,1")
    found, before = _run(_kept(model, "z:0,1"), _images()), _run(model, _images())
    np.testing.assert_allclose(found["y"], before["y"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["z"], before["z"][:, :2], rtol=1e-5, atol=1e-6)


def test_the_result_says_what_was_kept_and_its_plan_replays(tmp_path: Path) -> None:
    path, target, plan = (tmp_path / name for name in ("m.onnx", "o.onnx", "p.json"))
    written(chain(widths=(8, 16)), path)
    command = [str(path), "-o", str(target), "--classes", "1,3", "--criterion", "l2", "--plan-out", str(plan)]
    assert cli.run([*command, "--multiple-of", "1", "-q", *BARE]) == 0
    metadata = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    told = json.loads(metadata["onnxcop.classes"])
    assert (told["output"], told["axis"], told["first"], told["kept"], told["count"]) == ("y", 1, 0, [1, 3], 5)
    assert metadata["onnxcop.original_sha256"] == told["original"] == onnxcop.analyze(path).sha256
    again = onnxcop.apply_plan(path, onnxcop.PruningPlan.load(plan), options=CPU)
    assert again.model.SerializeToString() == onnx.load(target).SerializeToString()
    assert cli.run(["verify", str(path), str(target), "--plan", str(plan), "-q"]) == 0


@pytest.mark.zoo
def test_a_real_detector_with_two_of_its_classes(zoo: Path, tmp_path: Path) -> None:
    source, target = zoo / "trained" / "yolov8n_320.onnx", tmp_path / "o.onnx"
    command = [str(source), "-o", str(target), "--classes", "FACE_FEMALE,FACE_MALE", "--macs", "0.9"]
    assert cli.run([*command, "--criterion", "l2", "-q", *BARE]) == 0
    (value,) = onnx.load(target).graph.output
    assert value.type.tensor_type.shape.dim[1].dim_value == 4 + 2
    metadata = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    assert metadata["names"] == repr({0: "FACE_FEMALE", 1: "FACE_MALE"})
