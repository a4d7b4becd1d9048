"""Pruning with recovery, from calibration data to a smaller network that still works."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from small_models import chain
from threadpoolctl import threadpool_info, threadpool_limits

import onnxcop
from onnxcop.allocation.budget import Budget, default_rounds, round_budgets
from onnxcop.allocation.search import Alternative
from onnxcop.data.open import open_data
from onnxcop.data.options import DataOptions
from onnxcop.errors import BudgetError, CalibrationError
from onnxcop.pipeline.unseen import set_aside
from onnxcop.reconstruction import obs as surgeon
from onnxcop.reconstruction import ridge as compensation
from onnxcop.reconstruction.divergence import Reference
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.refine import Refiner
from onnxcop.recovery import quality_bound, rounds
from onnxcop.recovery import setup as prepared
from onnxcop.recovery.rounds import RecoverySettings
from onnxcop.runtime.session import EngineOptions, Session

CPU = EngineOptions(provider="cpu", threads=1)
QUICK = RecoverySettings(rounds=1, held_out_samples=40, refine_samples=80, curve_passes=2)


class Digits:
    """The digits network with its images."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "digits_resnet.onnx"
        self.data = folder / "digits_calib.npz"
        test = np.load(folder / "digits_test.npz")
        self.pictures, self.labels = test["input"], test["labels"]
        self.base = self.accuracy(onnx.load(self.model))

    def accuracy(self, model: onnx.ModelProto) -> float:
        with Session(model, CPU) as session:
            scores = session.run({"input": self.pictures})["logits"]
        return float((scores.argmax(axis=1) == self.labels).mean())

    def prune(self, **options: Any) -> onnxcop.PruneResult:
        return onnxcop.prune(self.model, options=CPU, **options)


@pytest.fixture(scope="module")
def digits(models_dir: Path) -> Digits:
    return Digits(models_dir)


@pytest.fixture(scope="module")
def full(digits: Digits) -> onnxcop.PruneResult:
    return digits.prune(macs=0.5, data=digits.data)


def test_half_of_the_work_costs_less_than_two_points(digits: Digits, full: onnxcop.PruneResult) -> None:
    assert full.report.after.macs <= 0.5 * full.report.before.macs
    assert digits.accuracy(full.model) > digits.base - 0.02
    onnx.checker.check_model(full.model, full_check=True)


def test_recovery_beats_merging_alone_and_merging_none(digits: Digits, full: onnxcop.PruneResult) -> None:
    """The same units leave in all three: what differs is what makes up for them."""
    plain = digits.prune(macs=0.35, criterion="cop", recover="none")
    merged = digits.prune(macs=0.35, criterion="cop", recover="merge", data=digits.data)
    refined = digits.prune(macs=0.35, criterion="cop", recover="full", data=digits.data)
    assert plain.plan.cuts == merged.plan.cuts == refined.plan.cuts
    accuracies = [digits.accuracy(result.model) for result in (plain, merged, refined)]
    assert accuracies == sorted(accuracies)
    assert accuracies[1] > accuracies[0] + 0.1
    assert accuracies[2] > accuracies[1]
    by_merging = digits.prune(macs=0.5, recover="merge", data=digits.data)
    assert digits.accuracy(by_merging.model) > accuracies[0]
    assert digits.accuracy(full.model) > digits.accuracy(by_merging.model) - 0.005  # a picture is 0.003
    assert full.report.held_out["divergence"] < by_merging.report.held_out["divergence"]
    assert refined.report.held_out["divergence"] < merged.report.held_out["divergence"]


def quality(result: onnxcop.PruneResult) -> dict[str, float]:
    return dict(result.report.quality)


def test_recovery_without_data_beats_plain_deletion(digits: Digits) -> None:
    """By the same units, and by units that were chosen on made-up inputs."""
    plain = digits.prune(macs=0.7, recover="none")
    recovered = digits.prune(macs=0.7, criterion="cop")
    measured = digits.prune(macs=0.7, settings=QUICK)
    assert plain.plan.cuts == recovered.plan.cuts != measured.plan.cuts
    accuracies = [digits.accuracy(result.model) for result in (plain, recovered, measured)]
    assert accuracies[0] + 0.1 < min(accuracies[1:])


@pytest.mark.parametrize("options", [
    {"macs": 0.7, "data": True, "samples": 120, "settings": QUICK, "seed": 3},
    {"macs": 0.6, "data": True, "samples": 120, "criterion": "cop-activation"},
    {"macs": 0.7, "settings": QUICK},
], ids=["measured", "by criterion", "no data"])  # fmt: skip
def test_the_same_command_gives_the_same_bytes(digits: Digits, options: dict[str, Any], tmp_path: Path) -> None:
    chosen = {**options, **({"data": digits.data} if options.get("data") else {})}
    for name in ("one.onnx", "two.onnx"):
        digits.prune(**chosen).save(tmp_path / name)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


@pytest.fixture(scope="module")
def bounded(digits: Digits) -> dict[float, onnxcop.PruneResult]:
    """Results under a tight and a loose bound on the divergence."""
    return {
        bound: digits.prune(divergence=bound, data=digits.data, samples=120, settings=QUICK)
        for bound in (0.0003, 0.003)
    }


@pytest.mark.parametrize("bound", [0.0003, 0.003])
def test_divergence_stays_within_its_bound(
    digits: Digits, bounded: dict[float, onnxcop.PruneResult], bound: float
) -> None:
    result = bounded[bound]
    assert result.report.after.macs < result.report.before.macs
    assert 0 < result.report.held_out["divergence"] <= bound
    analysis = onnxcop.analyze(digits.model, options=CPU)
    data = open_data(analysis, DataOptions(data=digits.data, samples=120, batch_size=32))
    assert data is not None
    calibration, unseen = set_aside(data, 0)
    _, held_out = calibration.split(1 / 3, 0)
    assert unseen is not None
    assert (held_out.count, unseen.count) == (40, 256)  # samples beyond the 120 are there to report on
    for samples, figures, rounding in ((held_out, result.report.held_out, 1e-3), (unseen, quality(result), 1e-6)):
        outputs = []
        for model in (onnx.load(digits.model), result.model):
            with Session(model, CPU) as session:
                outputs.append([session.run(batch) for batch in samples.batches()])
        found = Reference(outputs[0]).compare(outputs[1])
        assert found.value == pytest.approx(figures["divergence"], rel=rounding)
        assert found.agreement == pytest.approx(figures["top-1 agreement"])


def test_a_looser_bound_saves_more(bounded: dict[float, onnxcop.PruneResult]) -> None:
    assert bounded[0.003].report.after.macs < bounded[0.0003].report.after.macs


def test_the_metric_may_not_drop_further(digits: Digits) -> None:
    result = digits.prune(
        metric=digits.accuracy, max_drop=0.005, data=digits.data, samples=120, settings=QUICK
    )  # fmt: skip
    measured = quality(result)
    assert measured["accuracy before"] == digits.base
    assert measured["accuracy after"] == digits.accuracy(result.model) >= digits.base - 0.005
    assert result.report.after.macs < 0.95 * result.report.before.macs


def test_a_metric_that_allows_nothing_changes_nothing(digits: Digits) -> None:
    calls = []

    def picky(model: onnx.ModelProto) -> float:
        calls.append(model)
        return -float(len(calls))

    result = digits.prune(metric=picky, max_drop=0.5, data=digits.data, samples=60, settings=QUICK)
    assert result.report.after.macs == result.report.before.macs
    assert digits.accuracy(result.model) == digits.base


ERRORS = [
    ({"divergence": 0.1}, CalibrationError, "--divergence and --max-drop needs? calibration data"),
    ({"max_drop": 0.1}, CalibrationError, "--divergence and --max-drop needs? calibration data"),
    ({"max_drop": 0.1, "data": 64}, BudgetError, "--max-drop needs a score to measure"),
    ({"divergence": 0.1, "data": 8, "criterion": "cop"}, BudgetError, "go with --allocate measured"),
    ({"divergence": 0.1, "data": 8, "recover": "none"}, BudgetError, "give --recover merge or full"),
    ({"macs": 0.5, "criterion": "cop-activation"}, CalibrationError, "cop-activation needs calibration data"),
    ({"macs": 0.5, "recover": "some"}, BudgetError, "unknown recovery method 'some'; choose one of"),
    ({"macs": 0.5, "allocate": "some"}, BudgetError, "unknown allocation 'some'; choose one of"),
    ({"macs": 0.5, "data": 1}, CalibrationError, "recovery needs at least 2 samples"),
    ({"macs": 0.01, "data": 64, "settings": QUICK}, BudgetError, "the budget --macs 0.01 cannot be reached"),
]


@pytest.mark.parametrize(("options", "error", "message"), ERRORS, ids=[str(list(o.items())[:2]) for o, _, _ in ERRORS])
def test_requests_that_cannot_be_met(options: dict[str, Any], error: type[Exception], message: str) -> None:
    data = options.get("data")
    pictures = np.random.default_rng(0).standard_normal((data or 1, 3, 8, 8)).astype(np.float32)
    model = chain()
    before = model.SerializeToString()
    with pytest.raises(error, match=message) as caught:
        onnxcop.prune(model, options=CPU, **{**options, "data": None if data is None else pictures})
    assert "\n" not in str(caught.value)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("recover", ["none", "merge", "full"])
def test_only_full_recovery_refines(recover: str) -> None:
    pictures, steps = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32), set()
    result = onnxcop.prune(
        chain(), macs=0.7, data=pictures, recover=recover, options=CPU, progress=lambda step, *_: steps.add(step)
    )
    assert any(step.startswith("curves") for step in steps)
    assert ("refinement" in steps) == (recover == "full")
    assert bool(result.report.held_out) == (recover != "none")
    assert result.report.figures is not None  # of the written file, whatever it was made by


@pytest.mark.parametrize("large", [False, True])
def test_without_data_less_is_measured_of_a_large_network(
    large: bool, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(prepared, "_LARGE", 1.0)
        monkeypatch.setattr(prepared, "_AFFORDABLE", 1.0)
    ends: list[tuple[str, float]] = []

    def note(step: str, done: float, total: float | None) -> None:
        if done == total:
            ends.append((step, done))

    result = digits.prune(macs=0.5, settings=RecoverySettings(rounds=1), progress=note)
    names = [name for name, _ in ends]
    assert ("refinement" in names) == (not large)
    assert (sum(name.startswith("curves") for name in names) <= 2) == large
    synthetic = dict(ends)["statistics (fit)"] + dict(ends)["statistics (held-out)"]
    assert synthetic == (32 + 8 if large else 128 + 64)
    assert result.report.calibration == f"{synthetic} synthetic inputs: no data was given"


def test_linear_algebra_runs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of many small factorizations wait for one another, on a busy machine many times as long as they help."""
    seen: list[int] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(surgeon, "regularized_inverse", watched(surgeon.regularized_inverse))
    monkeypatch.setattr(compensation, "regularized_solve", watched(compensation.regularized_solve))
    pictures = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    with threadpool_limits(limits=2, user_api="blas"):
        for options in ({}, {"criterion": "l2"}, {"criterion": "cop-multiple"}):
            onnxcop.prune(chain(), data=pictures, recover="merge", options=CPU, **options)
            assert set(seen) == {1}
            seen.clear()


def test_two_samples_are_enough() -> None:
    pictures = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    result = onnxcop.prune(chain(), macs=0.6, data=pictures, options=CPU)
    assert result.report.after.macs <= 0.6 * result.report.before.macs
    for tensor in result.model.graph.initializer:
        assert np.isfinite(onnx.numpy_helper.to_array(tensor)).all()


def test_pictures_that_are_all_alike() -> None:
    result = onnxcop.prune(chain(), macs=0.6, data=np.ones((20, 3, 8, 8), np.float32), options=CPU)
    for tensor in result.model.graph.initializer:
        assert np.isfinite(onnx.numpy_helper.to_array(tensor)).all()


@pytest.mark.parametrize("budget", [Budget(macs=0.3), Budget(params=0.5, macs=0.8), Budget(filters=0.4, size=9)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_take_equal_shares(budget: Budget, rounds: int) -> None:
    steps = round_budgets(budget, rounds)
    assert len(steps) == rounds
    assert steps[-1] == budget
    for name in ("macs", "params", "filters"):
        bound = getattr(budget, name)
        if bound is not None:
            shares = np.diff(np.log([1.0, *(getattr(step, name) for step in steps)]))
            np.testing.assert_allclose(shares, np.log(bound) / rounds)


def test_deeper_cuts_take_more_rounds() -> None:
    counts = [default_rounds(Budget(macs=bound)) for bound in (1.0, 0.9, 0.7, 0.5, 0.1)]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] > counts[1]
    assert default_rounds(Budget(size=1000)) == default_rounds(Budget(macs=0.7))


def test_few_pictures_are_fitted_on_in_several_views(digits: Digits, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    for number in range(24):
        Image.fromarray(rng.integers(0, 256, (20, 20)).astype(np.uint8)).save(tmp_path / f"{number}.png")
    analysis = onnxcop.analyze(digits.model, options=CPU, biases=True)
    arrays = {"input": rng.normal(size=(24, 1, 8, 8)).astype(np.float32)}

    def held(data: Any, **settings: int) -> tuple[int, int]:
        source = open_data(analysis, DataOptions(data=data, samples=24, batch_size=8), analysis.input_shapes)
        assert source is not None
        recovery = prepared.recovery_on(analysis, source, RecoverySettings(held_out_samples=4, **settings), CPU, None)
        return recovery.fit.count, recovery.held_out.count

    assert held(tmp_path) == (36, 6)
    assert held(tmp_path, views=1) == (18, 6)
    assert held(tmp_path, views=3) == (54, 6)
    assert held(tmp_path, views=3, refine_samples=40) == (36, 6)  # no more than refinement takes
    assert held(arrays) == (18, 6)


@pytest.mark.parametrize("backwards", [False, True])
def test_of_several_selections_the_closest_network_is_kept(
    digits: Digits, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    analysis = onnxcop.analyze(digits.model, options=CPU, biases=True)
    source = open_data(analysis, DataOptions(data=digits.data, samples=60, batch_size=20), analysis.input_shapes)
    assert source is not None
    recovery = prepared.recovery_on(analysis, source, QUICK, CPU, lambda *_: None)
    state, limits = recovery.start(onnxcop.Limits()), onnxcop.Limits()
    few, many = (np.concatenate([group.units[:cut] for group in analysis.structure.groups]) for cut in (1, 6))

    class Stub:
        def alternatives(self) -> list[Alternative]:
            made = []
            for units in (many, few) if backwards else (few, many):
                other = state.copy()
                for unit in units.tolist():
                    other.remove(unit)
                made.append(Alternative("in some way", other, units))
            return made

    monkeypatch.setattr(recovery, "_selector", lambda *_: Stub())
    recovery.round(state, Budget(macs=0.6), limits, np.zeros(len(recovery.working.alive)), "round 1 of 1")
    assert sorted(state.removed) == sorted(few.tolist())
    assert np.array_equal(np.flatnonzero(~recovery.working.alive), np.sort(few))
    noted = [waypoint.divergence for waypoint in recovery.way]
    assert recovery.divergence().value == min(noted) < max(noted)
    assert recovery.finished().alive.sum() == len(recovery.working.alive) - len(few)


def test_the_last_refinement_is_repeated_on_all_samples(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = onnxcop.analyze(digits.model, options=CPU, biases=True)
    source = open_data(analysis, DataOptions(data=digits.data, samples=60, batch_size=20), analysis.input_shapes)
    assert source is not None
    recovery = prepared.recovery_on(analysis, source, QUICK, CPU, lambda *_: None)
    assert recovery.few  # 20 of 40
    state, limits = recovery.start(onnxcop.Limits()), onnxcop.Limits()
    recovery.round(state, Budget(macs=0.6), limits, np.zeros(len(recovery.working.alive)), "round 1 of 1")
    before = recovery.working.model.SerializeToString()
    network = recovery.finished()
    assert recovery.working.model.SerializeToString() == before
    changed = [
        name for name, tensor in network.partition.stored.items() if tensor != recovery.working.partition.stored[name]
    ]
    assert changed
    assert np.array_equal(network.alive, recovery.working.alive)

    def distance(one: MaskedNetwork) -> float:
        return recovery.softened.compare(recovery._outputs_of(one)).value

    assert distance(network) < distance(recovery.working)  # fitted on these samples as well

    def harmful(refiner: Refiner, *_: object) -> None:
        for name in changed:
            refiner.working.write(name, 3 * refiner.working.read(name))

    monkeypatch.setattr(Refiner, "repeat", harmful)
    assert recovery.finished() is recovery.working
    monkeypatch.undo()
    recovery.settings = replace(QUICK, held_out_samples=20)
    assert recovery.finished() is recovery.working  # there are samples enough


@pytest.mark.parametrize("options", [{"divergence": 0.02}, {"metric": lambda _: 1.0, "max_drop": 0.5}])
def test_a_network_that_was_checked_against_a_bound_is_the_one_that_is_written(
    digits: Digits, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def repeated(*_: object) -> None:
        raise AssertionError("the network changed after it was checked")

    monkeypatch.setattr(Refiner, "repeat", repeated)
    monkeypatch.setattr(quality_bound, "_STEP", 0.5)
    monkeypatch.setattr(quality_bound, "_LAST", 0.6)
    options["limits"] = onnxcop.Limits(max_cut=0.6)
    result = digits.prune(data=digits.data, samples=80, settings=QUICK, latency_seconds=0.0, **options)
    assert result.report.after.macs < result.report.before.macs


def test_large_networks_are_judged_in_batches_that_many_workers_share_evenly(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = onnxcop.analyze(digits.model, options=CPU, biases=True)
    source = open_data(analysis, DataOptions(data=digits.data, samples=200, batch_size=16), analysis.input_shapes)
    assert source is not None

    def sizes() -> list[int]:
        recovery = prepared.recovery_on(analysis, source, RecoverySettings(), CPU, None)
        return [len(feed["input"]) for feed in recovery.held_out_feeds]

    macs = float(analysis.cost.original()[0])
    held = sum(sizes())
    assert sizes() == [16] * (held // 16) + [held % 16] * (held % 16 > 0)
    monkeypatch.setattr(rounds, "_JUDGED_MACS", 4 * macs)
    assert set(sizes()[:-1]) == {math.ceil(held / 16)} == {5}
    monkeypatch.setattr(rounds, "_JUDGED_MACS", 4.5 * macs)
    assert set(sizes()[:-1]) == {8}
    monkeypatch.setattr(rounds, "_JUDGED_MACS", 8.5 * macs)
    assert set(sizes()[:-1]) == {16}
    monkeypatch.setattr(rounds, "_JUDGED_MACS", macs)
    monkeypatch.setattr(rounds, "_JUDGED", 6)
    assert len(sizes()) == 6 and max(sizes()) - min(sizes()[:-1]) == 0
    assert sum(sizes()) == held


@pytest.mark.parametrize(("pixels", "size"), [(2, 32), (8, 16), (16, 4), (32, 1)])
def test_batches_are_smaller_if_feature_maps_are_large(pixels: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest map has 8 channels of single precision, analysed with 16 rows and 16 columns."""
    monkeypatch.setattr(prepared, "_ACTIVATION", 6 * 4 * 8 * 16 * 16)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> agraph (float[N, 3, H, W] x) => (float[N, 8, H, W] y)'
        "{ y = Conv (x, w) }"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 3, 1, 1), np.float32), "w"))
    analysis = onnxcop.analyze(model, input_shapes={"x": (1, 3, 16, 16)}, options=CPU)
    samples = [{"x": np.zeros((1, 3, pixels, pixels), np.float32)} for _ in range(2)]
    source = open_data(analysis, DataOptions(data=samples), {})
    assert prepared.affordable_batch(analysis, source, CPU) == size
    assert prepared.affordable_batch(analysis, source.in_batches_of(2), CPU) == min(size, 2)


def test_a_dead_filter_gets_no_weights_that_are_denormal_numbers() -> None:
    """ONNX Runtime takes a hundred times as long for products that are."""
    model, dead = chain(widths=(32, 48)), 5
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, value in (("w2", 3e-39), ("b2", -1e-39)):
        array = onnx.numpy_helper.to_array(stored[name]).copy()
        array[dead] = 0
        array.reshape(len(array), -1)[dead, 0] = value
        stored[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    result = onnxcop.prune(
        model, macs=0.7, data={"x": np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)},
        limits=onnxcop.Limits(keep=("c2",)), allocate="measured", options=CPU,
    )  # fmt: skip
    made = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}
    assert made["w2"].shape[1] < 32
    assert all(not np.any((array != 0) & (np.abs(array) < 2.0**-100)) for array in made.values())
