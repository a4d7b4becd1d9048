"""Decisions: budgets and limits that hold, and plans that say what was decided."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import chain, shapes, written

from onnxcop.allocation.budget import Budget
from onnxcop.allocation.limits import Limits
from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.coupling.groups import Structure
from onnxcop.errors import BudgetError, PlanMismatchError
from onnxcop.pipeline.prune import PruneResult, apply_plan, prune
from onnxcop.report.summary import GroupReport
from onnxcop.rewrite.plan import Cut, PruningPlan, units_of
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions(provider="cpu", threads=1)
DIGITS = Path(__file__).resolve().parents[2] / "models" / "digits_resnet.onnx"


def cut(model: onnx.ModelProto | Path, limits: Limits | None = None, **budget: float) -> PruneResult:
    """Prune by criterion alone, which is quick, and without provenance, which takes bytes of its own."""
    size = budget.pop("size", None)
    return prune(
        model, limits=limits or Limits(), options=CPU, recover="none", criterion="cop",
        size=None if size is None else int(size), metadata=False, **budget,
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> Analysis:
    return analyze(DIGITS, options=CPU)


@pytest.fixture(scope="module")
def result() -> PruneResult:
    return cut(DIGITS, macs=0.7)


def kept(result: PruneResult) -> dict[str, float]:
    """The remaining share, by the name of its budget."""
    report = result.report
    gone = sum(group.filters * (group.width - group.kept) for group in report.groups)
    prunable = sum(group.filters * group.width for group in report.groups)
    return {
        "macs": report.after.macs / report.before.macs,
        "params": report.after.params / report.before.params,
        "filters": 1 - gone / prunable,
        "size": float(report.after.bytes),
    }


def largest_steps(analysis: Analysis) -> dict[str, float]:
    """The most that one unit can save, by the name of the budget: as long as nothing is cut yet."""
    cost, groups = analysis.cost, analysis.structure.groups
    saved = np.max([cost.original() - cost.of_units(g.units[:1]) for g in groups], axis=0)
    macs, params, size = saved
    before = cost.original()
    return {
        "macs": macs / before[0],
        "params": params / before[1],
        "size": size,
        "filters": 3 / 420,
    }


# Budgets


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("macs", 0.9), ("macs", 0.7), ("macs", 0.31), ("params", 0.8), ("params", 0.4),
        ("filters", 0.85), ("filters", 0.5), ("size", 300_000), ("size", 150_000),
    ],
)  # fmt: skip
def test_lands_within_one_step_below_the_budget(digits: Analysis, name: str, bound: float) -> None:
    found = kept(cut(DIGITS, Limits(multiple_of=1), **{name: bound}))
    assert found[name] <= bound
    assert found[name] > bound - largest_steps(digits)[name]


def test_the_default_budget_is_70_percent_of_the_macs(result: PruneResult) -> None:
    assert cut(DIGITS).plan.cuts == result.plan.cuts


def test_counts_of_the_report_are_those_of_the_file(result: PruneResult, digits: Analysis) -> None:
    report = result.report
    assert report.after.bytes == len(result.model.SerializeToString())
    assert report.after.params == sum(int(np.prod(s)) for s in shapes(result.model).values())
    again = analyze(result.model, options=CPU)
    assert again.cost.original()[0] == report.after.macs
    assert digits.cost.original()[0] == report.before.macs == 928_992


def test_all_of_several_budgets_hold() -> None:
    bounds = {"macs": 0.8, "params": 0.7, "filters": 0.9, "size": 250_000}
    found = kept(cut(DIGITS, Limits(multiple_of=1), **bounds))
    assert all(found[name] <= bound for name, bound in bounds.items())
    alone = [kept(cut(DIGITS, Limits(multiple_of=1), **{name: bound})) for name, bound in bounds.items()]
    assert found in alone  # the units go in the same order, until the last of the budgets holds
    assert any(one[name] > bound for one in alone for name, bound in bounds.items())


def test_the_strictest_of_several_budgets_decides() -> None:
    assert cut(DIGITS, macs=0.5, params=0.99).plan.cuts == cut(DIGITS, macs=0.5).plan.cuts
    assert cut(DIGITS, macs=0.99, params=0.5).plan.cuts == cut(DIGITS, params=0.5).plan.cuts


def test_a_budget_that_holds_already_changes_nothing() -> None:
    found = cut(DIGITS, macs=1.0)
    assert found.plan.cuts == ()
    assert found.model.SerializeToString() == onnx.load(DIGITS).SerializeToString()


@pytest.mark.parametrize(
    ("name", "bound", "limits"),
    [
        ("macs", 0.001, Limits()),
        ("params", 0.0001, Limits()),
        ("filters", 0.01, Limits()),
        ("size", 5_000, Limits()),
        ("macs", 0.3, Limits(max_cut=0.25)),
        ("params", 0.3, Limits(min_filters=20)),
        ("macs", 0.5, Limits(keep=("/blocks/blocks.[012]*",))),
        ("filters", 0.5, Limits(only=("/stem/Conv",))),
        ("size", 60_000, Limits(multiple_of=16)),
    ],
)
def test_an_infeasible_budget_names_the_nearest_that_works(name: str, bound: float, limits: Limits) -> None:
    with pytest.raises(BudgetError) as caught:
        cut(DIGITS, limits, **{name: bound})
    nearest = caught.value.nearest
    assert nearest is not None
    assert nearest > bound
    assert f"{nearest:.0f} bytes" in str(caught.value) or f"--{name} {nearest:g}" in str(caught.value)
    found = cut(DIGITS, limits, **{name: nearest})
    assert kept(found)[name] <= nearest
    slightly_less = nearest - 1 if name == "size" else nearest - 2e-4
    with pytest.raises(BudgetError):
        cut(DIGITS, limits, **{name: slightly_less})


@pytest.mark.parametrize(
    "budget",
    [{"macs": 0.0}, {"macs": 1.5}, {"params": -1.0}, {"filters": 70.0}, {"size": 0}],
)
def test_senseless_budgets_are_refused(budget: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match=f"--{next(iter(budget))}"):
        Budget(**budget)  # type: ignore[arg-type]


# Limits


def groups_of(result: PruneResult) -> dict[str, GroupReport]:
    return {layer: group for group in result.report.groups for layer in group.layers}


def test_min_filters() -> None:
    found = cut(DIGITS, Limits(min_filters=9, multiple_of=1), macs=0.4)
    widths = [group.kept for group in found.report.groups]
    assert min(widths) == 9
    assert min(group.kept for group in cut(DIGITS, macs=0.4).report.groups) < 9


def test_max_cut() -> None:
    found = cut(DIGITS, Limits(max_cut=0.4), macs=0.65)
    shares = [1 - group.kept / group.width for group in found.report.groups]
    assert max(shares) <= 0.4
    assert max(1 - g.kept / g.width for g in cut(DIGITS, macs=0.65).report.groups) > 0.4


def test_max_cut_of_nothing() -> None:
    with pytest.raises(BudgetError) as caught:
        cut(DIGITS, Limits(max_cut=0.0), macs=0.9)
    assert caught.value.nearest == 1


@pytest.mark.parametrize("multiple", [4, 8])
def test_multiple_of(multiple: int) -> None:
    found = cut(DIGITS, Limits(multiple_of=multiple), macs=0.7)
    assert kept(found)["macs"] <= 0.7
    changed = [group.kept for group in found.report.groups if group.kept < group.width]
    assert changed
    assert all(width % multiple == 0 for width in changed)


@pytest.mark.parametrize(
    ("pattern", "untouched"),
    [
        ("/blocks/blocks.4/conv1/Conv", ["/blocks/blocks.4/conv1/Conv"]),
        ("/stem/*", ["/stem/Conv", "/blocks/blocks.0/conv2/Conv", "/blocks/blocks.1/conv2/Conv"]),
        ("*conv1*", [f"/blocks/blocks.{n}/conv1/Conv" for n in range(6)]),
    ],
)
def test_keep(pattern: str, untouched: list[str]) -> None:
    found = groups_of(cut(DIGITS, Limits(keep=(pattern,)), macs=0.8))
    assert all(found[name].kept == found[name].width for name in untouched)
    assert any(group.kept < group.width for group in found.values())


def test_keep_by_tensor() -> None:
    model = onnx.load(DIGITS)
    layer = next(node for node in model.graph.node if node.name == "/blocks/blocks.5/conv1/Conv")
    for tensor in (layer.output[0], layer.input[2]):
        group = groups_of(cut(DIGITS, Limits(keep=(tensor,)), macs=0.7))[layer.name]
        assert group.kept == group.width
    # Its weights stand on both of its axes, what flows in and what flows out.
    found = groups_of(cut(DIGITS, Limits(keep=(layer.input[1],)), macs=0.7))
    for name in (layer.name, "/blocks/blocks.4/conv2/Conv"):
        assert found[name].kept == found[name].width


def test_only() -> None:
    found = cut(DIGITS, Limits(only=("*conv1*",)), macs=0.7)
    for group in found.report.groups:
        assert (group.kept == group.width) or all("conv1" in layer for layer in group.layers)
    assert kept(found)["macs"] <= 0.7


def test_keep_outranks_only() -> None:
    limits = Limits(only=("*conv1*",), keep=("/blocks/blocks.[0-3]*",))
    found = cut(DIGITS, limits, macs=0.85)
    changed = {layer for g in found.report.groups if g.kept < g.width for layer in g.layers}
    assert changed
    assert changed <= {"/blocks/blocks.4/conv1/Conv", "/blocks/blocks.5/conv1/Conv"}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_filters": 0}, "--min-filters"),
        ({"multiple_of": -1}, "--multiple-of"),
        ({"max_cut": 1.5}, "--max-cut"),
        ({"max_cut": -0.5}, "--max-cut"),
    ],
)
def test_senseless_limits_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Limits(**limits)  # type: ignore[arg-type]


# Plans


def test_a_plan_survives_its_file(result: PruneResult, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    result.plan.save(path)
    loaded = PruningPlan.load(path)
    assert loaded.to_json() == result.plan.to_json()
    assert loaded.cuts == result.plan.cuts
    again = apply_plan(DIGITS, loaded, options=CPU, metadata=False)
    assert again.model.SerializeToString() == result.model.SerializeToString()
    assert again.report.after == result.report.after


def test_a_plan_says_what_was_decided_and_how(result: PruneResult, digits: Analysis) -> None:
    document = json.loads(result.plan.to_json())
    assert document["format"] == "onnxcop-plan"
    assert document["version"] == 1
    assert document["model_sha256"] == digits.sha256
    assert document["budget"] == {"macs": 0.7}
    assert document["criterion"]["name"] == "cop"
    assert document["criterion"]["alpha"] == 1.0
    assert document["settings"]["limits"]["min_filters"] == 1
    assert document["settings"]["seed"] == 0
    before, after = shapes(onnx.load(DIGITS)), shapes(result.model)
    for entry in document["removed"]:
        name, axis, gone = entry["tensor"], entry["axis"], entry["indices"]
        assert len(set(gone)) == len(gone) > 0
        assert max(gone) < before[name][axis]
        assert after[name][axis] == before[name][axis] - len(gone)


def test_units_of_a_plan_are_those_removed(result: PruneResult, digits: Analysis) -> None:
    units = units_of(digits, result.plan)
    structure: Structure = digits.structure
    gone = np.bincount(structure.group_of[units], minlength=len(structure.groups))
    assert [g.width - g.kept for g in result.report.groups] == gone.tolist()


def test_a_model_keeps_its_identity_with_its_weights_outside(tmp_path: Path) -> None:
    from onnxcop.graph import io as models

    model = chain(widths=(16, 32))
    models.save(model, tmp_path / "a.onnx", external_data=True)
    plan = cut(written(model, tmp_path / "b.onnx"), macs=0.6).plan
    assert apply_plan(tmp_path / "a.onnx", plan, options=CPU).report.after.macs > 0


@pytest.mark.parametrize("change", ["weight", "node", "shape", "opset"])
def test_a_plan_is_refused_on_another_model(change: str) -> None:
    model = chain()
    plan = cut(model, macs=0.7).plan
    if change == "weight":
        tensor = model.graph.initializer[0]
        tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
    elif change == "node":
        model.graph.node[1].op_type = "Sigmoid"
    elif change == "shape":
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    else:
        model.opset_import[0].version = 16
    with pytest.raises(PlanMismatchError, match="made for another model"):
        apply_plan(model, plan, options=CPU)


def test_a_plan_is_not_tied_to_documentation() -> None:
    model = chain()
    plan = cut(model, macs=0.7).plan
    model.producer_name, model.doc_string = "someone else", "the same network"
    assert apply_plan(model, plan, options=CPU).plan == plan


@pytest.mark.parametrize(
    "wrong",
    [
        Cut("w1", 0, (99,)), Cut("w1", 0, (-1,)), Cut("w1", 7, (0,)), Cut("nothing", 0, (0,)),
        Cut("w3", 0, (1,)), Cut("b3", 0, (1,)), Cut("w1", 1, (0,)),
    ],
    ids=lambda cut: f"{cut.tensor}-{cut.axis}-{cut.indices[0]}",
)  # fmt: skip
def test_a_plan_that_removes_frozen_units_is_refused(wrong: Cut) -> None:
    model = chain()
    plan = cut(model, macs=0.7).plan
    with pytest.raises(PlanMismatchError, match=repr(wrong.tensor)):
        apply_plan(model, replace(plan, cuts=(*plan.cuts, wrong)), options=CPU)


def test_a_plan_that_empties_a_layer_is_refused() -> None:
    model = chain()
    plan = replace(cut(model, macs=0.7).plan, cuts=(Cut("w1", 0, tuple(range(8))),))
    with pytest.raises(PlanMismatchError, match="leaves nothing"):
        apply_plan(model, plan, options=CPU)


def test_a_plan_keeps_the_shapes_and_the_policy_of_its_analysis(tmp_path: Path) -> None:
    model = chain()
    found = prune(
        model, macs=0.7, input_shapes={"x": (2, 3, 8, 8)}, policy="coarsest", options=CPU,
        recover="none", seed=5,
    )  # fmt: skip
    path = tmp_path / "plan.json"
    found.plan.save(path)
    loaded = PruningPlan.load(path)
    assert loaded.input_shapes["x"] == (2, 3, 8, 8)
    assert loaded.policy == "coarsest"
    assert loaded.settings["seed"] == 5


def test_random_choices_follow_the_seed() -> None:
    def cuts(seed: int) -> tuple[Cut, ...]:
        return prune(DIGITS, criterion="random", recover="none", seed=seed, options=CPU).plan.cuts

    assert cuts(1) == cuts(1)
    assert cuts(1) != cuts(2)


def test_a_plan_names_the_weights_that_make_a_filter() -> None:
    named = {(entry.tensor, entry.axis) for entry in cut(chain(), macs=0.6).plan.cuts}
    assert named and named <= {("w1", 0), ("w2", 0)}  # and not the biases b1 and b2
