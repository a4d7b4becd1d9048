"""Distances between the outputs of two networks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from onnxcop.outputs.intervals import Estimate
from onnxcop.outputs.judgement import judge
from onnxcop.outputs.kinds import KINDS
from onnxcop.reconstruction.divergence import Divergence, Figures, Race, Reference, Standing, log_probabilities

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((12, 5)).astype(np.float32) * 5
OTHER = LOGITS + 3 * RNG.standard_normal(LOGITS.shape).astype(np.float32)


def test_classifiers_are_compared_by_their_predictions() -> None:
    found = Reference([{"y": LOGITS}]).compare([{"y": OTHER}])
    kl = entropy(softmax(LOGITS.astype(float), axis=1), softmax(OTHER.astype(float), axis=1), axis=1).mean()
    assert found.kind == "kl"
    assert found.value == pytest.approx(kl, rel=1e-9)
    assert found.agreement == np.mean(LOGITS.argmax(axis=1) == OTHER.argmax(axis=1))
    assert 0 < found.agreement < 1


def test_probabilities_are_as_good_as_logits() -> None:
    as_logits = Reference([{"y": LOGITS}]).compare([{"y": OTHER}])
    as_probabilities = Reference([{"y": softmax(LOGITS, axis=1)}]).compare([{"y": softmax(OTHER, axis=1)}])
    assert as_probabilities.value == pytest.approx(as_logits.value, rel=1e-4)
    assert as_probabilities.agreement == as_logits.agreement
    np.testing.assert_allclose(log_probabilities(LOGITS), log_softmax(LOGITS.astype(float), axis=1), rtol=1e-9)


def test_a_shift_of_all_scores_changes_nothing() -> None:
    assert Reference([{"y": LOGITS}]).compare([{"y": LOGITS + 100}]).value == pytest.approx(0, abs=1e-5)


def test_batches_do_not_matter() -> None:
    whole = Reference([{"y": LOGITS}]).compare([{"y": OTHER}])
    parts = Reference([{"y": LOGITS[:5]}, {"y": LOGITS[5:]}])
    assert len(parts) == 12
    assert parts.compare([{"y": OTHER[:5]}, {"y": OTHER[5:]}]).value == pytest.approx(whole.value)


@pytest.mark.parametrize("shape", [(12, 5), (12, 3, 4), (12, 1)])
def test_the_same_is_at_no_distance(shape: tuple[int, ...]) -> None:
    y = 8 * RNG.standard_normal(shape)
    found = Reference([{"y": y}]).compare([{"y": y.copy()}])
    assert found.value == 0
    assert found.agreement == (None if shape == (12, 1) else 1)


def test_no_distance_is_negative() -> None:
    """The sum that a divergence is can round to less than nothing where two networks hardly differ."""
    reference = Reference([{"y": LOGITS.astype(np.float64)}])
    noise = np.random.default_rng(1).standard_normal((50, *LOGITS.shape)) * 1e-12
    found = [reference.compare([{"y": LOGITS + one}]).value for one in noise]
    assert 0 == min(found) < max(found) < 1e-12


def test_classes_that_are_ruled_out() -> None:
    masked, other = LOGITS.copy(), OTHER.copy()
    masked[:, 2] = other[:, 2] = -np.inf
    reference = Reference([{"y": masked}])
    assert reference.compare([{"y": masked}]).value == 0
    rest = [0, 1, 3, 4]
    expected = Reference([{"y": LOGITS[:, rest]}]).compare([{"y": OTHER[:, rest]}]).value
    assert reference.compare([{"y": other}]).value == pytest.approx(expected)


def test_other_outputs_are_compared_by_relative_error() -> None:
    a, b = np.array([[[3.0, 4.0]]]), np.array([[[3.0, 4.5]]])
    found = Reference([{"map": a}]).compare([{"map": b}])
    assert (found.kind, found.agreement) == ("error", None)
    assert found.value == pytest.approx(0.1)


def test_several_outputs_count_alike() -> None:
    big, small = np.full((2, 3), 1000.0), np.full((2, 3), 0.01)
    found = Reference([{"big": big, "small": small}]).compare([{"big": big, "small": small * 1.5}])
    assert found.kind == "error"
    assert found.value == pytest.approx(0.25)


def test_errors_are_summed_over_batches() -> None:
    a, b = RNG.standard_normal((6, 2, 2)), RNG.standard_normal((6, 2, 2))
    parts = Reference([{"y": a[:4]}, {"y": a[4:]}]).compare([{"y": b[:4]}, {"y": b[4:]}])
    assert parts.value == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_outputs_that_were_zero() -> None:
    zero = np.zeros((2, 2, 2))
    reference = Reference([{"y": zero}])
    assert reference.compare([{"y": zero}]).value == 0
    assert reference.compare([{"y": zero + 1}]).value == pytest.approx(np.sqrt(8))


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3)])
def test_what_is_no_number_is_infinitely_far(shape: tuple[int, ...]) -> None:
    y = RNG.standard_normal(shape)
    broken = y.copy()
    broken.flat[3] = np.nan
    assert Reference([{"y": y}]).compare([{"y": broken}]).value == np.inf


def test_other_shapes_are_infinitely_far() -> None:
    assert Reference([{"y": np.ones((2, 3, 4))}]).compare([{"y": np.ones((2, 3, 5))}]).value == np.inf


def test_large_parts_of_an_output_do_not_hide_small_ones() -> None:
    rng = np.random.default_rng(0)
    output = np.concatenate([rng.uniform(50, 300, (4, 4, 30)), rng.uniform(0, 0.5, (4, 2, 30))], axis=1)
    wrong_scores = output.copy()
    wrong_scores[:, 4:] = 0.0
    for one, other in ((output, wrong_scores), (output.swapaxes(1, 2), wrong_scores.swapaxes(1, 2))):
        reference = Reference([{"y": one[:2].astype(np.float32)}, {"y": one[2:].astype(np.float32)}])
        found = reference.compare([{"y": other[:2].astype(np.float32)}, {"y": other[2:].astype(np.float32)}])
        assert found.kind == "error"
        assert found.value == pytest.approx(np.sqrt(2 / 6))


def test_no_number_in_a_small_part_is_infinitely_far_too() -> None:
    rng = np.random.default_rng(0)
    output = np.concatenate([rng.uniform(50, 300, (4, 4, 30)), rng.uniform(0, 0.5, (4, 2, 30))], axis=1)
    for bad in (np.nan, np.inf):
        other = output.copy()
        other[0, 5, 3] = bad
        assert Reference([{"y": output}]).compare([{"y": other}]).value == float("inf")


def test_infinities_of_the_original_are_left_out_without_a_warning() -> None:
    output = np.random.default_rng(0).uniform(0, 1, (2, 3, 4))
    output[0, 0, 0] = -np.inf
    assert Reference([{"y": output}]).compare([{"y": output.copy()}]).value == 0.0


def test_parts_of_one_size_are_summed_up() -> None:
    rng = np.random.default_rng(0)
    one = rng.uniform(0.1, 1, (4, 6, 30)).astype(np.float32)
    other = one + rng.normal(0, 0.1, one.shape).astype(np.float32)
    expected = np.linalg.norm(other - one) / np.linalg.norm(one)
    assert Reference([{"y": one}]).compare([{"y": other}]).value == pytest.approx(expected, rel=1e-5)


def test_what_the_original_left_open_is_left_out() -> None:
    y = np.array([[[1.0, np.inf, np.nan]]])
    assert Reference([{"y": y}]).compare([{"y": np.array([[[1.5, 0.0, 7.0]]])}]).value == pytest.approx(0.5)


def test_only_numbers_count() -> None:
    scores, labels = np.ones((2, 3)), np.array([1, 2])
    reference = Reference([{"label": labels, "scores": scores, "none": None}])  # type: ignore[dict-item]
    assert reference.names == ["scores"]
    assert reference.compare([{"label": labels + 1, "scores": scores, "none": None}]).value == 0  # type: ignore[dict-item]
    nothing = Reference([{"label": labels}])
    assert (len(nothing), nothing.compare([{"label": labels + 1}]).value) == (0, 0)


def test_labels_that_do_not_exclude_each_other_are_no_classes() -> None:
    """Of sigmoid scores near zero, zeros are wrong altogether, however little the softmax of both differs."""
    scores = np.random.default_rng(0).uniform(0, 0.01, (8, 20)).astype(np.float32)
    reference = Reference([{"y": scores}])
    assert reference.kind == "error"
    assert reference.compare([{"y": np.zeros_like(scores)}]).value == pytest.approx(1.0)
    assert Reference([{"y": scores / scores.sum(axis=1, keepdims=True)}]).kind == "kl"
    assert Reference([{"y": scores - 0.5}]).kind == "error"  # nothing speaks for classes


def test_square_roots_show_what_a_few_large_probabilities_hide() -> None:
    rng = np.random.default_rng(5)
    original = 1e-3 * rng.uniform(size=(40, 6))
    original[0, 0] = 1.0  # one certain answer among many faint ones
    faint = original.copy()
    faint[1:] = 0.0
    plain, roots = (Reference([{"y": original}], roots=flag).compare([{"y": faint}]).value for flag in (False, True))
    assert plain < 0.01
    gone = np.sqrt(original[1:].sum() / original.sum())
    assert roots == pytest.approx(gone)
    assert gone > 0.2
    assert Reference([{"y": original}], roots=True).compare([{"y": original}]).value == 0


def test_square_roots_leave_other_outputs_alone() -> None:
    one, two = np.random.default_rng(6).normal(size=(2, 9, 5, 5))
    plain, roots = (Reference([{"y": one}], roots=flag).compare([{"y": two}]) for flag in (False, True))
    assert plain == roots
    labels = Reference([{"y": LOGITS}], roots=True)
    assert labels.kind == "kl"
    assert labels.compare([{"y": OTHER}]) == Reference([{"y": LOGITS}]).compare([{"y": OTHER}])


def test_at_a_temperature_all_classes_contribute() -> None:
    soft = Reference([{"y": LOGITS}], temperature=4.0)
    told = judge([{"y": LOGITS}])
    by_hand = Reference([{"y": LOGITS / 4}], judgements=told).compare([{"y": OTHER / 4}])
    of_logits = soft.compare([{"y": OTHER}])
    of_probabilities = Reference([{"y": softmax(LOGITS, axis=1)}], temperature=4.0).compare(
        [{"y": softmax(OTHER, axis=1)}]
    )
    assert of_logits.value == pytest.approx(by_hand.value)
    assert of_probabilities.value == pytest.approx(by_hand.value, rel=1e-3)
    assert of_logits.agreement == by_hand.agreement
    assert soft.compare([{"y": LOGITS}]).value == pytest.approx(0, abs=1e-12)


# Races


def batches(values: np.ndarray, read: list[int] | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Eight samples a batch; `read` is told of every batch that is taken."""
    for start in range(0, len(values), 8):
        if read is not None:
            read.append(start // 8)
        yield {"y": values[start : start + 8]}


@pytest.mark.parametrize("classes", [True, False])
def test_a_race_stops_early_only_if_it_is_lost(classes: bool) -> None:
    rng = np.random.default_rng(2)
    truth = rng.standard_normal((48, 6)) * (6 if classes else 1)
    noise = rng.standard_normal(truth.shape)
    reference = Reference(list(batches(truth)))
    assert reference.kind == ("kl" if classes else "error")
    best = reference.race(batches(truth + 0.3 * noise)).unopposed
    assert best.value == pytest.approx(reference.compare(list(batches(truth + 0.3 * noise))).value)
    read: list[int] = []
    better = reference.race(batches(truth + 0.25 * noise, read), best)
    assert better.standing is not None and not better.clear
    assert better.standing.value < best.value
    assert read == list(range(6))
    read.clear()
    assert reference.race(batches(truth + 0.9 * noise, read), best) == Race(None, clear=True)
    assert len(read) < 6  # lost early
    read.clear()
    late = noise.copy()
    late[:40] *= 0.9  # nearer on all batches but the last, on which it is far off
    late[40:] *= 9
    assert reference.race(batches(truth + 0.3 * late, read), best) == Race(None)
    assert read == list(range(6))


def test_a_race_is_called_only_if_the_samples_that_are_left_cannot_turn_it() -> None:
    """Of 400 races between equals half are won in the end, and nearly all of these are run to the end."""
    rng = np.random.default_rng(4)
    truth = 6 * rng.standard_normal((48, 6))
    reference = Reference(list(batches(truth)))
    best = reference.race(batches(truth + 0.5 * rng.standard_normal(truth.shape))).unopposed
    won = missed = early = 0
    for _ in range(400):
        other = truth + 0.5 * rng.standard_normal(truth.shape)
        nearer = reference.compare(list(batches(other))).value < best.value
        read: list[int] = []
        race = reference.race(batches(other, read), best)
        won += nearer
        missed += nearer and race.standing is None
        early += len(read) < 6
        assert (race.standing is None) == (race.clear or not nearer)
    assert won > 100 and early > 50
    assert missed < 0.05 * won


def test_outputs_that_cannot_be_compared_lose() -> None:
    reference = Reference(list(batches(LOGITS[:8])))
    best = reference.race(batches(LOGITS[:8])).unopposed
    assert best.value == 0
    assert reference.race(batches(LOGITS[:8, :3]), best) == Race(None, clear=True)
    assert reference.race(batches(np.full_like(LOGITS[:8], np.nan)), best) == Race(None, clear=True)
    alone = reference.race(batches(np.full_like(LOGITS[:8], np.nan))).unopposed
    assert alone.value == np.inf
    assert reference.race(batches(OTHER[:8]), alone).standing is not None


# Figures of a network


def test_outputs_that_cannot_be_compared_have_no_figures() -> None:
    labels = np.array([1, 2])
    reference = Reference([{"label": labels}])
    found = reference.figures([{"label": labels}])
    assert found == Figures(Estimate(0.0, None, None, 0), ())
    assert found.warnings == ()
    assert reference.compare([{"label": labels}]) == Divergence(0.0, "error")
    assert reference.race([{"label": labels}]) == Race(Standing(0.0))


@pytest.mark.parametrize("wrong", [0, 1, 3, 4, 5, 40])
def test_the_user_is_warned_beyond_the_threshold_of_a_kind_and_not_before(wrong: int) -> None:
    scores = 9 * np.eye(4)[np.arange(40) % 4]
    other = scores.copy()
    other[:wrong] = np.roll(scores[:wrong], 1, axis=1)
    found = Reference([{"y": scores}]).figures([{"y": other}])
    (figures,) = found.outputs
    assert figures.agreement is not None and figures.agreement.value == 1 - wrong / 40
    (kind,) = (kind for kind in KINDS if kind.name == figures.kind)
    assert bool(found.warnings) == (1 - wrong / 40 < kind.threshold)
    assert 0 < kind.threshold < 1


@pytest.mark.parametrize("share", [0.5, 0.99, 1.01, 2.0])
def test_without_an_agreement_the_distance_has_a_threshold(share: float) -> None:
    truth = np.random.default_rng(5).standard_normal((30, 2, 3, 3))
    reference = Reference([{"y": truth}])
    (kind,) = (entry.kind for entry in reference.judgements.entries)
    assert not kind.agreement
    found = reference.figures([{"y": truth * (1 + share * kind.threshold)}])
    assert found.divergence.value == pytest.approx(share * kind.threshold)
    assert bool(found.warnings) == (share > 1)
    (broken,) = reference.figures([{"y": np.full_like(truth, np.nan)}]).warnings
    assert broken == "output y contains NaN"


def test_figures_are_those_of_the_comparison() -> None:
    first, second = np.full((6, 4), 2.0), RNG.standard_normal((6, 2, 2))
    outputs = [{"a": first[:4], "b": second[:4]}, {"a": first[4:], "b": second[4:]}]
    moved = [{"a": batch["a"] * 1.5, "b": batch["b"] * 1.1} for batch in outputs]
    reference = Reference(outputs)
    found, whole = reference.figures(moved), reference.compare(moved)
    assert found.divergence.value == pytest.approx(whole.value) == pytest.approx(0.3)
    assert found.divergence.samples == len(reference) == 6
    assert whole.kind == reference.kind == "error"
    assert {figures.outputs: figures.divergence.value for figures in found.outputs} == {
        ("a",): pytest.approx(0.5), ("b",): pytest.approx(0.1)
    }  # fmt: skip
    assert reference.race(moved).unopposed.value == pytest.approx(whole.value)


def test_classes_and_numbers_together_are_mixed() -> None:
    scores, numbers = 9 * np.eye(4)[np.arange(40) % 4], RNG.standard_normal((40, 2, 3, 3))
    both = Reference([{"a": scores, "b": numbers}])
    assert both.kind == both.compare([{"a": scores, "b": numbers}]).kind == "mixed"
    assert both.agreement_name == Reference([{"a": scores}]).agreement_name != "agreement"
    assert Reference([{"b": numbers}]).agreement_name == "agreement"


def test_a_softened_reference_has_no_agreements_and_leaves_the_first_alone() -> None:
    scores = 9 * np.eye(4)[np.arange(40) % 4]
    reference = Reference([{"y": scores}])
    soft = reference.softened(4.0)
    other = [{"y": np.roll(scores, 1, axis=1)}]
    assert soft.compare(other).agreement is None
    assert reference.compare(other).agreement == 0
    assert 0 < soft.compare(other).value < reference.compare(other).value
    numbers = Reference([{"y": RNG.standard_normal((40, 2, 3, 3))}])
    assert numbers.softened(4.0).compare(numbers.outputs) == Divergence(0.0, "error")


def test_a_lost_race_needs_enough_samples_to_be_called() -> None:
    """Of a few samples the standard error is not known."""
    truth = np.random.default_rng(2).standard_normal((12, 6))
    reference = Reference([{"y": truth[place : place + 1]} for place in range(12)])
    best = reference.race([{"y": truth[place : place + 1] * 1.01} for place in range(12)]).unopposed
    read: list[int] = []

    def far() -> Iterator[dict[str, np.ndarray]]:
        for place in range(12):
            read.append(place)
            yield {"y": truth[place : place + 1] * 9}

    assert reference.race(far(), best) == Race(None, clear=True)
    assert read == list(range(8))


def test_each_batch_is_compared_with_its_own() -> None:
    truth = RNG.standard_normal((8, 6))
    reference = Reference(list(batches(truth)))
    assert reference.terms(0, {"y": truth[:8, :3]}) is None
    terms = reference.terms(0, {"y": truth})
    assert terms is not None
    np.testing.assert_array_equal(terms[0][:, 0], 0)
