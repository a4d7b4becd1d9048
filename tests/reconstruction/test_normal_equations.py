"""Least squares from sums over rows is least squares on the rows."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcop.reconstruction.normal_equations import RIDGES, FittedLayer, RowSums, matched_moments, solve

GROUPS, FEATURES, OUTPUTS = 2, 6, 4


def drawn(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs far from zero, and what an output lacks: in part what they explain."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rows, GROUPS, FEATURES)) + 5
    mix = np.random.default_rng(9).standard_normal((GROUPS, FEATURES, OUTPUTS))
    noise = rng.standard_normal((rows, GROUPS, OUTPUTS))
    return inputs, (inputs.transpose(1, 0, 2) @ mix).transpose(1, 0, 2) + 0.5 * noise + 2


def sums(inputs: np.ndarray, missing: np.ndarray, *, single: bool = False, batch: int = 7) -> RowSums:
    found = RowSums.empty(GROUPS, FEATURES, OUTPUTS)
    for start in range(0, len(inputs), batch):
        found.add(inputs[start : start + batch], missing[start : start + batch], single=single)
    return found


def layer(*, bias: bool = True) -> FittedLayer:
    rng = np.random.default_rng(3)
    alive = np.ones((GROUPS, FEATURES))
    alive[:, 2] = 0
    weights = rng.standard_normal((GROUPS, FEATURES, OUTPUTS)) * alive[:, :, None]
    shown = np.ones((GROUPS, OUTPUTS), dtype=np.bool_)
    shown[1, 3] = False
    return FittedLayer(weights, rng.standard_normal((GROUPS, OUTPUTS)) if bias else None, alive, shown)


@pytest.mark.parametrize("single", [False, True])
def test_the_error_is_that_of_the_rows(single: bool) -> None:
    inputs, missing = drawn(50, 0)
    change, shift = (
        np.random.default_rng(1).standard_normal((GROUPS, FEATURES, OUTPUTS)),
        np.full((GROUPS, OUTPUTS), 0.3),
    )
    left = missing - (inputs.transpose(1, 0, 2) @ change).transpose(1, 0, 2) - shift
    counted = layer().outputs
    found = sums(inputs, missing, single=single).error(change, shift, counted)
    assert found == pytest.approx(float((left**2).sum(axis=0)[counted].sum()), rel=1e-5 if single else 1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_the_solution_is_that_of_ridge_regression_on_the_rows(bias: bool) -> None:
    subject, rows, held = layer(bias=bias), drawn(80, 0), drawn(30, 5)
    found = solve(subject, sums(*rows), sums(*held))
    assert found is not None
    alive = np.flatnonzero(subject.features[0])
    tried = {}
    for ridge in RIDGES:
        change, shift = np.zeros((GROUPS, FEATURES, OUTPUTS)), np.zeros((GROUPS, OUTPUTS))
        for group in range(GROUPS):
            a, r = rows[0][:, group][:, alive], rows[1][:, group]
            mean_a, mean_r = (a.mean(axis=0), r.mean(axis=0)) if bias else (np.zeros(len(alive)), np.zeros(OUTPUTS))
            gram = (a - mean_a).T @ (a - mean_a) / len(a)
            own = np.diagonal(gram)
            strength = ridge * np.diag(np.maximum(own, 1e-3 * own.mean()))
            change[group, alive] = np.linalg.solve(gram + strength, (a - mean_a).T @ (r - mean_r) / len(a))
            shift[group] = mean_r - mean_a @ change[group, alive]
        left = held[1] - (held[0].transpose(1, 0, 2) @ change).transpose(1, 0, 2) - shift
        tried[float((left**2)[:, subject.outputs].sum())] = change, shift
    change, shift = tried[min(tried)]
    np.testing.assert_allclose(found.change, change, atol=1e-9)
    np.testing.assert_allclose(found.shift, shift, atol=1e-8)
    assert not found.change[:, 2].any()


def test_regularization_does_not_depend_on_the_units_of_inputs() -> None:
    """An input in other units gets a weight in other units, and predictions stay."""
    subject, rows, held = layer(), drawn(40, 0), drawn(30, 5)
    found = solve(subject, sums(*rows), sums(*held))
    units = np.geomspace(0.3, 3.0, FEATURES)
    scaled = solve(subject, sums(rows[0] * units, rows[1]), sums(held[0] * units, held[1]))
    assert found is not None and scaled is not None and found.ridge == scaled.ridge
    np.testing.assert_allclose(scaled.change * units[None, :, None], found.change, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(scaled.shift, found.shift, rtol=1e-6, atol=1e-9)


def test_noise_is_not_fitted() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((12, GROUPS, FEATURES))
    noise = rng.standard_normal((12, GROUPS, OUTPUTS))
    held = rng.standard_normal((400, GROUPS, FEATURES)), np.zeros((400, GROUPS, OUTPUTS))
    assert solve(layer(), sums(inputs, noise), sums(*held)) is None


def test_moments_are_matched_as_on_the_rows() -> None:
    subject, (inputs, missing) = layer(), drawn(60, 0)
    assert subject.bias is not None
    made = (inputs.transpose(1, 0, 2) @ subject.weights).transpose(1, 0, 2) + subject.bias
    wanted = made + 0.2 * missing
    weights, bias = matched_moments(subject, subject.bias, sums(inputs, 0.2 * missing))
    scale = np.clip(wanted.std(axis=0) / made.std(axis=0), 0.5, 2.0)
    assert 0.5 < scale.min() < scale.max()
    np.testing.assert_allclose(weights, subject.weights * scale[:, None, :], rtol=1e-9)
    np.testing.assert_allclose(bias, wanted.mean(axis=0) - scale * (made - subject.bias).mean(axis=0), rtol=1e-9)


def test_regularization_grows_from_step_to_step() -> None:
    """The search ends where more of it is worse."""
    assert RIDGES[0] > 0
    assert list(RIDGES) == sorted(set(RIDGES))


def test_inputs_that_are_zero_leave_the_mean_to_the_bias() -> None:
    inputs, missing = drawn(40, 0)
    held = drawn(20, 5)
    found = solve(layer(), sums(0 * inputs, missing), sums(0 * held[0], held[1]))
    assert found is not None
    assert not found.change.any()
    np.testing.assert_allclose(found.shift, missing.mean(axis=0), rtol=1e-9)


def test_a_group_that_lost_all_features_changes_its_bias_alone() -> None:
    subject, rows, held = layer(), drawn(80, 0), drawn(30, 5)
    subject.features[1] = 0
    found = solve(subject, sums(*rows), sums(*held))
    assert found is not None
    assert found.change[0].any() and not found.change[1].any()
    np.testing.assert_allclose(found.shift[1], rows[1].mean(axis=0)[1], rtol=1e-9)


@pytest.mark.parametrize("single", [False, True])
def test_outputs_that_do_not_vary_keep_their_weights(single: bool) -> None:
    """The variance that sums leave of a constant is rounding, of either sign."""
    subject, (inputs, missing) = layer(), drawn(60, 0)
    assert subject.bias is not None
    steady = np.broadcast_to(inputs[:1] * 1.1, inputs.shape)
    weights, bias = matched_moments(subject, subject.bias, sums(steady, missing, single=single))
    np.testing.assert_array_equal(weights, subject.weights)
    np.testing.assert_allclose(bias, subject.bias + missing.mean(axis=0), rtol=1e-9)


@pytest.mark.parametrize(("more", "factor"), [(-1.0, 0.5), (9.0, 2.0), (0.2, 1.2)])
def test_outputs_are_scaled_from_half_to_double(more: float, factor: float) -> None:
    subject, (inputs, _) = layer(), drawn(60, 0)
    assert subject.bias is not None
    made = (inputs.transpose(1, 0, 2) @ subject.weights).transpose(1, 0, 2)
    weights, _ = matched_moments(subject, subject.bias, sums(inputs, more * (made - made.mean(axis=0))))
    np.testing.assert_allclose(weights, factor * subject.weights, rtol=1e-9)


def test_sums_that_rounding_made_indefinite_take_more_regularization() -> None:
    subject, rows, held = layer(), drawn(80, 0), drawn(30, 5)
    assert subject.bias is not None
    part = FittedLayer(subject.weights[:1], subject.bias[:1], subject.features[:1], subject.outputs[:1])
    fit, hold = (RowSums.empty(1, FEATURES, OUTPUTS) for _ in range(2))
    for total, (inputs, missing) in ((fit, rows), (hold, held)):
        total.add(inputs[:, :1], missing[:, :1], single=False)
    covariance = fit.centred()[0][0]
    lowest = float(np.linalg.eigvalsh(covariance)[0])
    below = lowest + 3 * RIDGES[0] * float(np.trace(covariance)) / FEATURES
    fit.gram -= fit.count * below * np.eye(FEATURES)
    assert np.linalg.eigvalsh(fit.centred()[0][0])[0] < 0
    found = solve(part, fit, hold)
    assert found is not None
    assert np.isfinite(found.change).all() and np.isfinite(found.shift).all()


def test_one_group_is_solved_as_one_of_several() -> None:
    """Several groups share one λ; of two that are the same it is that of each."""
    subject, rows, held = layer(), drawn(80, 0), drawn(30, 5)
    assert subject.bias is not None
    found = []
    for groups in ([0], [0, 0]):
        part = FittedLayer(
            subject.weights[groups], subject.bias[groups], subject.features[groups], subject.outputs[groups]
        )
        fit, hold = (RowSums.empty(len(groups), FEATURES, OUTPUTS) for _ in range(2))
        for total, (inputs, missing) in ((fit, rows), (hold, held)):
            total.add(inputs[:, groups], missing[:, groups], single=False)
        solution = solve(part, fit, hold)
        assert solution is not None
        found.append((solution.change, solution.shift))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one[0], two[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(two[1], two[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_lack_what_the_layer_does_not_make(bias: bool) -> None:
    subject, (inputs, outputs) = layer(bias=bias), drawn(5, 0)
    found = subject.missing(inputs, outputs)
    for row in range(5):
        for group in range(GROUPS):
            made = inputs[row, group] @ subject.weights[group]
            if subject.bias is not None:
                made = made + subject.bias[group]
            np.testing.assert_allclose(found[row, group], outputs[row, group] - made, rtol=1e-12)
