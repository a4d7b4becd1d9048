"""Printed figures are measured on the written file, on samples that no choice has used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from executors import AnyOrder, Homes
from onnx import TensorProto, helper
from small_models import chain, finished, weights, written

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.data.open import open_data
from onnxcop.data.options import DataOptions
from onnxcop.errors import CalibrationError, InternalError
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.pipeline import prune as pruning
from onnxcop.pipeline import unseen as unseen_module
from onnxcop.pipeline.decide import Decision, Request
from onnxcop.pipeline.unseen import CrossFitted, UnseenSamples, set_aside
from onnxcop.reconstruction.masks import UnitMasks
from onnxcop.recovery.rounds import RecoverySettings

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
QUICK: dict[str, Any] = {
    "options": CPU, "settings": RecoverySettings(rounds=1, refine=0, curve_passes=1, sharper_passes=0),
}  # fmt: skip
Array = np.ndarray[Any, Any]


def pictures(count: int) -> Array:
    return np.random.default_rng(7).standard_normal((count, 3, 8, 8)).astype(np.float32)


def encoder(width: int = 32) -> onnx.ModelProto:
    """Random weights that give vectors of length one, `[N, width]`."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "one"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["e"], "two"),
        helper.make_node("LpNormalization", ["e"], ["embedding"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes, "encoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", width])],
        [weights("w1", (16, 64)), weights("w2", (64, width))],
    )  # fmt: skip
    return finished(graph)


def attention() -> onnx.ModelProto:
    """One head over six tokens of 32 numbers, with queries that are sure of their keys."""
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"], "q"),
        helper.make_node("MatMul", ["x", "wk"], ["k"], "k"),
        helper.make_node("MatMul", ["x", "wv"], ["v"], "v"),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["attended"], "attended"),
        helper.make_node("MatMul", ["attended", "wo"], ["y"], "out"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 6, 32]) for name in "xy"]
    stored = [weights(name, (32, 32)) for name in ("wq", "wk", "wv", "wo")]
    return finished(helper.make_graph(nodes, "attention", values[:1], values[1:], stored))


def test_an_encoder_is_recognized_by_its_vectors(caplog: pytest.LogCaptureFixture) -> None:
    """Cut to a fifth, random vectors point elsewhere; as classes they would hardly differ."""
    x = np.random.default_rng(2).standard_normal((300, 16)).astype(np.float32)
    result = onnxcop.prune(encoder(), macs=0.2, data=x, **QUICK)
    assert result.report.figures is not None
    (found,) = result.report.figures.outputs
    assert found.kind == "vectors"
    assert found.described == ("output embedding: vectors, compared by cosine and relative error (all of length one)")
    assert found.agreement is not None
    assert found.agreement.value < 0.95
    assert found.agreement.value == pytest.approx(1 - found.divergence.value**2 / 2, abs=1e-5)
    assert found.warning in caplog.messages
    assert found.warning in result.report.warnings
    assert "mean cosine" in str(result)


def test_figures_are_those_of_the_saved_file(tmp_path: Path) -> None:
    """Worked out again with nothing but ONNX Runtime and numpy."""
    import onnxruntime

    x, options = pictures(400), DataOptions(data=pictures(400), samples=150)
    result = onnxcop.prune(chain(), macs=0.6, data=x, samples=150, task="regress", **QUICK)
    result.save(tmp_path / "out.onnx")
    source = open_data(onnxcop.analyze(chain(), options=CPU), options)
    assert source is not None
    calibration, unseen = set_aside(source, 0)
    assert unseen is not None
    seen = {sample.tobytes() for batch in calibration.batches() for sample in batch["x"]}
    held = np.concatenate([batch["x"] for batch in unseen.batches()])
    assert len(seen) == 150
    assert not seen & {sample.tobytes() for sample in held}
    one, two = (
        onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": held})[0]
        for model in (chain().SerializeToString(), str(tmp_path / "out.onnx"))
    )
    assert result.report.figures is not None
    found = result.report.figures.divergence
    assert found.value == pytest.approx(np.linalg.norm(two - one) / np.linalg.norm(one), rel=1e-4)
    assert found.samples == len(held) == 250
    assert result.report.quality["divergence"] == found.value
    assert found.low is not None and found.high is not None
    assert found.low < found.value < found.high
    assert result.report.held_out["divergence"] != found.value


def test_the_interval_holds_the_figure_of_other_samples() -> None:
    """Of most of many draws of samples to report on."""
    model = onnxcop.prune(chain(), macs=0.6, criterion="l2", recover="none", options=CPU).model
    analysis = onnxcop.analyze(chain(), options=CPU)

    def figure(x: Array) -> tuple[float | None, float, float | None]:
        source = open_data(analysis, DataOptions(data=x, samples=len(x), batch_size=500))
        assert source is not None
        figures = UnseenSamples(chain(), source, CPU).figures(model)
        assert figures is not None
        return figures.divergence.low, figures.divergence.value, figures.divergence.high

    rng = np.random.default_rng(5)

    def draw(count: int) -> Array:
        return (rng.standard_normal((count, 3, 8, 8)) * rng.lognormal(0, 0.4, (count, 1, 1, 1))).astype(np.float32)

    _, truth, _ = figure(draw(20_000))
    found = [figure(draw(64)) for _ in range(60)]
    held = [low is not None and high is not None and low <= truth <= high for low, _, high in found]
    assert np.mean(held) > 0.85
    assert np.mean([value < truth for _, value, _ in found]) == pytest.approx(0.5, abs=0.25)


@pytest.mark.parametrize(
    ("count", "samples", "parts"),
    [
        (2000, 512, (512, 256)),  # there are others
        (600, 512, (512, 88)),
        (520, 512, (448, 64)),  # too few others: some of those asked for
        (2048, 2048, (1792, 256)),
        (300, 300, (236, 64)),
        (100, 100, (75, 25)),
        (17, 17, (13, 4)),
        (15, 15, (15, None)),  # all are needed
    ],
)
def test_how_many_are_set_aside(count: int, samples: int, parts: tuple[int, int | None]) -> None:
    source = open_data(onnxcop.analyze(chain(), options=CPU), DataOptions(data=pictures(count), samples=samples))
    assert source is not None
    rest, held = set_aside(source, 0)
    assert (rest.count, None if held is None else held.count) == parts


def test_a_stream_has_others_too() -> None:
    def stream() -> Any:
        return ({"x": picture[None]} for picture in pictures(200))

    source = open_data(onnxcop.analyze(chain(), options=CPU), DataOptions(data=stream(), samples=100))
    assert source is not None
    rest, held = set_aside(source, 0)
    assert held is not None
    assert (rest.count, held.count) == (100, 100)


def test_if_no_sample_can_be_set_aside_the_report_says_so() -> None:
    few = onnxcop.prune(chain(), macs=0.8, data=pictures(10), **QUICK).report
    assert few.measured_on.startswith("10 samples that choices were made on too")
    many = onnxcop.prune(chain(), macs=0.8, data=pictures(100), cross_fit=False, **QUICK).report
    assert many.measured_on == "25 samples that no choice has seen"
    without = onnxcop.prune(chain(), macs=0.8, criterion="l2", recover="none", options=CPU)
    assert without.report.figures is None
    assert "not measured: how far the outputs are from the original's (no data was given)" in str(without)


def test_the_command_shows_and_takes_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = written(chain(), tmp_path / "m.onnx"), tmp_path / "x.npz"
    np.savez(data, x=pictures(100))
    command = [str(model), "-o", str(tmp_path / "o.onnx"), "--data", str(data), "--macs", "0.7", "--provider", "cpu",
               "--criterion", "l2", "--recover", "none", "--latency-seconds", "0", "--no-cross-fit"]  # fmt: skip
    assert cli.run([*command, "--task", "classify", "--report", str(tmp_path / "r.json")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "measured on 25 samples that no choice has seen, running both files" in shown
    assert (
        "output y: class scores, compared by Kullback–Leibler divergence and top-1 agreement (--task classify)" in shown
    )
    assert "95 % interval" in shown
    assert "n = 25" in shown
    summary = json.loads((tmp_path / "r.json").read_text())["summary"]
    (output,) = summary["figures"]["outputs"]
    assert output["kind"] == "classes"
    assert output["agreement"]["samples"] == 25
    assert output["agreement"]["low"] <= output["agreement"]["value"] <= output["agreement"]["high"]
    assert cli.run([*command, "--task", "sequence"]) == 1
    assert "--task sequence: no output has the form of that" in capsys.readouterr().err
    assert cli.run(["compare", str(model), str(tmp_path / "o.onnx"), "--data", str(data), "--task", "classify"]) == 0
    assert "(--task classify)" in " ".join(capsys.readouterr().out.split())


def test_outputs_that_hold_no_real_numbers_are_not_measured() -> None:
    model = chain()
    model.graph.node.append(helper.make_node("ArgMax", ["y"], ["class"], axis=1, keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("class", TensorProto.INT64, ["N"]))
    del model.graph.output[0]
    report = onnxcop.prune(model, macs=0.8, data=pictures(60), criterion="l2", recover="none", options=CPU).report
    assert report.figures is None
    assert report.measured_on  # there were data


@pytest.mark.parametrize("options", [{}, {"criterion": "l2"}])
def test_an_inconsistent_network_is_detected(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that let queries and keys pass: choices were made on a network that is not the one that is written."""
    tokens = np.random.default_rng(1).standard_normal((80, 6, 32)).astype(np.float32)
    asked: dict[str, Any] = {**QUICK, "data": tokens, "limits": onnxcop.Limits(only=("*q*",)), "filters": 0.4}
    assert onnxcop.prune(attention(), **asked, **options).report.after.macs > 0
    monkeypatch.setattr(UnitMasks, "of", lambda *_: {})
    with pytest.raises(InternalError, match=r"the search expected .*, because of .*q.*; nothing was written"):
        onnxcop.prune(attention(), **asked, **options)


def biased(by: float) -> onnx.ModelProto:
    """Adds a number to each of three numbers."""
    node = helper.make_node("Add", ["x", "b"], ["y"])
    graph = helper.make_graph(
        [node], "biased",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [onnx.numpy_helper.from_array(np.full(3, by, np.float32), "b")],
    )  # fmt: skip
    return finished(graph)


def opened(model: onnx.ModelProto, data: Array, batch_size: int = 16) -> UnseenSamples:
    options = DataOptions(data=data, samples=len(data), batch_size=batch_size)
    source = open_data(onnxcop.analyze(model, options=CPU), options)
    assert source is not None
    return UnseenSamples(model, source, CPU)


@pytest.mark.parametrize("kept", [None, 100])
def test_workers_run_both_files_on_the_batches(kept: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all samples, and of those whose outputs fit in memory."""
    if kept is not None:
        monkeypatch.setattr(unseen_module, "_KEPT", kept)
    data = np.arange(90, dtype=np.float32).reshape(30, 3)

    def measured(crew: Crew) -> tuple[object, str]:
        unseen = opened(biased(0.0), data, batch_size=4)
        unseen = replace(unseen, crew=crew)
        return unseen.figures(biased(0.5)), unseen.described

    expected = measured(HERE)
    assert expected[1].startswith("30" if kept is None else "12")  # of 48 bytes a batch
    with Homes(2) as homes, AnyOrder() as shuffled:
        assert measured(Crew(homes)) == measured(Crew(shuffled)) == expected
    assert kept is not None or sum(homes.tasks_of) == 16


def test_each_half_is_measured_with_the_model_of_the_other_half() -> None:
    model = biased(0.0)
    ones, threes = opened(model, np.ones((10, 3), np.float32)), opened(model, np.full((30, 3), 3, np.float32))
    made = {ones.data: biased(0.3), threes.data: biased(0.5)}
    cross = CrossFitted((ones, threes), made.__getitem__)
    figures = cross.figures(biased(100.0))
    assert figures is not None
    error = (10 * 0.5**2 + 30 * 0.3**2) / (10 * 1**2 + 30 * 3**2)  # ones by the model of threes, and the other way
    assert figures.divergence.value == pytest.approx(error**0.5, rel=1e-5)
    assert figures.divergence.samples == 40
    assert cross.described.startswith("40 samples, each half by a model")


def test_with_few_samples_all_are_used_and_no_choice_sees_those_it_is_measured_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, halves = list[tuple[set[int], float | None]](), list[CrossFitted]()
    decided = pruning.decide

    def spied(request: Request, *, again: bool = False) -> Decision:
        assert request.source is not None
        asked.append(({*request.source.numbers.tolist()}, request.budget.bounds.get("macs")))
        return decided(request, again=again)

    def kept(*arguments: Any) -> CrossFitted:
        halves.append(CrossFitted(*arguments))
        return halves[-1]

    monkeypatch.setattr(pruning, "decide", spied)
    monkeypatch.setattr(pruning, "CrossFitted", kept)
    result = onnxcop.prune(chain(), macs=0.8, data=pictures(50), **QUICK)
    assert result.plan.settings["samples"] == 50
    assert result.report.measured_on.startswith("50 samples")
    assert "cross-fitting" in result.report.seconds
    (cross,) = halves
    first, second = ({*half.data.numbers.tolist()} for half in cross.halves)
    assert first | second == set(range(50)) and not first & second and len(first) == 25
    assert [samples for samples, _ in asked] == [second, first]  # what the first half is measured with, then the other
    share = result.report.after.macs / result.report.before.macs
    assert all(bound == pytest.approx(share, abs=1e-6) for _, bound in asked)


def test_if_a_half_does_not_suffice_the_result_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(request: Request, *, again: bool = False) -> Decision:
        raise CalibrationError("too few texts")

    monkeypatch.setattr(pruning, "decide", fails)
    report = onnxcop.prune(chain(), macs=0.8, data=pictures(50), **QUICK).report
    assert report.figures is not None
    assert report.measured_on.startswith("50 samples that choices were made on too")
    assert "half of the samples are too few to repeat the run: too few texts" in caplog.text


def test_with_few_samples_figures_are_not_optimistic() -> None:
    unseen = opened(chain(), np.random.default_rng(99).standard_normal((3000, 3, 8, 8)).astype(np.float32))
    shown, true, chosen_on = [], [], []
    for seed in range(3):
        data = np.random.default_rng(seed).standard_normal((40, 3, 8, 8)).astype(np.float32)
        result = onnxcop.prune(chain(), macs=0.6, data=data, seed=seed, options=CPU)
        figures, truth = result.report.figures, unseen.figures(result.model)
        assert figures is not None and truth is not None
        shown.append(figures.divergence.value)
        true.append(truth.divergence.value)
        chosen_on.append(result.report.held_out["divergence"])
    assert np.mean(true) < np.mean(shown) < 2 * np.mean(true)
    assert np.mean(chosen_on) < np.mean(shown)


@pytest.mark.parametrize(
    ("count", "samples", "crosses"),
    [
        (15, 15, False),
        (16, 16, True),
        (255, 255, True),
        (256, 256, False),
        (300, 100, False),
        (130, 100, False),
        (110, 100, True),
    ],
)
def test_when_figures_are_cross_fitted(count: int, samples: int, crosses: bool) -> None:
    request = pruning.prepare(chain(), onnxcop.PruneOptions(data=pictures(count), samples=samples, options=CPU))
    assert request.cross_fit == crosses == (request.unseen is None)


def test_what_cannot_be_cross_fitted_says_so() -> None:
    with pytest.raises(CalibrationError, match="--cross-fit halves calibration data; give --data"):
        onnxcop.prune(chain(), cross_fit=True, options=CPU)
    with pytest.raises(CalibrationError, match="--cross-fit does not go with --distill"):
        onnxcop.prune(chain(), cross_fit=True, distill="1 epoch", data=pictures(40), options=CPU)
    with pytest.raises(CalibrationError, match="two halves of at least 8 samples and a batch; there are 10"):
        onnxcop.prune(chain(), cross_fit=True, data=pictures(10), options=CPU)
    alone = pruning.prepare(chain(), onnxcop.PruneOptions(data=pictures(40), then_quantize="static", options=CPU))
    assert not alone.cross_fit and alone.unseen is not None
