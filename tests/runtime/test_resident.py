"""Pieces whose tensors stay on a device compute what others do; the CPU's own memory stands for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import chain, finished, outputs, weights
from test_segments import MODELS, branches, check_equal, cutter_of, fed, whole

import onnxcop
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.runtime import bound
from onnxcop.runtime.bound import DeviceTensor, device_of, on_host
from onnxcop.runtime.providers import CUDA, OutOfMemory
from onnxcop.runtime.segments import PartialExecutor, Prefixes
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.runtime.states import LiveTensors

CPU = EngineOptions(provider="cpu", threads=1)
ONCE = onnxcop.RecoverySettings(rounds=1)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[onnx.ModelProto]:
    """Tensors stay in memory that sessions own; the list fills with the models of sessions that are made."""
    made: list[onnx.ModelProto] = []
    create = bound._BoundPiece.__init__

    def counted(piece: Any, model: onnx.ModelProto, *rest: Any) -> None:
        made.append(model)
        create(piece, model, *rest)

    monkeypatch.setattr("onnxcop.runtime.segments.device_of", lambda options: "cpu")
    monkeypatch.setattr(bound._BoundPiece, "__init__", counted)
    return made


def test_only_cuda_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of(CPU) is None
    monkeypatch.setattr("onnxcop.runtime.bound.resolve_provider", lambda name: [CUDA, "CPUExecutionProvider"])
    assert device_of(EngineOptions(provider="cuda")) == "cuda"


@pytest.mark.parametrize("name", MODELS)
def test_every_cut_on_a_device(device: list[onnx.ModelProto], name: str) -> None:
    model = MODELS[name]()
    feeds, partition = fed(model), cutter_of(model)
    executor = PartialExecutor(partition, feeds, CPU)
    for cut in range(partition.count + 1):
        executor.advance(cut)
        made = {name for node in partition.model.graph.node[:cut] for name in node.output}
        for place in range(2):
            live = executor.states.live(place)
            assert {name for name, value in live.items() if isinstance(value, DeviceTensor)} == made & live.keys()
        check_equal(executor.finish(), whole(model, feeds))
    assert device


def test_a_session_serves_other_weights(device: list[onnx.ModelProto]) -> None:
    model = branches()
    feeds, working = fed(model), MaskedNetwork.of(onnxcop.analyze(model, options=CPU))
    executor = PartialExecutor(working.partition, feeds, CPU)
    executor.advance(3)
    executor.finish()
    count = len(device)
    working.write("w3", working.read("w3") * 2)
    check_equal(executor.finish(), whole(working.model, feeds))
    assert len(device) == count
    assert {"w3", "b"}.isdisjoint(tensor.name for piece in device for tensor in piece.graph.initializer)


def test_sessions_are_kept_up_to_a_number(device: list[onnx.ModelProto], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "_SESSIONS", 2)
    model = branches()
    feeds, partition = fed(model), cutter_of(model)
    for _ in range(2):
        for cut in (1, 3, 5):
            executor = PartialExecutor(partition, feeds, CPU)
            executor.advance(cut)
            check_equal(executor.finish(), whole(model, feeds))
    (pieces,) = partition.resident.values()
    assert len(pieces._sessions) == 2
    assert len(device) == 12


def test_what_takes_only_stored_weights_keeps_them(device: list[onnx.ModelProto]) -> None:
    """A shape is no weight, and what ONNX Runtime refuses as an input is stored again."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"]),
        helper.make_node("Reshape", ["h", "shape"], ["y"]),
    ]
    stored = [weights("w", (6, 8)), numpy_helper.from_array(np.array([-1, 2, 4]), "shape")]
    shapes = {"x": ["N", 6], "y": ["N", 2, 4]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    model = finished(helper.make_graph(nodes, "reshaped", [x], [y], stored))
    feeds, partition = fed(model), cutter_of(model)
    check_equal(PartialExecutor(partition, feeds, CPU).finish(), whole(model, feeds))
    assert [tensor.name for tensor in device[0].graph.initializer] == ["shape"]


def test_a_refused_piece_is_run_with_stored_weights(
    device: list[onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Session.__init__

    def strict(session: Session, model: onnx.ModelProto, *rest: Any, **more: Any) -> None:
        if any(value.name.startswith("w") for value in model.graph.input):
            raise onnxcop.errors.EngineError("weights must be stored")
        create(session, model, *rest, **more)

    monkeypatch.setattr(Session, "__init__", strict)
    model = branches()
    feeds = fed(model)
    check_equal(PartialExecutor(cutter_of(model), feeds, CPU).finish(), whole(model, feeds))
    assert len(device) == 2


def test_what_does_not_fit_on_the_device_is_on_the_host(device: list[onnx.ModelProto]) -> None:
    model = branches()
    feeds, partition = fed(model, batches=3), cutter_of(model)
    executor = PartialExecutor(partition, feeds, CPU)
    executor.states = LiveTensors(feeds, resident=2 * 3 * 8 * 4)  # two tensors of three samples
    executor.advance(3)
    on_device = [
        isinstance(value, DeviceTensor) for place in range(3) for value in executor.states.live(place).values()
    ]
    assert sum(on_device) == 2
    assert executor.states.nbytes == 3 * 2 * 3 * 8 * 4
    check_equal(executor.finish(), whole(model, feeds))
    copies = LiveTensors.holding(executor.states)
    assert all(isinstance(value, np.ndarray) for place in range(3) for value in copies.live(place).values())
    prefixes = Prefixes(partition, feeds, CPU)
    prefixes.at(3)
    check_equal(prefixes.at(1).finish(), whole(model, feeds))


def test_a_device_tensor_is_copied_when_it_is_read(device: list[onnx.ModelProto]) -> None:
    executor = PartialExecutor(cutter_of(branches()), fed(branches()), CPU)
    executor.advance(1)
    tensor = executor.states.live(0)["stem"]
    assert isinstance(tensor, DeviceTensor)
    assert (tensor.shape, tensor.nbytes) == ((3, 8), 3 * 8 * 4)
    np.testing.assert_array_equal(executor.states[0]["stem"], on_host(tensor))


def test_a_full_device_halves_the_batches(device: list[onnx.ModelProto], monkeypatch: pytest.MonkeyPatch) -> None:
    run, refused = bound._BoundPiece.run_bound, list[int]()

    def limited(piece: Any, feeds: Any, *rest: Any) -> Any:
        most = max(
            (value.shape[0] for value in feeds.values() if len(value.shape) == 4 and value.shape[-1] == 8), default=0
        )
        if most > 4:
            refused.append(most)
            raise OutOfMemory("the model could not be run: out of memory")
        return run(piece, feeds, *rest)

    monkeypatch.setattr(bound._BoundPiece, "run_bound", limited)
    images = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    result = onnxcop.prune(
        chain(), data=images, macs=0.6, batch_size=16, options=CPU, settings=ONCE, latency_seconds=0.0
    )
    assert {16, 8} <= set(refused)
    assert result.report.verification is not None


def test_a_run_on_a_device_removes_the_same(device: list[onnx.ModelProto], monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    options: dict[str, Any] = {"data": images, "macs": 0.6, "options": CPU, "settings": ONCE, "latency_seconds": 0.0}
    there = onnxcop.prune(chain(), **options)
    assert device
    monkeypatch.undo()
    here = onnxcop.prune(chain(), **options)
    assert there.plan.cuts == here.plan.cuts
    np.testing.assert_allclose(outputs(there.model, images), outputs(here.model, images), rtol=1e-3, atol=1e-4)
