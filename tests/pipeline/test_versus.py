"""Two models side by side: costs, outputs, latency, and what cannot be compared."""

from __future__ import annotations

import json
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from executors import AnyOrder, Homes
from onnx import helper
from small_models import chain, finished, outputs, written

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.pipeline.compare import Comparison, compare
from onnxcop.reconstruction.divergence import OutputFigures
from onnxcop.verification import agreement
from onnxcop.verification.agreement import Agreement, paired

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
QUICK: dict[str, Any] = {"options": CPU, "latency_seconds": 0.0}


def samples(count: int = 20) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((count, 3, 8, 8)).astype(np.float32)


def figures_of(found: Agreement | None) -> tuple[OutputFigures, ...]:
    assert found is not None
    assert found.figures is not None
    return found.figures.outputs


def smaller() -> onnx.ModelProto:
    return onnxcop.prune(chain(), macs=0.6, criterion="l2", recover="none", options=CPU).model


def renamed(model: onnx.ModelProto, old: str, new: str) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in (*copy.graph.input, *copy.graph.output):
        value.name = new if value.name == old else value.name
    return copy


def test_a_model_agrees_with_itself() -> None:
    found = compare(chain(), chain(), data=samples(), task="classify", **QUICK)
    assert found.agreement is not None
    (gap,) = found.agreement.outputs
    assert (gap.name, gap.error, gap.worst) == ("y", 0.0, 0.0)
    (figures,) = figures_of(found.agreement)
    assert (figures.kind, figures.divergence.value, found.agreement.samples) == ("classes", 0.0, 20)
    assert figures.agreement is not None
    assert figures.agreement.value == figures.agreement.high == 1.0
    assert 0.8 < figures.agreement.low < 0.9  # 20 samples prove no more
    assert found.notes == ()
    assert found.a.cost == found.b.cost


def in_half_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return onnx.shape_inference.infer_shapes(copy)


def test_a_model_and_its_half_precision_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, half = chain(), in_half_precision(chain())
    for a, b, types in ((model, half, "float32 in A and float16 in B"), (half, model, "float16 in A and float32 in B")):
        found = compare(a, b, data=samples(), **QUICK)
        assert found.agreement is not None
        (gap,) = found.agreement.outputs
        assert gap.error is not None
        assert 1e-5 < gap.error < 1e-2
        (note,) = found.notes
        assert types in note
    paths = [written(model, tmp_path / "a.onnx"), written(half, tmp_path / "b.onnx")]
    assert cli.run(["compare", *map(str, paths), "--provider", "cpu", "--latency-seconds", "0.02"]) == 0
    assert "both are given the same numbers, rounded" in " ".join(capsys.readouterr().out.split())


def test_errors_are_those_of_the_outputs() -> None:
    a, b, x = chain(), smaller(), samples()
    found = compare(a, b, data=x, batch_size=7, task="classify", **QUICK).agreement
    assert found is not None
    one, two = outputs(a, x).astype(np.float64), outputs(b, x).astype(np.float64)
    (gap,) = found.outputs
    assert gap.error == pytest.approx(np.linalg.norm(two - one) / np.linalg.norm(one), rel=1e-4)
    assert gap.worst == pytest.approx(np.abs(two - one).max() / np.abs(one).max(), rel=1e-4)
    (figures,) = figures_of(found)
    assert figures.agreement is not None
    assert figures.agreement.value == pytest.approx((one.argmax(axis=1) == two.argmax(axis=1)).mean())
    logs = [value - np.log(np.exp(value).sum(axis=1, keepdims=True)) for value in (one, two)]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).mean()
    assert figures.divergence.value == pytest.approx(kl, rel=1e-4)


def test_costs_are_listed_by_operator() -> None:
    found = compare(chain(), smaller(), **QUICK)
    for side in (found.a, found.b):
        assert sum(cost.macs for cost in side.operators.values()) == pytest.approx(side.cost.macs)
        assert side.operators["Conv"].nodes == 2
    assert found.a.operators["Conv"].macs == 64 * 9 * (3 * 8 + 8 * 16)
    assert found.a.filters == 8 + 16 + 5
    assert found.b.filters < found.a.filters
    assert found.b.cost.macs <= 0.6 * found.a.cost.macs


def test_names_may_differ() -> None:
    found = compare(chain(), renamed(renamed(chain(), "y", "scores"), "x", "picture"), data=samples(), **QUICK)
    assert found.agreement is not None
    assert found.agreement.outputs[0].error == 0.0
    assert found.notes == ("output 'y' of A is compared with 'scores' of B",)
    assert paired(["a", "b", "c"], ["c", "x", "a"]) == {"a": "a", "b": "x", "c": "c"}
    assert paired(["a", "b"], ["a"]) == {"a": "a"}


def test_other_inputs_are_said_and_costs_shown() -> None:
    wide = chain()
    wide.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 16
    found = compare(chain(), wide, data=samples(), options=CPU, latency_seconds=0.01)
    assert found.agreement is None
    (note,) = found.notes
    assert "inputs differ" in note
    assert "[N, 3, 8, 8]" in note
    assert "[N, 3, 16, 8]" in note
    assert found.b.cost.macs > found.a.cost.macs
    assert found.latency is not None


def with_class(shift: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """The chain, its scores shifted, with the number of the top class as another output."""
    model = chain()
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "shift")
    tensor.CopyFrom(onnx.numpy_helper.from_array(shift.astype(np.float32), "shift"))
    model.graph.node.append(helper.make_node("ArgMax", ["y"], ["class"], axis=1, keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("class", onnx.TensorProto.INT64, ["N"]))
    return model


def test_whole_numbers_are_compared_for_equality_and_lone_outputs_named() -> None:
    x = samples()
    old = next(tensor for tensor in chain().graph.initializer if tensor.name == "shift")
    scores = outputs(chain(), x) - onnx.numpy_helper.to_array(old)
    shift = -scores.mean(axis=0)  # so that every class is the top one now and then
    share = ((scores + shift).argmax(axis=1) == 2).mean()
    assert 0 < share < 1
    found = compare(with_class(shift), with_class(99 * np.eye(5)[2]), data=x, task="classify", **QUICK).agreement
    assert found is not None
    assert {gap.name: gap.equal for gap in found.outputs} == {"y": None, "class": pytest.approx(share)}
    (figures,) = figures_of(found)
    assert figures.agreement is not None
    assert figures.agreement.value == pytest.approx(share)
    assert compare(with_class(shift), chain(), data=x, **QUICK).notes == ("output 'class' is in A alone",)


def constant(value: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """A model whose output is its input times a number for each column."""
    node = helper.make_node("Mul", ["x", "value"], ["y"])
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 2]) for name in "xy")
    return finished(helper.make_graph([node], "g", [x], [y], [onnx.numpy_helper.from_array(value, "value")]))


def test_outputs_of_zeros_and_without_numbers_have_a_distance_too() -> None:
    """Where nothing can be divided by, the difference itself is given."""
    zero, one, open_ = (np.array(values, np.float32) for values in ([0, 0], [3, 4], [np.inf, 1]))
    x = np.ones((6, 2), np.float32)
    (gap,) = agreement_of(constant(zero), constant(one), x).outputs
    assert (gap.error, gap.worst) == (pytest.approx(np.sqrt(6 * 25)), 4.0)
    (gap,) = agreement_of(constant(open_), constant(one), x).outputs  # of the numbers that are finite in the first
    assert (gap.error, gap.worst) == (pytest.approx(3.0), 3.0)
    (gap,) = agreement_of(constant(one), constant(open_), x).outputs
    assert (gap.error, gap.worst) == (None, None)


def agreement_of(a: onnx.ModelProto, b: onnx.ModelProto, x: np.ndarray[Any, Any]) -> Agreement:
    found = compare(a, b, data=x, batch_size=2, **QUICK).agreement
    assert found is not None
    return found


def test_outputs_beyond_what_memory_holds_are_summed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, x = chain(), smaller(), samples()
    whole = agreement_of(a, b, x)
    monkeypatch.setattr("onnxcop.verification.agreement._KEPT", 3 * 2 * 5 * 4)  # three batches of float32 [2, 5]
    found = agreement_of(a, b, x)
    assert found.outputs == whole.outputs
    assert found.samples == whole.samples == 20
    assert whole.figures is not None and whole.figures.divergence.samples == 20
    assert found.figures is not None and found.figures.divergence.samples == 6
    monkeypatch.setattr("onnxcop.verification.agreement._KEPT", 0)
    found = agreement_of(a, b, x)
    assert found.figures is not None and found.figures.divergence.samples == 2  # one batch at least


def test_workers_compare_to_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """On all batches, and with outputs of the first alone because those of more do not fit in memory."""
    cut, images = smaller(), samples(23)

    def found(executor: Executor | None) -> Comparison:
        return compare(chain(), cut, data=images, batch_size=4, executor=executor, **QUICK)

    for room in (agreement._KEPT, 1):
        monkeypatch.setattr(agreement, "_KEPT", room)
        expected = found(None)
        assert expected.agreement is not None and expected.agreement.samples == 23
        with AnyOrder() as shuffled, Homes(3) as homes:
            assert found(shuffled) == found(homes) == expected
        assert sorted(homes.tasks_of) == [2, 2, 2] and len(shuffled.order) == 6


def test_other_shapes_of_outputs_are_said() -> None:
    found = compare(chain(), chain(classes=4), data=samples(), **QUICK).agreement
    assert found is not None
    (gap,) = found.outputs
    assert gap.error is None
    assert gap.note == "[20, 5] beside [20, 4]"
    assert found.figures is None


def test_a_model_without_data_is_compared_on_made_up_inputs() -> None:
    found = compare(chain(), smaller(), **QUICK)
    assert found.agreement is not None
    assert found.agreement.samples == 32
    assert "--data" in found.data


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = written(chain(), tmp_path / "a.onnx"), written(smaller(), tmp_path / "b.onnx")
    data = tmp_path / "x.npz"
    np.savez(data, x=samples())
    command = ["compare", str(a), str(b), "--data", str(data), "--provider", "cpu", "--threads", "1"]
    assert cli.run([*command, "--latency-seconds", "0.02"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for text in ("MACs", "latency", "Conv", "relative error", "output y: numbers", "divergence", "20 of 20 samples"):
        assert text in shown.out
    assert cli.run([*command, "--latency-seconds", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["latency"] is None
    assert found["a"]["model"] == str(a)
    assert found["agreement"]["samples"] == 20
    assert cli.run([*command, "--latency-seconds", "0", "--json", "--workers", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = written(finished(chain().graph), tmp_path / "a.onnx")
    assert cli.run(["compare", str(a), str(tmp_path / "none.onnx")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not exist" in line


@pytest.mark.parametrize(("room", "batches"), [(2, 2), (1.99, 1), (0, 1)])
def test_outputs_are_judged_together_as_far_as_they_fit_in_memory(
    room: float, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch always is."""
    one = {"y": np.eye(4, dtype=np.float32)}
    monkeypatch.setattr(agreement, "_KEPT", int(room * one["y"].nbytes))
    kept = agreement.KeptOutputs()
    for _ in range(3):
        kept.add(agreement.ComparedBatch.of(4, one, one))
    assert kept.counts == [4] * batches
    figures = kept.figures(chain(), "classify")
    assert figures is not None
    assert figures.outputs[0].agreement is not None


def test_one_byte_more_than_fits_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"y": np.zeros((2, 3), np.int8)}
    monkeypatch.setattr(agreement, "_KEPT", 11)
    kept = agreement.KeptOutputs()
    kept.add(agreement.ComparedBatch.of(2, one, one))
    kept.add(agreement.ComparedBatch.of(2, one, one))
    assert kept.counts == [2]


def test_outputs_without_a_shape_are_not_judged_together() -> None:
    """Lists of tensors, as an operator of sequences gives them."""
    kept = agreement.KeptOutputs()
    batch: Any = {"y": [np.zeros(3), np.zeros(4)]}
    kept.add(agreement.ComparedBatch.of(2, batch, batch))
    assert not kept.counts
    assert kept.figures(chain(), None) is None
