"""Running a network piece by piece gives what running it whole gives."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import chain, finished, linear, weights

import onnxcop
from onnxcop._base import scratch
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.runtime.segments import GraphPartition, PartialExecutor, Prefixes
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.runtime.states import LiveTensors

CPU = EngineOptions(provider="cpu", threads=1)
Feeds = list[dict[str, np.ndarray[Any, Any]]]
FLOAT = TensorProto.FLOAT


def value(name: str, shape: list[int | str | None], kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), outputs.split(maxsplit=1)[0], **attributes)


def branches() -> onnx.ModelProto:
    """Two branches, a shortcut over both, and an output from the middle."""
    nodes = [
        node("Gemm", "x w1 b", "stem"),
        node("Relu", "stem", "left"),
        node("Gemm", "left w2", "left2"),
        node("Sigmoid", "stem", "right"),
        node("Gemm", "right w3", "right2"),
        node("Add", "left2 right2", "sum"),
        node("Add", "sum stem", "y"),
        node("Tanh", "sum", "middle"),
    ]
    tensors = [weights("w1", (6, 8)), weights("b", (8,)), weights("w2", (8, 8)), weights("w3", (8, 8))]
    outputs = [value("middle", ["N", 8]), value("y", ["N", 8]), value("stem", ["N", 8])]
    return finished(helper.make_graph(nodes, "branches", [value("x", ["N", 6])], outputs, tensors))


def constants() -> onnx.ModelProto:
    """Weights that nodes compute, and sizes that are read from a tensor."""
    nodes = [
        node("Transpose", "w", "wt"),
        node("Mul", "wt scale", "scaled"),
        node("Constant", "", "half", value=numpy_helper.from_array(np.array([0.5], np.float32))),
        node("Shape", "x", "size"),
        node("Gemm", "x scaled", "h"),
        node("Relu", "h", "r"),
        node("Mul", "r half", "s"),
        node("MatMul", "s w", "back"),
        node("Reshape", "back size", "z"),
        node("MatMul", "z scaled", "y"),
    ]
    tensors = [weights("w", (64, 6)), numpy_helper.from_array(np.array([2.0], np.float32), "scale")]
    return finished(helper.make_graph(nodes, "constants", [value("x", ["N", 6])], [value("y", ["N", 64])], tensors))


def two_inputs() -> onnx.ModelProto:
    """The second input enters late, and an output comes early."""
    nodes = [
        node("Gemm", "x w1", "a"),
        node("Relu", "a", "early"),
        node("Gemm", "early w2", "b"),
        node("Cast", "ids", "numbers", to=FLOAT),
        node("Add", "b numbers", "c"),
        node("Mul", "c x", "late"),
    ]
    tensors = [weights("w1", (6, 6)), weights("w2", (6, 6))]
    inputs = [value("x", ["N", 6]), value("ids", ["N", 1], TensorProto.INT64)]
    outputs = [value("early", ["N", 6]), value("late", ["N", 6])]
    return finished(helper.make_graph(nodes, "two_inputs", inputs, outputs, tensors))


def captures() -> onnx.ModelProto:
    """A branch of control flow that reads tensors and weights from outside."""
    yes = helper.make_graph([node("Gemm", "h w2", "then_out")], "yes", [], [value("then_out", ["N", 4])])
    no = helper.make_graph([node("Gemm", "x w3", "else_out")], "no", [], [value("else_out", ["N", 4])])
    nodes = [
        node("Gemm", "x w1", "h"),
        node("ReduceMax", "x", "top", keepdims=0),
        node("Greater", "top zero", "flag"),
        node("If", "flag", "chosen", then_branch=yes, else_branch=no),
        node("Tanh", "chosen", "y"),
    ]
    tensors = [weights("w1", (6, 8)), weights("w2", (8, 4)), weights("w3", (6, 4)),
               numpy_helper.from_array(np.array(0.0, np.float32), "zero")]  # fmt: skip
    return finished(helper.make_graph(nodes, "captures", [value("x", ["N", 6])], [value("y", ["N", 4])], tensors))


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "chain": chain, "linear": linear, "branches": branches, "constants": constants, "two_inputs": two_inputs,
    "captures": captures,
}  # fmt: skip


def fed(model: onnx.ModelProto, batches: int = 2, size: int = 3) -> Feeds:
    rng = np.random.default_rng(1)
    found: Feeds = []
    for batch in range(batches):
        feed = {}
        for entry in model.graph.input:
            shape = [d.dim_value or size for d in entry.type.tensor_type.shape.dim]
            whole = entry.type.tensor_type.elem_type == TensorProto.INT64
            values = rng.integers(0, 9, shape) if whole else rng.standard_normal(shape).astype(np.float32)
            feed[entry.name] = values if whole or batch == 0 else -np.abs(values)
        found.append(feed)
    return found


def whole(model: onnx.ModelProto, feeds: Feeds) -> Feeds:
    with Session(model, CPU) as session:
        return [session.run(feed) for feed in feeds]


def cutter_of(model: onnx.ModelProto) -> GraphPartition:
    return MaskedNetwork.of(onnxcop.analyze(model, options=CPU)).partition


def check_equal(found: Feeds, wanted: Feeds) -> None:
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_cut_alone(name: str) -> None:
    model = MODELS[name]()
    feeds, partition = fed(model), cutter_of(model)
    wanted = whole(model, feeds)
    for cut in range(partition.count + 1):
        executor = PartialExecutor(partition, feeds, CPU)
        executor.advance(cut)
        assert all(set(state) == set(partition.crossing(cut)) for state in executor.states)
        check_equal(executor.finish(), wanted)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_step_by_step(name: str, step: int) -> None:
    model = MODELS[name]()
    feeds, partition = fed(model), cutter_of(model)
    executor = PartialExecutor(partition, feeds, CPU)
    for cut in range(0, partition.count, step):
        executor.advance(cut)
    check_equal(executor.finish(), whole(model, feeds))
    executor.advance(partition.count)
    check_equal(executor.finish(), whole(model, feeds))


def test_digits_piece_by_piece(models_dir: Path) -> None:
    model = onnx.load(models_dir / "digits_resnet.onnx")
    pictures = np.load(models_dir / "digits_test.npz")["input"]
    feeds = [{"input": pictures[:5]}, {"input": pictures[5:8]}]
    partition = cutter_of(model)
    executor = PartialExecutor(partition, feeds, CPU)
    for cut in range(partition.count + 1):
        executor.advance(cut)
        assert len(executor.states[0]) <= 2  # a residual network: the stream and one branch
    check_equal(executor.finish(), whole(model, feeds))


def test_what_crosses_a_cut() -> None:
    partition = cutter_of(branches())
    assert partition.crossing(0) == ["x"]
    assert partition.crossing(1) == ["stem"]
    assert set(partition.crossing(3)) == {"stem", "left2"}
    assert set(partition.crossing(partition.count)) == {"middle", "y", "stem"}
    late = cutter_of(two_inputs())
    assert set(late.crossing(2)) == {"x", "ids", "early"}  # inputs that are read later wait for their turn
    computed = cutter_of(constants())
    assert set(computed.crossing(5)) == {"h", "size"}  # weights that nodes compute are not kept


def test_pieces_hold_only_what_they_need() -> None:
    partition = cutter_of(branches())
    piece = partition.piece(1, 3, ["left2"])
    assert piece is not None
    onnx.checker.check_model(piece)
    assert [n.name for n in piece.graph.node] == ["left", "left2"]
    assert [t.name for t in piece.graph.initializer] == ["w2"]
    assert [v.name for v in piece.graph.input] == ["stem"]
    assert partition.piece(1, 3, ["stem"]) is None
    computed = cutter_of(constants()).piece(9, 10, ["y"])
    assert computed is not None
    assert {n.name for n in computed.graph.node} == {"wt", "scaled", "y"}


def test_streaming_does_not_move() -> None:
    model = branches()
    feeds = fed(model)
    executor = PartialExecutor(cutter_of(model), feeds, CPU)
    executor.advance(1)
    states = executor.states
    seen = list(executor.stream(5, ["right2", "stem"]))
    assert (executor.cut, executor.states) == (1, states)
    model.graph.output.append(value("right2", ["N", 8]))
    for found, wanted in zip(seen, whole(model, feeds), strict=True):
        np.testing.assert_allclose(found["right2"], wanted["right2"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["stem"], wanted["stem"], rtol=1e-5, atol=1e-6)


def test_tensors_made_on_the_way() -> None:
    model = branches()
    feeds = fed(model)
    executor = PartialExecutor(cutter_of(model), feeds, CPU)
    extra = executor.advance(6, ["left", "sum"])
    assert "left" not in executor.states[0]
    assert "sum" in executor.states[0]
    for found, stem in zip(extra, whole(model, feeds), strict=True):
        np.testing.assert_allclose(found["left"], np.maximum(stem["stem"], 0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(np.tanh(found["sum"]), stem["middle"], rtol=1e-5, atol=1e-6)


def test_there_is_no_way_back() -> None:
    model = linear()
    executor = PartialExecutor(cutter_of(model), fed(model), CPU)
    executor.advance(3)
    with pytest.raises(ValueError, match="cannot roll back from 3 to 2"):
        executor.advance(2)


def test_changed_weights_change_later_pieces() -> None:
    model = branches()
    feeds, working = fed(model), MaskedNetwork.of(onnxcop.analyze(model, options=CPU))
    executor = PartialExecutor(working.partition, feeds, CPU)
    executor.advance(3)
    before = executor.finish()
    working.write("w3", working.read("w3") * 2)
    check_equal(executor.finish(), whole(working.model, feeds))
    assert np.abs(before[0]["y"] - executor.finish()[0]["y"]).max() > 0.1


def test_a_variant_continues_from_the_same_cut() -> None:
    model = branches()
    feeds, working = fed(model), MaskedNetwork.of(onnxcop.analyze(model, options=CPU))
    variant = working.copy()
    variant.write("w3", variant.read("w3") * 2)
    executor = PartialExecutor(working.partition, feeds, CPU)
    executor.advance(4)
    check_equal(executor.finish(variant.partition), whole(variant.model, feeds))
    check_equal(executor.finish(), whole(model, feeds))


# What does not fit into memory


def test_live_tensors_beyond_a_limit_are_in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_folders", {})
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((4, 6)).astype(np.float32)} for _ in range(3)]
    held = LiveTensors(feeds, limit=100)
    assert held[1]["x"] is feeds[1]["x"]  # the caller's own arrays are neither copied nor written
    assert list(tmp_path.glob("*/*/*.bin")) == []
    for index, feed in enumerate(feeds):
        held.replace(index, {"a": feed["x"] + 1, "name": np.array(["text"], object)})
    files = set(tmp_path.glob("*/*/*.bin"))
    assert len(files) == 2  # the first of 96 bytes fits
    for index, feed in enumerate(held):
        np.testing.assert_array_equal(feed["a"], feeds[index]["x"] + 1)
        assert feed["a"].dtype == np.float32
        assert feed["name"].tolist() == ["text"]
    assert held.shape_of(2) == {"a": (4, 6), "name": (1,)}
    again = held[2]
    held.replace(2, {"a": again["a"], "b": again["a"] * 2})
    assert files < set(tmp_path.glob("*/*/*.bin"))  # what has not changed is not written again
    np.testing.assert_array_equal(held[-1]["b"], 2 * (feeds[2]["x"] + 1))
    for index in range(3):
        held.replace(index, {})
    assert list(tmp_path.glob("*/*/*.bin")) == []
    assert held[0:2] == [{}, {}]


@pytest.mark.parametrize("model", [branches(), two_inputs(), constants()], ids=lambda model: model.graph.name)
def test_files_change_nothing_that_is_computed(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcop.runtime.states.LARGEST_HELD", 64)
    partition, feeds = cutter_of(model), fed(model)
    executor = PartialExecutor(partition, feeds, CPU)
    for cut in range(partition.count + 1):
        executor.advance(cut)
        check_equal(executor.finish(), whole(model, feeds))


# Batches that move on their own, and cuts that are kept


@pytest.mark.parametrize("name", MODELS)
def test_batches_move_when_they_are_needed(name: str) -> None:
    model = MODELS[name]()
    feeds, partition = fed(model, batches=4), cutter_of(model)
    executor = PartialExecutor(partition, feeds, CPU)
    executor.advance(2, places=[0, 3])
    executor.advance(3, places=[3])
    assert executor.cuts == [2, 0, 0, 3]
    wanted = whole(model, feeds)
    check_equal(list(executor.finishing(places=[3, 1, 0])), [wanted[3], wanted[1], wanted[0]])
    executor.advance(4)
    assert executor.cuts == [4] * 4
    check_equal(executor.finish(), wanted)


def test_feeds_are_taken_over_one_by_one() -> None:
    feeds = [{"x": np.full((100,), float(place))} for place in range(5)]
    held = LiveTensors.holding(iter(feeds), limit=1000)
    for found, feed in zip(held, feeds, strict=True):
        np.testing.assert_array_equal(found["x"], feed["x"])
    assert held.nbytes == 5 * 800
    assert held.shape_of(4) == {"x": (100,)}
    later = LiveTensors(held)
    assert later.shape_of(4) == {"x": (100,)}
    assert later.nbytes == 0  # as they were given
    later.replace(4, {"y": later[4]["x"] + 1})
    np.testing.assert_array_equal(later[4]["y"], feeds[4]["x"] + 1)
    np.testing.assert_array_equal(held[4]["x"], feeds[4]["x"])


@pytest.mark.parametrize("limit", [0, 10_000, 1 << 30])
@pytest.mark.parametrize("name", MODELS)
def test_kept_cuts_change_nothing(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    feeds, working = fed(model), MaskedNetwork.of(onnxcop.analyze(model, options=CPU))
    prefixes, wanted = Prefixes(working.partition, feeds, CPU, limit), whole(model, feeds)
    for cut in (1, 3, 4, 2, 4, 1, working.partition.count):
        check_equal(prefixes.at(cut).finish(), wanted)
    if limit < 1 << 30:
        return
    starts: list[int] = []
    original = GraphPartition.piece

    def piece(self: GraphPartition, start: int, *rest: Any) -> onnx.ModelProto | None:
        starts.append(start)
        return original(self, start, *rest)

    monkeypatch.setattr(GraphPartition, "piece", piece)
    check_equal(prefixes.at(3).finish(), wanted)
    assert set(starts) == {3}  # nothing before it ran again


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_short_lived_sessions_share_their_memory() -> None:
    import resource

    nodes = [helper.make_node("Exp", ["x"], ["e"]), helper.make_node("Add", ["e", "x"], ["s"]),
             helper.make_node("ReduceSum", ["s"], ["y"], keepdims=0)]  # fmt: skip
    graph = helper.make_graph(nodes, "maps", [value("x", [2_000_000])], [value("y", [])])
    model, feed = finished(graph), {"x": np.zeros(2_000_000, np.float32)}
    faults = {}
    for passing in (False, True, True):  # the first that pass make the arena
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            with Session(model, CPU, passing=passing) as session:
                assert session.run(feed)["y"] == 2_000_000
        faults[passing] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults[True] < faults[False] / 4


def test_pieces_of_large_models_map_their_weights(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(models_dir / "digits_resnet.onnx")
    feeds = [{"input": np.load(models_dir / "digits_test.npz")["input"][:4]}]
    monkeypatch.setattr("onnxcop.runtime.segments.LARGEST_COPIED", 1000)
    working = MaskedNetwork.of(onnxcop.analyze(model, options=CPU))
    partition, before = working.partition, model.SerializeToString()
    for cut in (0, 5, partition.count // 2):
        executor = PartialExecutor(partition, feeds, CPU)
        executor.advance(cut)
        check_equal(executor.finish(), whole(model, feeds))
    piece = partition.piece(0, partition.count, partition.outputs)
    light = partition.light()
    assert piece is not None
    for found in (piece, light):
        assert found.ByteSize() < len(before) / 4
        check_equal(whole(found, feeds), whole(model, feeds))
    name = next(layer for layer in working.layers if working.is_open(layer)).kernel
    weight = working.nodes[working.layers[0].node].input[name.input]
    working.write(weight, 2 * working.read(weight))
    changed = PartialExecutor(partition, feeds, CPU).finish()
    check_equal(changed, whole(working.model, feeds))
    assert not np.allclose(changed[0]["logits"], whole(model, feeds)[0]["logits"])
