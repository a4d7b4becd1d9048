"""How often a 95 % interval holds the true figure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxcop._base.types import FloatArray
from onnxcop.outputs.intervals import Estimate, of_distance, of_mean, of_share

TURNS = 600


def covered(draw: Callable[[np.random.Generator], Estimate], truth: float) -> float:
    rng = np.random.default_rng(0)
    found = [draw(rng) for _ in range(TURNS)]
    return float(np.mean([f.low is not None and f.high is not None and f.low <= truth <= f.high for f in found]))


def of_mean_of(values: FloatArray) -> Estimate:
    return of_distance(float(values.mean()), (values.sum() - values) / (len(values) - 1), len(values))


@pytest.mark.parametrize("count", [17, 64, 256])
@pytest.mark.parametrize("skew", [1.0, 1.5])
def test_a_mean_of_skewed_distances(count: int, skew: float) -> None:
    """With a skew of 1.5, a tenth of the samples makes most of the mean."""
    share = covered(lambda rng: of_mean_of(rng.lognormal(0, skew, count)), np.exp(skew**2 / 2))
    assert 0.9 < share <= 1


@pytest.mark.parametrize("count", [17, 64])
def test_a_relative_error(count: int) -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        energy = rng.lognormal(0, 0.5, count)
        gap = 0.04 * energy * rng.chisquare(3, count) / 3
        rest = np.sqrt((gap.sum() - gap) / (energy.sum() - energy))
        return of_distance(float(np.sqrt(gap.sum() / energy.sum())), rest, count)

    assert 0.9 < covered(draw, 0.2) < 0.99


@pytest.mark.parametrize(("share", "count"), [(0.94, 17), (0.5, 17), (0.97, 64), (0.8, 256)])
def test_a_share(share: float, count: int) -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        return of_share(np.stack([rng.random(count) < share, np.ones(count)], axis=1).astype(np.float64), count)

    assert 0.9 < covered(draw, share) <= 1


def test_a_share_of_cases_clustered_in_samples() -> None:
    """Boxes of one image are right or wrong together: three hundred boxes of thirty images are no three hundred."""

    def draw(rng: np.random.Generator) -> Estimate:
        whole = rng.integers(1, 20, 30).astype(np.float64)
        return of_share(np.stack([whole * rng.beta(8, 2, 30), whole], axis=1), 30)

    assert 0.9 < covered(draw, 0.8) < 0.99


def test_a_mean_cosine() -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        return of_mean(np.stack([1 - 0.1 * rng.chisquare(4, 40) / 4, np.ones(40)], axis=1), 40)

    assert 0.9 < covered(draw, 0.9) < 0.99


def test_what_all_agree_on_is_not_certain() -> None:
    found = of_share(np.ones((17, 2)), 17)
    assert found.value == found.high == 1
    assert found.low == pytest.approx(17 / (17 + 1.96**2), abs=1e-3)
    assert found.percent() == "100 % (95 % interval 81.6 to 100, n = 17)"


def test_too_few_samples_for_an_interval() -> None:
    assert of_share(np.array([[1.0, 2.0]]), 1) == Estimate(0.5, None, None, 1)
    assert of_distance(0.3, np.empty(0), 1).number() == "0.3 (n = 1)"
    assert of_distance(float("inf"), np.full(5, np.inf), 5) == Estimate(float("inf"), None, None, 5)


def test_no_distance_at_all() -> None:
    assert of_distance(0.0, np.zeros(9), 9) == Estimate(0.0, 0.0, 0.0, 9)


def test_a_distance_that_one_sample_makes() -> None:
    found = of_mean_of(np.array([0.0, 0.0, 0.0, 1.0]))
    assert found.low == 0
    assert found.high is not None
    assert found.high > found.value
