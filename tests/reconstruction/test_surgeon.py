"""The cost of removing channels from a layer, and its compensation, against plain least squares."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcop._base.types import FloatArray
from onnxcop.analysis.layers import Layer
from onnxcop.calibration.statistics import Moments
from onnxcop.graph.linear import Kernel
from onnxcop.reconstruction.obs import InverseCache, LayerObs, removal_order
from onnxcop.reconstruction.ridge import (
    RIDGES,
    best_ridge,
    compensated,
    merge_channels,
    regularized,
    regularized_inverse,
    regularized_solve,
)

CHANNELS, OUTPUTS, TAPS = 9, 5, 3
RIDGE = 1e-3


def layer_of(units: list[int] | None = None, channels: int = CHANNELS) -> Layer:
    return Layer(0, Kernel(1, 0, 1), "x", 1, np.array(range(channels) if units is None else units))


def observations(seed: int, count: int = 400, channels: int = CHANNELS) -> FloatArray:
    """Correlated channels of different sizes, with means of their own."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, channels)) @ rng.standard_normal((channels, channels))
    return mixed * rng.uniform(0.5, 2.0, channels) + rng.uniform(-3, 3, channels)


def moments_of(x: FloatArray) -> Moments:
    centred = x - x.mean(axis=0)
    return Moments(len(x), x.mean(axis=0), centred.T @ centred)


def weights_of(seed: int, channels: int = CHANNELS) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((channels, OUTPUTS, TAPS))


def output_error(weights: FloatArray, merged: FloatArray, x: FloatArray) -> float:
    """The variance of the change of a layer's output."""
    return float((x @ (weights - merged).reshape(len(weights), -1)).var(axis=0).sum())


def least_error(x: FloatArray, flat: FloatArray, gone: list[int], ridge: float) -> float:
    """The least (ridge) squared error of any weights that do not use `gone`, per observation."""
    centred = (x - x.mean(axis=0)) / np.sqrt(len(x))
    scale = np.sqrt((centred**2).sum(axis=0))
    rows = np.concatenate([centred, np.sqrt(ridge) * np.diag(scale)])
    keep = [c for c in range(x.shape[1]) if c not in gone]
    wanted = rows @ flat
    found = np.linalg.lstsq(rows[:, keep], wanted, rcond=None)[0]
    return float(((wanted - rows[:, keep] @ found) ** 2).sum())


@pytest.mark.parametrize("seed", range(3))
def test_removal_costs_what_least_squares_leaves(seed: int) -> None:
    x, weights = observations(seed), weights_of(seed)
    solver = LayerObs.of(layer_of(), weights, moments_of(x), RIDGE, np.ones(CHANNELS, np.bool_))
    flat = weights.reshape(CHANNELS, -1)
    costs = solver.costs() * solver.energy
    assert solver.energy == pytest.approx(((x - x.mean(axis=0)) @ flat).var(axis=0).sum())
    for channel in range(CHANNELS):
        assert costs[channel] == pytest.approx(least_error(x, flat, [channel], RIDGE), rel=1e-6)


def test_costs_stay_exact_while_channels_leave() -> None:
    x, weights = observations(4), weights_of(4)
    solver = LayerObs.of(layer_of(), weights, moments_of(x), RIDGE, np.ones(CHANNELS, np.bool_))
    flat, gone, spent = weights.reshape(CHANNELS, -1), [], 0.0
    for channel in (6, 0, 3, 8):
        spent += float(solver.costs()[channel]) * solver.energy
        solver.remove(np.array([channel]))
        gone.append(channel)
        assert spent == pytest.approx(least_error(x, flat, gone, RIDGE), rel=1e-6)
        assert np.isinf(solver.costs()[gone]).all()
        assert not solver.weights[gone].any()


def test_channels_leave_together_or_one_by_one() -> None:
    moments, weights = moments_of(observations(5)), weights_of(5)
    alive = np.ones(CHANNELS, np.bool_)
    together = LayerObs.of(layer_of(), weights, moments, RIDGE, alive)
    single = LayerObs.of(layer_of(), weights, moments, RIDGE, alive)
    together.remove(np.array([1, 4, 7]))
    for channel in (7, 1, 4, 4):  # leaving a second time changes nothing
        single.remove(np.array([channel]))
    np.testing.assert_allclose(together.weights, single.weights, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(together.costs(), single.costs(), rtol=1e-8, atol=1e-10)
    assert alive.all()


def test_of_the_channels_of_a_group_the_same_is_known_as_of_all() -> None:
    moments, weights = moments_of(observations(16)), weights_of(16)
    alive = np.ones(CHANNELS, np.bool_)
    alive[4], weights[4] = False, 0.0
    inverses = InverseCache()
    group = np.array([7, 4, 1, 2])
    whole = LayerObs.of(layer_of(), weights, moments, RIDGE, alive, inverses=inverses)
    part = LayerObs.of(layer_of(), weights, moments, RIDGE, alive, channels=group, inverses=inverses)
    assert part.inverse is whole.inverse
    left = [1, 2, 7]
    for channel in (7, 1):
        np.testing.assert_allclose(part.costs()[left], whole.costs()[left], rtol=1e-8)
        assert np.isinf(np.delete(part.costs(), left)).all()
        for solver in (whole, part):
            solver.remove(np.array([channel]))
        left.remove(channel)
        np.testing.assert_allclose(part.weights, whole.weights, rtol=1e-8, atol=1e-10)
    late = LayerObs.of(layer_of(), weights, moments, RIDGE, alive, channels=group)
    late.remove(np.array([1, 7]))  # before any cost was asked for
    np.testing.assert_allclose(late.costs()[2], part.costs()[2], rtol=1e-8)


def test_surgery_ends_with_the_weights_of_the_closed_form() -> None:
    moments, weights = moments_of(observations(6)), weights_of(6)
    gone = np.array([2, 3, 8])
    keep = np.setdiff1d(np.arange(CHANNELS), gone)
    solver = LayerObs.of(layer_of(), weights, moments, RIDGE, np.ones(CHANNELS, np.bool_))
    for channel in gone:
        solver.remove(np.array([channel]))
    merged, _ = compensated(weights, moments, RIDGE, keep, gone)
    np.testing.assert_allclose(solver.weights.reshape(weights.shape), merged, rtol=1e-7, atol=1e-9)


def test_surgery_starts_from_channels_that_are_left() -> None:
    x, weights = observations(7), weights_of(7)
    alive = np.ones(CHANNELS, np.bool_)
    alive[[0, 5]] = False
    weights[~alive] = 0.0
    solver = LayerObs.of(layer_of(), weights, moments_of(x), RIDGE, alive)
    left = x[:, alive]
    for place, channel in enumerate(np.flatnonzero(alive)):
        expected = least_error(left, weights.reshape(CHANNELS, -1)[alive], [place], RIDGE)
        assert solver.costs()[channel] * solver.energy == pytest.approx(expected, rel=1e-6)
    assert np.isinf(solver.costs()[~alive]).all()


def test_merging_is_exact_for_linearly_dependent_channels() -> None:
    rng = np.random.default_rng(8)
    keep, gone = np.array([0, 2, 3, 6]), np.array([1, 4, 5])
    x = np.empty((200, 7))
    x[:, keep] = rng.standard_normal((200, 4)) + rng.uniform(-2, 2, 4)
    x[:, gone] = x[:, keep] @ rng.standard_normal((4, 3)) + rng.uniform(-5, 5, 3)  # a constant may be added
    weights = rng.standard_normal((7, OUTPUTS, 1))
    merged, lost = compensated(weights, moments_of(x), 0.0, keep, gone)
    np.testing.assert_allclose(x @ merged[:, :, 0] + lost, x @ weights[:, :, 0], rtol=1e-9, atol=1e-9)
    assert not merged[gone].any()


@pytest.mark.parametrize("ridge", RIDGES)
def test_the_bias_keeps_the_mean(ridge: float) -> None:
    x, weights = observations(9), weights_of(9)
    gone = np.array([1, 2, 6])
    keep = np.setdiff1d(np.arange(CHANNELS), gone)
    merged, lost = compensated(weights, moments_of(x), ridge, keep, gone)
    before = np.einsum("nc,cot->no", x, weights).mean(axis=0)
    after = np.einsum("nc,cot->no", x, merged).mean(axis=0)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after + lost, before, rtol=1e-9, atol=1e-9)


def test_merging_errs_less_than_deleting() -> None:
    x, other = np.split(observations(10, 900), [400])
    weights = weights_of(10)
    gone = np.array([0, 4])
    keep = np.setdiff1d(np.arange(CHANNELS), gone)
    alive = np.isin(np.arange(CHANNELS), keep)
    (plain,), shift = merge_channels(weights[None], None, 1e-3, alive, ~alive)
    assert not plain[gone].any()
    assert np.array_equal(plain[keep], weights[keep])
    assert not shift.any()
    merged, _ = compensated(weights, moments_of(x), 1e-3, keep, gone)
    assert output_error(weights, merged, other) < output_error(weights, plain, other)


def test_channels_make_up_for_those_of_their_own_group() -> None:
    x = observations(13, channels=6)
    x[:, [2, 5]] = x[:, [0, 3]] @ [[2.0, 1.0], [-1.0, 0.5]]  # both can be told by those of both groups together
    x[:, 2] = 2 * x[:, 0] + 1  # and this one by its own group
    weights = np.random.default_rng(13).standard_normal((2, 3, OUTPUTS, 1))
    gone = np.isin(np.arange(6), [2, 5])
    new, shift = merge_channels(weights, moments_of(x), 0.0, ~gone, gone)
    rows = x.reshape(len(x), 2, 3)
    before, after = (np.einsum("ngc,gcot->ngo", rows, w) for w in (weights, new))
    error = (after + shift.reshape(2, OUTPUTS) - before).reshape(len(x), 2, -1)
    assert not new[:, 2].any()
    np.testing.assert_allclose(error[:, 0], 0, atol=1e-8)
    np.testing.assert_allclose(error[:, 1].mean(axis=0), 0, atol=1e-9)
    assert np.abs(error[:, 1]).max() > 0.1
    assert error[:, 1].var() < (rows[:, 1, 2:] * weights[1, 2, :, 0]).var()


def test_best_ridge_has_the_least_error_on_other_samples() -> None:
    x, other = np.split(observations(11, 800), [12])  # hardly more samples than channels
    held, weights = moments_of(other), weights_of(11)
    gone = np.array([3, 5])
    keep = np.setdiff1d(np.arange(CHANNELS), gone)
    chosen = best_ridge(weights, moments_of(x), held, keep, gone)
    merged = {r: compensated(weights, moments_of(x), r, keep, gone)[0] for r in RIDGES}
    errors = {r: output_error(weights, found, other) for r, found in merged.items()}
    assert errors[chosen] == min(errors.values())


def test_inverse_of_what_has_none() -> None:
    assert np.isfinite(regularized_inverse(np.zeros((4, 4)), 1e-3)).all()
    line = np.outer(np.arange(1.0, 5.0), np.arange(1.0, 5.0))  # rank 1
    loaded = line + 1e-3 * np.diag(np.diag(line))
    np.testing.assert_allclose(regularized_inverse(line, 1e-3) @ loaded, np.eye(4), atol=1e-9)
    indefinite = np.diag([1.0, -1.0, 2.0])
    np.testing.assert_allclose(regularized_inverse(indefinite, 0.0) @ indefinite, np.eye(3), atol=1e-9)


def surgery_over(x: FloatArray, weights: FloatArray, units: list[int]) -> LayerObs:
    alive = np.ones(len(units), np.bool_)
    return LayerObs.of(layer_of(units), weights, moments_of(x), 1e-4, alive)


def test_copies_are_removed_first() -> None:
    rng = np.random.default_rng(12)
    x = rng.standard_normal((300, 6))
    x[:, 4] = 2 * x[:, 1]
    x[:, 5] = x[:, 0] - x[:, 2]
    order = removal_order([surgery_over(x, weights_of(12, 6), list(range(6)))], np.arange(6), np.zeros(6), leave=1)
    assert len(set(order)) == 5
    assert len(set(order[:2]) & {1, 4}) == 1
    assert len(set(order[:2]) & {0, 2, 5}) == 1


def test_all_consumers_count() -> None:
    rng = np.random.default_rng(13)
    x = rng.standard_normal((300, 4))
    one, two = np.ones((4, OUTPUTS, 1)), np.ones((4, OUTPUTS, 1))
    one[0], two[1] = 0.01, 0.01  # each layer could do without another channel
    one[2] = two[2] = 0.3  # and both without this one
    solvers = [surgery_over(x, one, [0, 1, 2, 3]), surgery_over(x, two, [0, 1, 2, 3])]
    assert removal_order(solvers, np.arange(4), np.zeros(4), leave=3) == [2]
    alone = removal_order([surgery_over(x, one, [0, 1, 2, 3])], np.arange(4), np.zeros(4), leave=3)
    assert alone == [0]


def test_units_have_their_own_numbers_and_some_channels_none() -> None:
    x, weights = observations(14, channels=5), weights_of(14, 5)
    weights[2] = 0.0
    solver = surgery_over(x, weights, [-1, 7, 9, -1, 8])
    assert removal_order([solver], np.array([7, 8, 9]), np.zeros(20), leave=2) == [9]
    assert solver.alive.tolist() == [True, True, False, True, True]


def test_order_without_statistics_follows_the_fallback() -> None:
    fallback = np.array([9.0, 0.5, 3.0, 0.1, 7.0, 2.0])
    assert removal_order([], np.array([1, 2, 3, 5]), fallback, leave=1) == [3, 1, 5]


def test_a_step_ends_at_the_requested_count() -> None:
    rng = np.random.default_rng(15)
    units = np.arange(400)  # many units go in one step
    seen: list[int] = []
    removal_order([], units, rng.random(400), leave=100, on_step=lambda order: seen.append(len(order)), exact=123)
    assert 123 in seen
    assert seen == sorted(set(seen))
    assert seen[-1] == 300
    assert 1 < min(np.diff(seen).max(), seen[0]) < 10


def patches(seed: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Observations of [channels × taps] features, weights, and the same weights feature by feature."""
    weights = weights_of(seed)
    flat = weights.transpose(0, 2, 1).reshape(CHANNELS * TAPS, OUTPUTS)
    return observations(seed, channels=CHANNELS * TAPS), weights, flat


def test_with_patches_all_taps_of_a_channel_leave_together() -> None:
    x, weights, flat = patches(11)
    solver = LayerObs.of(layer_of(), weights, moments_of(x), RIDGE, np.ones(CHANNELS, np.bool_))
    costs, spent = solver.costs() * solver.energy, 0.0
    for channel in range(CHANNELS):
        own = [channel * TAPS + tap for tap in range(TAPS)]
        assert costs[channel] == pytest.approx(least_error(x, flat, own, RIDGE), rel=1e-6)
    gone: list[int] = []
    for channel in (2, 7):
        spent += float(solver.costs()[channel]) * solver.energy
        solver.remove(np.array([channel]))
        gone += [channel * TAPS + tap for tap in range(TAPS)]
        assert spent == pytest.approx(least_error(x, flat, gone, RIDGE), rel=1e-6)
        assert not solver.weights[gone].any()


def test_merging_patches_keeps_the_mean_and_errs_less_than_merging_channels() -> None:
    x, weights, flat = patches(12)
    gone = np.array([0, 4])
    keep = np.setdiff1d(np.arange(CHANNELS), gone)
    merged, lost = compensated(weights, moments_of(x), 1e-9, keep, gone)
    assert merged.shape == weights.shape and not merged[gone].any()
    features = merged.transpose(0, 2, 1).reshape(flat.shape)
    np.testing.assert_allclose((x @ features).mean(axis=0) + lost, (x @ flat).mean(axis=0), rtol=1e-9, atol=1e-9)
    own = [channel * TAPS + tap for channel in gone for tap in range(TAPS)]
    error = ((x @ features + lost - x @ flat) ** 2).sum() / len(x)
    assert error == pytest.approx(least_error(x, flat, own, 1e-9), rel=1e-6)
    by_channel = moments_of(x.reshape(-1, CHANNELS, TAPS).transpose(0, 2, 1).reshape(-1, CHANNELS))
    coarse, shift = compensated(weights, by_channel, 1e-9, keep, gone)
    rougher = x @ coarse.transpose(0, 2, 1).reshape(flat.shape) + shift - x @ flat
    assert error < (rougher**2).sum() / len(x)


def test_covariances_that_are_not_definite_have_a_pseudoinverse(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    right = np.arange(12.0).reshape(6, 2)
    indefinite = (turn * [5.0, 4.0, 3.0, 2.0, 1.0, -1.0]) @ turn.T
    expected = np.linalg.pinv(regularized(indefinite, 1e-3))
    np.testing.assert_allclose(regularized_inverse(indefinite, 1e-3), expected)
    np.testing.assert_allclose(regularized_solve(indefinite, 1e-3, right), expected @ right)
    definite = (turn * [5.0, 4.0, 3.0, 2.0, 1.0, 0.5]) @ turn.T
    before = definite.copy()
    expected = np.linalg.inv(regularized(definite, 1e-3))
    monkeypatch.delattr(np.linalg, "pinv")  # it takes ten times as long
    np.testing.assert_allclose(regularized_inverse(definite, 1e-3), expected)
    np.testing.assert_allclose(regularized_solve(definite, 1e-3, right), expected @ right)
    np.testing.assert_array_equal(definite, before)


@pytest.mark.parametrize(("width", "step"), [(191, 1), (192, 2), (193, 2)])
def test_a_group_is_emptied_in_about_a_hundred_steps(width: int, step: int) -> None:
    units, scores = np.arange(width), np.random.default_rng(0).permutation(width).astype(np.float64)
    sizes: list[int] = []
    order = removal_order([], units, scores, leave=1, on_step=lambda gone: sizes.append(len(gone)))
    assert order == np.argsort(scores)[:-1].tolist()
    assert sizes[:3] == [step, 2 * step, 3 * step]
    assert sizes[-1] == width - 1
    sizes.clear()
    removal_order([], units, scores, leave=1, on_step=lambda gone: sizes.append(len(gone)), exact=3)
    assert 3 in sizes
