"""The execution engine: providers, sessions, errors and out-of-memory handling."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcop import errors
from onnxcop._base import scratch
from onnxcop.errors import EngineError
from onnxcop.graph import io
from onnxcop.runtime import providers
from onnxcop.runtime import session as engine
from onnxcop.runtime.session import EngineOptions, OutOfMemory, Session, resolve_provider, run_batched

CPU = EngineOptions("cpu", threads=1)


def _model(weight: np.ndarray | None = None) -> onnx.ModelProto:
    """y = x @ w + b, of shape [N, 3] → [N, 4]; b is an input with a default."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 4)).astype(np.float32) if weight is None else weight
    b = np.arange(w.shape[1], dtype=np.float32)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["xw"]),
            helper.make_node("Add", ["xw", "b"], ["y"]),
        ],
        "linear",
        [value("x", TensorProto.FLOAT, ["N", 3]), value("b", TensorProto.FLOAT, [w.shape[1]])],
        [
            value("xw", TensorProto.FLOAT, ["N", w.shape[1]]),
            value("y", TensorProto.FLOAT, ["N", w.shape[1]]),
        ],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _expand_model() -> onnx.ModelProto:
    """Sums x broadcast to a shape, hence asks for as much memory as the shape says."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Expand", ["x", "shape"], ["wide"]),
            helper.make_node("ReduceSum", ["wide"], ["y"], keepdims=0),
        ],
        "expand",
        [value("x", TensorProto.FLOAT, ["N", 1]), value("shape", TensorProto.INT64, [2])],
        [value("y", TensorProto.FLOAT, [])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("form", ["proto", "bytes", "path", "str"])
def test_session_computes_what_numpy_does(form: str, tmp_path: Path) -> None:
    model = _model()
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    source = {
        "proto": model,
        "bytes": model.SerializeToString(),
        "path": path,
        "str": str(path),
    }[form]
    x = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    w, b = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    for optimize in (True, False):
        with Session(source, CPU, optimize=optimize) as session:
            result = session.run({"x": x})
            assert list(result) == ["xw", "y"]
            np.testing.assert_allclose(result["y"], x @ w + b, rtol=1e-5)
            assert list(session.run({"x": x}, ["y"])) == ["y"]


def test_specs_leave_out_initializers_listed_as_inputs() -> None:
    session = Session(_model(), CPU)
    (x,) = session.inputs
    assert (x.name, x.dtype, x.shape) == ("x", np.dtype(np.float32), ("N", 3))
    assert [spec.name for spec in session.outputs] == ["xw", "y"]
    assert session.providers == ("CPUExecutionProvider",)


def test_dtypes_of_specs() -> None:
    kinds = {
        TensorProto.FLOAT16: np.float16,
        TensorProto.DOUBLE: np.float64,
        TensorProto.INT64: np.int64,
        TensorProto.UINT8: np.uint8,
        TensorProto.BOOL: np.bool_,
        TensorProto.STRING: np.object_,
    }
    inputs = [helper.make_tensor_value_info(f"i{kind}", kind, [None, 2]) for kind in kinds]
    outputs = [helper.make_tensor_value_info(f"o{kind}", kind, None) for kind in kinds]
    nodes = [helper.make_node("Identity", [f"i{kind}"], [f"o{kind}"]) for kind in kinds]
    graph = helper.make_graph(nodes, "kinds", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = Session(model, CPU)
    assert [spec.dtype for spec in session.inputs] == [np.dtype(kind) for kind in kinds.values()]
    assert all(spec.shape == (None, 2) for spec in session.inputs)


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, "missing"),
        ({"x": np.zeros((1, 3))}, "double"),
        ({"x": np.zeros((1, 2), np.float32)}, "Got: 2 Expected: 3"),
        ({"x": np.zeros((1, 3), np.float32), "z": np.zeros(1, np.float32)}, "Invalid input name"),
    ],
)
def test_bad_feeds_are_one_line_engine_errors(feeds: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        Session(_model(), CPU).run(feeds)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, OutOfMemory)


def test_bad_models_are_engine_errors(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="protobuf"):
        Session(b"no model", CPU)
    with pytest.raises(EngineError, match=r"absent\.onnx"):
        Session(tmp_path / "absent.onnx", CPU)
    session = Session(_model(), CPU)
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.run({"x": np.zeros((1, 3), np.float32)})
    with pytest.raises(EngineError, match="threads"):
        EngineOptions(threads=0)


def test_large_models_are_passed_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(2).standard_normal((3, 5000)).astype(np.float32)
    model = _model(weight)
    before = model.SerializeToString()
    monkeypatch.setattr(engine, "LARGEST_IN_MEMORY", 1000)
    monkeypatch.setattr(scratch, "_folders", {})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    session = Session(model, CPU)
    (folder,) = tmp_path.glob("onnxcop-*/*/")
    assert (folder / "weights.bin").stat().st_size >= weight.nbytes
    assert (folder / "model.onnx").stat().st_size < 2000
    x = np.eye(3, dtype=np.float32)
    result = session.run({"x": x})["xw"]
    np.testing.assert_allclose(result, weight, rtol=1e-6)
    assert model.SerializeToString() == before
    session.close()
    assert not folder.exists()
    forgotten = Session(model, CPU)
    assert len(list(tmp_path.glob("onnxcop-*/*/"))) == 1
    del forgotten
    assert list(tmp_path.glob("onnxcop-*/*/")) == []


def test_external_file_is_what_onnx_reads(tmp_path: Path) -> None:
    model = _model(np.ones((3, 1000), np.float32))
    model.metadata_props.add(key="author", value="test")
    loaded = onnx.load(io.save_externally(model, tmp_path))
    for tensor in loaded.graph.initializer:
        tensor.ClearField("data_location")
    assert loaded.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    assert io.weight_bytes(model) == 4 * (3000 + 1000)


def test_cpu_by_name_and_full_name() -> None:
    assert resolve_provider("cpu") == ["CPUExecutionProvider"]
    assert resolve_provider("CPUExecutionProvider") == ["CPUExecutionProvider"]


def test_provider_of_another_build_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"'nonesuch' is not in this build.*CPUExecutionProvider"):
        resolve_provider("nonesuch")


def test_provider_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_available", lambda: [providers.CUDA, providers.CPU])
    monkeypatch.setattr(providers, "_probe", lambda name: "no device")
    with pytest.raises(EngineError, match="'cuda' does not start: no device"):
        resolve_provider("cuda")
    with pytest.raises(EngineError, match="'cuda' does not start: no device"):
        Session(_model(), EngineOptions("cuda"))


def test_a_session_that_fell_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class FallenBack:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def get_providers(self) -> list[str]:
            return [providers.CPU]

    monkeypatch.setattr(onnxruntime, "InferenceSession", FallenBack)
    with pytest.raises(EngineError, match="could not start CUDAExecutionProvider"):
        providers.create_session(b"", [providers.CUDA, providers.CPU])


@pytest.mark.parametrize(
    ("available", "problem", "uses_cuda"),
    [
        ([providers.CPU], None, False),
        ([providers.CUDA, providers.CPU], "no device 1", False),
        ([providers.CUDA, providers.CPU], None, True),
    ],
)
def test_auto_takes_the_cpu_in_silence_and_the_debug_log_says_why(
    available: list[str],
    problem: str | None,
    uses_cuda: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(providers, "_available", lambda: available)
    monkeypatch.setattr(providers, "_probe", lambda name: problem)
    with caplog.at_level(logging.DEBUG, "onnxcop"):
        chosen = resolve_provider("auto")
    assert chosen == ([providers.CUDA] if uses_cuda else []) + [providers.CPU]
    assert [record.levelno for record in caplog.records] == [logging.DEBUG] * (problem is not None)
    assert all("running on the CPU: no device 1" in record.message for record in caplog.records)


def test_probing_keeps_the_terminal_clean(capfd: pytest.CaptureFixture[str]) -> None:
    providers._probe.cache_clear()
    assert resolve_provider("auto")[-1] == providers.CPU
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "onnxruntime" not in captured.err


class FakeSession:
    """Doubles its input; holds at most `room` samples, along axis 1."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.tried: list[int] = []

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        self.tried.append(feeds["x"].shape[1])
        if feeds["x"].shape[1] > self.room:
            raise OutOfMemory("out of memory")
        return {"y": feeds["x"] * feeds["k"]}


def test_batches_are_halved_and_the_size_is_kept() -> None:
    feeds = [{"x": np.arange(24).reshape(2, 12) + 100 * place, "k": np.array(2)} for place in range(2)]
    session = FakeSession(room=4)
    results = list(run_batched(session, feeds, {"x": 1, "k": None}))
    assert session.tried == [12, 6, 3, 3, 3, 3, 3, 3, 3, 3]
    assert all(fed["x"].flags.c_contiguous for fed, _ in results)
    fed = np.concatenate([feed["x"] for feed, _ in results], axis=1)
    came = np.concatenate([result["y"] for _, result in results], axis=1)
    np.testing.assert_array_equal(fed, np.concatenate([feed["x"] for feed in feeds], axis=1))
    np.testing.assert_array_equal(came, 2 * fed)


def test_a_single_sample_that_does_not_fit_is_an_error() -> None:
    session = FakeSession(room=0)
    feed = {"x": np.ones((2, 4)), "k": np.array(2)}
    with pytest.raises(OutOfMemory, match="single sample"):
        list(run_batched(session, [feed], {"x": 1, "k": None}))
    assert session.tried == [4, 2, 1]


def test_what_fits_is_left_whole() -> None:
    session = FakeSession(room=8)
    feed = {"x": np.ones((2, 4)), "k": np.array(2)}
    ((fed, result),) = run_batched(session, [feed], {"x": 1, "k": None})
    assert fed["x"] is feed["x"]
    assert result["y"].shape == (2, 4)


def test_real_out_of_memory_is_recognized() -> None:
    session = Session(_expand_model(), CPU)
    x = np.ones((2, 1), np.float32)
    assert session.run({"x": x, "shape": np.array([2, 8])})["y"] == 16
    with pytest.raises(OutOfMemory, match="buffer"):
        session.run({"x": x, "shape": np.array([2, 2**60])})


def test_errors_form_one_family() -> None:
    family = (
        errors.ModelError,
        errors.CalibrationError,
        errors.EngineError,
        errors.BudgetError,
        errors.PlanMismatchError,
        errors.VerificationError,
    )
    assert all(issubclass(kind, errors.OnnxcopError) for kind in family)
    assert not issubclass(errors.InternalError, errors.OnnxcopError)
    assert errors.BudgetError("too much", 0.4).nearest == 0.4
    assert errors.BudgetError("too much").nearest is None


@pytest.mark.gpu
def test_cuda_is_found_and_agrees_with_the_cpu() -> None:
    assert resolve_provider("auto") == [providers.CUDA, providers.CPU]
    model = _model()
    x = np.random.default_rng(3).standard_normal((64, 3)).astype(np.float32)
    on_device = Session(model, EngineOptions("cuda"))
    assert on_device.providers[0] == providers.CUDA
    expected = Session(model, CPU).run({"x": x})["y"]
    np.testing.assert_allclose(on_device.run({"x": x})["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_out_of_device_memory_is_recognized() -> None:
    session = Session(_expand_model(), EngineOptions("cuda"))
    with pytest.raises(OutOfMemory):
        session.run({"x": np.ones((2, 1), np.float32), "shape": np.array([2, 2**50])})
    result = session.run({"x": np.ones((2, 1), np.float32), "shape": np.array([2, 8])})
    assert result["y"] == 16
