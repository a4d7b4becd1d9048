"""Every criterion: statistics, finite and repeatable scores, and the channel that should go first."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from paper_models import changed, dense_chain, weights_of
from small_models import chain

import onnxcop
from onnxcop.analysis.layers import layers_of
from onnxcop.calibration.calibrate import calibrate
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.criteria import registry
from onnxcop.criteria.base import Criterion
from onnxcop.criteria.multiple_correlation import Multiple
from onnxcop.criteria.registry import CRITERIA, criterion_named
from onnxcop.data.open import input_specs, open_source
from onnxcop.errors import BudgetError, CalibrationError

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
Values = np.ndarray[Any, Any]


def seen(analysis: onnxcop.Analysis, x: Values) -> CalibrationStats:
    """Statistics over all positions of given samples."""
    feeds = [{"x": x[i : i + 1]} for i in range(len(x))]
    source = open_source(
        feeds, input_specs(analysis), samples=len(x), batch_size=1, seed=0, input_shapes=analysis.input_shapes
    )
    layers = layers_of(analysis.model, analysis.structure)
    return calibrate(analysis.model, layers, source, CPU, sha=analysis.sha256, positions=None)


def subject_of(model: onnx.ModelProto, x: Values | None = None, seed: int = 0) -> onnxcop.PruningContext:
    analysis = onnxcop.analyze(model, options=CPU)
    stats = None if x is None else seen(analysis, x)
    return onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost, stats, seed)


def pictures(count: int = 24) -> Values:
    return np.random.default_rng(5).standard_normal((count, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def context() -> onnxcop.PruningContext:
    return subject_of(chain(), pictures())


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_finite_and_repeatable(name: str, context: onnxcop.PruningContext) -> None:
    kept = context.structure.axis_sizes
    first, second = (criterion_named(name).rank(context) for _ in range(2))
    scores = first.importance(kept)
    assert scores.shape == context.structure.unit_class.shape == (24,)
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 1
    np.testing.assert_array_equal(scores, second.importance(kept))
    for part in first.terms(kept).values():
        assert part.shape == scores.shape
        assert np.isfinite(part).all()
    after = kept - context.structure.incidence[[3], :].toarray()[0]
    for ranking in (first, second):
        ranking.remove(3)
    others = np.arange(24) != 3
    assert np.isfinite(first.importance(after)[others]).all()
    np.testing.assert_array_equal(first.importance(after), second.importance(after))


def planted() -> tuple[onnx.ModelProto, dict[str, int]]:
    """A network with a channel of the first layer for every criterion to find, and which it is.

    Channel 2 has hardly any weights, incoming or outgoing; 4 is channel 6 once more, in what it computes
    and in what is made of it; 9 is the mean of all filters.
    """
    model = chain(widths=(12, 16))
    stored = weights_of(model)
    first, bias, second = stored["w1"], stored["b1"], stored["w2"]
    first[2] *= 1e-4
    bias[:] = 0.3  # every channel is at work
    bias[2] = 3e-5
    second[:, 2] *= 1e-4
    first[4], second[:, 4] = first[6], second[:, 6]
    others = [i for i in range(12) if i not in (2, 9)]
    first[9] = first[others].mean(axis=0)
    return changed(model, w1=first, b1=bias, w2=second), {"weak": 2, "twin": 4, "other twin": 6, "median": 9}


FINDS = {
    "cop": ("twin", "other twin"), "cop-paper": ("twin", "other twin"), "cop-activation": ("twin", "other twin"),
    "cop-multiple": ("weak", "twin", "other twin"), "l1": ("weak",), "l2": ("weak",), "fpgm": ("median", "weak"),
    "wanda": ("weak",),
}  # fmt: skip


@pytest.mark.parametrize("name", FINDS)
def test_planted_channels_are_removed_first(name: str) -> None:
    model, places = planted()
    context = subject_of(model, pictures())
    (group,) = (g for g in context.structure.groups if g.width == 12)
    scores = CRITERIA[name].rank(context).importance(context.structure.axis_sizes)[group.units]
    found = set(np.argsort(scores)[: len(FINDS[name])].tolist())
    assert found == {places[which] for which in FINDS[name]}


@pytest.mark.parametrize(("name", "order"), [("l1", 1), ("l2", 2)])
def test_what_no_layer_makes_is_scored_by_the_weights_that_read_it(name: str, order: int) -> None:
    """Frequencies of an encoding: stored, but not the filters of any layer."""
    read = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Mul", ["x", "frequencies"], ["angles"]),
        onnx.helper.make_node("Sin", ["angles"], ["features"]),
        onnx.helper.make_node("MatMul", ["features", "w"], ["y"]),
    ]
    stored = {"frequencies": np.arange(1, 7, dtype=np.float32), "w": read}
    graph = onnx.helper.make_graph(
        nodes, "encoding",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 9])],
        [numpy_helper.from_array(values, key) for key, values in stored.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    context = subject_of(model)
    (group,) = context.structure.groups
    scores = CRITERIA[name].rank(context).importance(context.structure.axis_sizes)[group.units]
    norms = np.linalg.norm(read, order, axis=1)
    np.testing.assert_allclose(scores, norms / norms.mean(), rtol=1e-5)


def test_every_criterion_is_tried() -> None:
    assert {*FINDS, "random"} == set(CRITERIA)


def test_random_follows_its_seed() -> None:
    scores = [CRITERIA["random"].rank(subject_of(chain(), seed=seed)).importance(np.empty(0)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).all()


@pytest.mark.parametrize("name", CRITERIA)
def test_the_equation_and_the_source_are_documented(name: str) -> None:
    text = inspect.getdoc(type(CRITERIA[name])) or ""
    assert re.search(r"[=Σ‖~]", text), "no equation"
    assert name == "random" or re.search(r"\b(19|20)\d\d\b", text), "no source"


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
def test_what_needs_data_says_so(criterion: Criterion) -> None:
    bare = subject_of(chain())
    if criterion.needs_stats:
        with pytest.raises(CalibrationError, match=rf"{criterion.name} needs calibration data; give --data"):
            criterion.rank(bare)
    else:
        assert np.isfinite(criterion.rank(bare).importance(bare.structure.axis_sizes)).all()


def test_unknown_criterion() -> None:
    with pytest.raises(BudgetError, match=r"unknown criterion 'best'; choose one of cop, cop-activation, cop-paper"):
        criterion_named("best")


@pytest.mark.parametrize("name", CRITERIA)
def test_parameters_that_a_criterion_does_not_have_are_an_error(name: str) -> None:
    with pytest.raises(BudgetError, match=f"criterion {name} has no parameter 'nonsense'; it has "):
        criterion_named(name, nonsense=3)
    found = criterion_named(name)
    assert criterion_named(name, **found.parameters()) == found


def test_summaries_name_the_criteria_of_their_modules() -> None:
    for name in CRITERIA:
        assert CRITERIA[name].name == name
    modules = {import_module(module) for module, _ in registry._modules().values()}
    assert sorted(entry.name for module in modules for entry in module.CRITERIA) == sorted(registry._modules())


# cop-multiple against regression


def lost(features: Values, outputs: Values, gone: list[int]) -> float:
    """Error of the best linear prediction of the outputs without some features, over their variance."""
    rest = np.delete(features, gone, axis=1)
    design = np.column_stack([rest, np.ones(len(rest))])
    fitted = design @ np.linalg.lstsq(design, outputs, rcond=None)[0]
    return float(((outputs - fitted) ** 2).sum() / ((outputs - outputs.mean(axis=0)) ** 2).sum())


def test_multiple_is_the_error_of_regression() -> None:
    """A channel's importance is what its reader's output loses after refitting on all other channels."""
    x = np.random.default_rng(8).standard_normal((200, 6)).astype(np.float32)
    model = dense_chain((6, 10, 4), seed=2)
    analysis = onnxcop.analyze(model, options=CPU)
    context = onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost, seen(analysis, x))
    ranking = Multiple(ridge=1e-9, per_cost=False).rank(context)
    kept = context.structure.axis_sizes
    stored = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    features = np.maximum(x @ stored["fc0.w"].T + stored["fc0.b"], 0.0)
    outputs = features @ stored["fc1.w"].T
    expected = [lost(features, outputs, [channel]) for channel in range(10)]
    np.testing.assert_allclose(ranking.importance(kept), expected, rtol=1e-4)
    ranking.remove(4)
    once = lost(features, outputs, [4])
    for channel in (0, 3, 9):
        more = lost(features, outputs, [4, channel]) - once
        assert ranking.importance(kept)[channel] == pytest.approx(more, rel=1e-4)
    ranking.remove(9)
    more = lost(features, outputs, [4, 9, 0]) - lost(features, outputs, [4, 9])
    assert ranking.importance(kept)[0] == pytest.approx(more, rel=1e-4)


def test_multiple_divides_by_what_is_saved(context: onnxcop.PruningContext) -> None:
    kept = context.structure.axis_sizes
    plain = Multiple(per_cost=False).rank(context).importance(kept)
    priced = Multiple().rank(context).importance(kept)
    total = context.cost.original()[0]
    for group in context.structure.groups:
        saved = (total - context.cost.of_units(group.units[:1])[0]) / total
        np.testing.assert_allclose(priced[group.units], plain[group.units] / saved, rtol=1e-9)
