"""Widths that suit a machine: which ones groups may take, that cuts keep to them, and that they are spent well."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_models import chain, finished, shapes, weights

import onnxcop
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import PruningState
from onnxcop.allocation.ladder import Channels, Ladder, channels_of
from onnxcop.allocation.limits import Limits
from onnxcop.allocation.within_time import choose_within
from onnxcop.criteria.base import PruningContext
from onnxcop.criteria.registry import criterion_named
from onnxcop.errors import BudgetError
from onnxcop.runtime.staircase import Staircase

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
WIDE = (40, 96)
AVX512 = Staircase(4, 16)


def ladder_of(model: onnx.ModelProto, staircase: Staircase = AVX512) -> Ladder:
    return Ladder.automatic(onnxcop.analyze(model, options=CPU).structure, staircase)


def l2_cut(model: onnx.ModelProto, macs: float, limits: Limits) -> dict[str, tuple[int, ...]]:
    result = onnxcop.prune(model, macs=macs, criterion="l2", recover="none", limits=limits, options=CPU)
    assert result.report.after.macs <= macs * result.report.before.macs
    return shapes(result.model)


def test_wide_groups_take_whole_blocks_and_narrow_ones_finer_widths() -> None:
    narrow, wide = ladder_of(chain(widths=WIDE)).rungs
    assert narrow.tolist() == [8, 16, 20, 24, 28, 32, 36, 40]  # less than a block leaves the blocked layout
    assert wide.tolist() == [16, 32, 48, 64, 80, 96]


def test_the_own_width_is_always_allowed_and_none_is_empty() -> None:
    rungs = ladder_of(chain(widths=(5, 63))).rungs
    assert [one.tolist()[-1] for one in rungs] == [5, 63]
    assert all((one > 0).all() for one in rungs)
    assert rungs[1].tolist()[:3] == [8, 16, 24]


def test_finer_ladders_end_with_every_width() -> None:
    ladder: Ladder | None = ladder_of(chain(widths=WIDE))
    counts = []
    while ladder is not None:
        counts.append([len(one) for one in ladder.rungs])
        last, ladder = ladder, ladder.finer
    assert counts == sorted(counts)
    assert [one.tolist() for one in last.rungs] == [list(range(1, width + 1)) for width in WIDE]


def test_a_ladder_finds_neighbouring_widths() -> None:
    ladder = ladder_of(chain(widths=WIDE))
    assert [ladder.at_most(1, kept) for kept in (3, 16, 39, 96)] == [0, 16, 32, 96]
    assert [ladder.above(1, kept) for kept in (0, 16, 39, 96)] == [16, 32, 48, 96]


@pytest.mark.parametrize("staircase", [Staircase(4, 8), AVX512, Staircase(8, 8), Staircase(8, 64)], ids=str)
def test_no_default_width_is_one_channel_short_of_a_fast_one(staircase: Staircase) -> None:
    """A width is a multiple of the finest step of the fast kernels, or the layer's own."""
    for first, second in ((16, 24), (32, 40), (64, 63), (100, 320)):
        for rungs, own in zip(ladder_of(chain(widths=(first, second)), staircase).rungs, (first, second), strict=True):
            assert len(rungs) > 1
            assert all(width % staircase.fine == 0 or width == own for width in rungs.tolist())


@pytest.mark.parametrize(("width", "step"), [(64, 16), (32, 16), (24, 8), (20, 4), (8, 4)])
def test_layers_that_a_concat_joins_leave_whole_steps_behind_it(width: int, step: int) -> None:
    model = joined(width)
    structure = onnxcop.analyze(model, options=CPU).structure
    assert all(place.joint for place in channels_of(structure))
    for rungs in Ladder.automatic(structure, AVX512).rungs:
        assert set(np.diff(rungs[rungs >= 16]).tolist()) <= {step}
        assert all(kept % step == 0 for kept in rungs.tolist())


def joined(width: int) -> onnx.ModelProto:
    """Two convolutions side by side, joined for a third."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["x", "w2"], ["b"], pads=[1] * 4),
        helper.make_node("Concat", ["a", "b"], ["c"], axis=1),
        helper.make_node("Conv", ["c", "w3"], ["y"], pads=[1] * 4),
    ]
    stored = [weights("w1", (width, 3, 3, 3)), weights("w2", (width, 3, 3, 3)), weights("w3", (4, 2 * width, 3, 3))]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n, 8, 8]) for name, n in (("x", 3), ("y", 4)))
    return finished(helper.make_graph(nodes, "joined", [x], [y], stored))


def frozen_channels() -> onnx.ModelProto:
    """A convolution of 64 channels of which the first three are given out as they are."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], "conv1", pads=[1] * 4),
        helper.make_node("Slice", ["c", "from", "to", "axis"], ["seen"], "cut"),
        helper.make_node("Conv", ["c", "w2", "b2"], ["y"], "conv2", pads=[1] * 4),
    ]
    numbers = {"from": [0], "to": [3], "axis": [1]}
    stored = [helper.make_tensor(name, TensorProto.INT64, [1], value) for name, value in numbers.items()]
    stored += [weights(name, shape) for name, shape in {
        "w1": (64, 3, 3, 3), "b1": (64,), "w2": (5, 64, 3, 3), "b2": (5,),
    }.items()]  # fmt: skip
    outputs = [(name, TensorProto.FLOAT, ["N", size, 8, 8]) for name, size in (("seen", 3), ("y", 5))]
    graph = helper.make_graph(
        nodes, "frozen", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info(*one) for one in outputs], stored,
    )  # fmt: skip
    return finished(graph)


def test_channels_that_must_stay_count_for_the_width_of_their_layer() -> None:
    structure = onnxcop.analyze(frozen_channels(), options=CPU).structure
    assert channels_of(structure) == (Channels(1, 3),)
    assert Ladder.automatic(structure, Staircase(4, 16)).rungs[0].tolist() == list(range(5, 62, 8))
    assert l2_cut(frozen_channels(), 0.8, Limits())["w1"][0] == 48


@pytest.mark.parametrize("macs", [0.9, 0.7, 0.5, 0.3])
def test_cuts_by_a_criterion_keep_to_the_ladder(macs: float) -> None:
    found = l2_cut(chain(widths=WIDE), macs, Limits())
    assert found["w1"][0] in (8, *range(16, 41, 4), 4, 12)
    assert found["w2"][0] in range(16, 97, 16) or found["w2"][0] in range(8, 97, 8)


def test_what_a_step_saved_too_much_is_given_back() -> None:
    """Whole blocks overshoot; what can be restored within the budget is."""
    analysis = onnxcop.analyze(chain(widths=WIDE), options=CPU)
    context = onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost)
    for macs in np.linspace(0.25, 0.95, 15):
        ranking = onnxcop.criterion_named("l2").rank(context)
        found = onnxcop.choose(context, ranking, Budget(macs=float(macs)), Limits()).removed
        state = PruningState(context, Limits())
        for unit in found.tolist():
            state.remove(unit)
        for group in analysis.structure.groups:
            kept = int(state.group_kept[group.index])
            more = state.ladder.above(group.index, kept) - kept
            gone = [unit for unit in group.units.tolist() if unit in set(found.tolist())][:more]
            if not more:
                continue
            for unit in gone:
                state.restore(unit)
            assert not state.meets(Budget(macs=float(macs)))
            for unit in gone:
                state.remove(unit)


def test_if_whole_blocks_cannot_meet_a_budget_finer_steps_do() -> None:
    model = chain(widths=(8, 16))
    assert min(l2_cut(model, 0.1, Limits())[name][0] for name in ("w1", "w2")) < 4
    with pytest.raises(BudgetError, match="--multiple-of"):
        l2_cut(model, 0.1, Limits(multiple_of=4))


def test_any_width_can_be_requested() -> None:
    """Without steps channels leave one by one, in the order of the criterion, until the budget holds."""
    kept = [l2_cut(chain(widths=WIDE), macs, Limits(multiple_of=1))["w2"][0] for macs in (0.9, 0.8, 0.7, 0.6)]
    assert any(width % 8 for width in kept)
    analysis = onnxcop.analyze(chain(widths=WIDE), options=CPU)
    context = PruningContext.of(analysis.model, analysis.structure, analysis.cost)
    ladder = Limits(multiple_of=1).ladder(context.structure)
    assert [rungs.tolist() for rungs in ladder.rungs] == [list(range(1, width + 1)) for width in WIDE]
    removed = choose_within(context, criterion_named("l2"), Budget(macs=0.7), Limits(multiple_of=1))
    state = PruningState(context, Limits(multiple_of=1))
    for unit in removed.tolist():
        assert not state.meets(Budget(macs=0.7))
        state.remove(unit)
    assert state.meets(Budget(macs=0.7))


def test_measured_curves_are_spent_in_steps_of_the_ladder() -> None:
    x = np.random.default_rng(0).standard_normal((48, 3, 8, 8)).astype(np.float32)
    limits = Limits()
    result = onnxcop.prune(chain(widths=WIDE), macs=0.6, data=x, limits=limits, options=CPU)
    found = shapes(result.model)
    assert result.report.after.macs <= 0.6 * result.report.before.macs
    assert found["w1"][0] % 4 == 0
    assert found["w2"][0] % 8 == 0
    assert "multiples of" in str(result)
