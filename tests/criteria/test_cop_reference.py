"""`cop-paper` against figures of the implementation that COP's authors released (made by tools/cop_reference.py)."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from paper_models import changed, reference_networks, resnet32, resnet_before_activation, weights_of
from scipy import stats

import onnxcop
from onnxcop.allocation.greedy import PruningState
from onnxcop.allocation.limits import Limits
from onnxcop.analysis.layers import layer_weights
from onnxcop.criteria.cop import Cop
from onnxcop.criteria.cop_paper import CopPaper, paper_correlation, paper_normalizer, scored_pairs
from onnxcop.criteria.registry import criterion_named

Vector = np.ndarray[Any, Any]
MEASURES = {"correlation": "pearson", "cosine": "cosine", "inner_product": "inner"}
CASES = [("vgg16", 0), ("vgg16", 1), ("vgg16", 2), ("resnet", 0), ("resnet", 1), ("mobilenet", 0), ("mobilenet", 1)]
CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


@cache
def figures() -> dict[str, Vector]:
    with np.load(Path(__file__).parent / "data" / "cop_reference.npz") as stored:
        return dict(stored)


@cache
def subject(network: str) -> onnxcop.PruningContext:
    analysis = onnxcop.analyze(reference_networks()[network], options=CPU)
    return onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost)


def part_of(head: str) -> dict[str, Vector]:
    return {key.removeprefix(head): values for key, values in figures().items() if key.startswith(head)}


def criterion_of(network: str, number: int) -> CopPaper:
    measure, normalization, *weights = figures()[f"{network}/{number}/setting"].tolist()
    alpha, beta, gamma = map(float, weights)
    return CopPaper(
        alpha=alpha, beta=beta, gamma=gamma, measure=MEASURES[measure], normalization=normalization
    )  # fmt: skip


def units_of(context: onnxcop.PruningContext, layer: str) -> Vector:
    """The units that a layer's filters are, in the order of the filters."""
    numbers = {node.name: number for number, node in enumerate(context.model.graph.node)}
    (made,) = (c for c in context.structure.coupling.findings.contractions if c.node == numbers[layer])
    assert made.produced is not None
    return context.structure.units_on(made.produced)


def test_the_networks_are_those_of_the_figures() -> None:
    for network, model in reference_networks().items():
        weights = {name: values for name, values in weights_of(model).items() if name.endswith(".w")}
        order = [n for n in weights if ".short" not in n]
        for name in [n for n in weights if ".short" in n]:  # the reference lists a projection last in its block
            order.insert(order.index(name.replace(".short", ".two")) + 1, name)
        digest = hashlib.sha256()
        for name in order:
            kernel = weights[name]
            if kernel.ndim == 4:
                kernel = kernel.transpose(2, 3, 1, 0)
                kernel = kernel.transpose(0, 1, 3, 2) if name.startswith("dw") else kernel
            else:
                kernel = kernel.T
            digest.update(np.float32(kernel).tobytes())
        assert digest.hexdigest() == str(figures()[f"{network}/sha256"]), network


@pytest.mark.parametrize(("network", "number"), CASES)
def test_correlations(network: str, number: int) -> None:
    """R after normalization, diagonal included, of every layer whose figures are stored."""
    stored = part_of(f"{network}/{number}/features/")
    assert stored or number
    context, criterion = subject(network), criterion_of(network, number)
    names = [node.name for node in context.model.graph.node]
    readers = {names[pair[0]]: pair[-1] for pairs in scored_pairs(context) for pair in pairs}
    layers = {layer.node: layer for layer in context.layers}
    compared = 0
    for layer, triangle in stored.items():
        if layer not in readers:  # a layer the reference correlates and does not score
            continue
        weights = layer_weights(context.weights, layers[readers[layer]])
        assert weights is not None
        found = paper_correlation(weights, criterion.measure)
        found = found / paper_normalizer(found, criterion.normalization)
        np.testing.assert_allclose(found[np.triu_indices(len(found))], triangle, rtol=1e-9, atol=1e-12)
        compared += 1
    assert compared >= (3 if stored else 0)


@pytest.mark.parametrize(("network", "number"), CASES)
def test_importances_and_the_order_of_removal(network: str, number: int) -> None:
    """Before anything is cut, half-way through, and filter by filter which goes next."""
    context, head = subject(network), f"{network}/{number}"
    ranking, state = criterion_of(network, number).rank(context), PruningState(context, Limits())
    layers, channels = figures()[f"{head}/layers"].tolist(), figures()[f"{head}/channels"].tolist()
    assert len(layers) > 20
    order = [int(units_of(context, layer)[channel]) for layer, channel in zip(layers, channels, strict=True)]
    for step, expected in enumerate(order):
        importance = ranking.importance(state.kept)
        for when, at in (("start", 0), ("half", len(order) // 2)):
            if step == at:
                for layer, values in part_of(f"{head}/{when}/").items():
                    units = units_of(context, layer)
                    left = state.available[units]
                    np.testing.assert_allclose(importance[units][left], values[left], rtol=0, atol=1e-9)
        assert int(np.argmin(np.where(state.available, importance, np.inf))) == expected, step
        state.remove(expected)
        ranking.remove(expected)


def test_a_stem_and_the_layer_before_the_classes_are_left_out() -> None:
    """In the usual ResNet the stem is coupled to the first stage; the reference averages second convolutions alone."""
    analysis = onnxcop.analyze(resnet32(), options=CPU)
    context = onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost)
    names = [node.name for node in context.model.graph.node]
    pairs = [[tuple(names[n] for n in pair) for pair in found] for found in scored_pairs(context)]
    stages = [found for found in pairs if len(found) > 1]
    assert stages == [
        [(f"s0b{b}.two", f"s0b{b + 1}.one") for b in range(4)] + [("s0b4.two", "s1b0.one")],
        [(f"s1b{b}.two", f"s1b{b + 1}.one") for b in range(4)] + [("s1b4.two", "s2b0.one")],
        [(f"s2b{b}.two", f"s2b{b + 1}.one") for b in range(4)],
    ]


def test_it_is_chosen_by_name_and_takes_the_numbers_of_cop() -> None:
    found = criterion_named("cop-paper", beta=3.0, gamma=0.0)
    assert isinstance(found, CopPaper)
    assert found.parameters() == {
        "alpha": 1.0, "beta": 3.0, "gamma": 0.0, "top_k": 3, "normalization": "max", "measure": "pearson",
        "unit_filters": False,
    }  # fmt: skip
    assert not isinstance(criterion_named("cop"), CopPaper)


def folded(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """Every filter of the first convolutions of a block multiplied, as a folded normalization does."""
    rng = np.random.default_rng(seed)
    kernels = {name: values for name, values in weights_of(model).items() if name.endswith((".one.w", ".two.w"))}
    scaled = {
        name.replace(".", "__"): values * np.exp(rng.standard_normal((len(values), 1, 1, 1)))
        for name, values in kernels.items()
    }
    return changed(model, **scaled)


def test_unit_filters_undo_a_folded_normalization() -> None:
    """Raw filters of about one norm: their ranking comes back, which scaling had changed."""
    plain = resnet_before_activation(widths=(16, 32, 64))
    importance = {}
    for name, model in (("plain", plain), ("folded", folded(plain, 0))):
        analysis = onnxcop.analyze(model, options=CPU)
        context = onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost)
        for unit in (False, True):
            ranking = CopPaper(unit_filters=unit).rank(context)
            importance[name, unit] = ranking.importance(context.structure.axis_sizes)[units_of(context, "s2b1.one")]
    wanted = importance["plain", False]
    assert stats.spearmanr(importance["folded", False], wanted).statistic < 0.8
    assert stats.spearmanr(importance["folded", True], wanted).statistic > 0.95
    np.testing.assert_allclose(importance["folded", True], importance["plain", True], rtol=1e-6)


def test_a_model_is_pruned_by_it(tmp_path: Path) -> None:
    model = reference_networks()["resnet"]
    result = onnxcop.prune(model, filters=0.7, criterion="cop-paper", recover="none", options=CPU)
    assert result.report.quality is not None
    onnx.checker.check_model(result.model, full_check=True)
    before = {t.name: numpy_helper.to_array(t).shape for t in model.graph.initializer}
    after = {t.name: numpy_helper.to_array(t).shape for t in result.model.graph.initializer}
    assert any(after[name] != before[name] for name in before if name in after)


@pytest.mark.parametrize("criterion", [Cop(), CopPaper()], ids=["cop", "cop-paper"])
def test_the_released_code_keeps_a_dead_channel(criterion: Cop) -> None:
    """The absolute ε makes an all-zero channel look unique; the improved rule cuts it first."""
    context = subject("vgg16")
    importance = criterion.rank(context).importance(context.structure.axis_sizes)
    units = units_of(context, "conv3_1")
    first = int(np.argmin(importance[units]))
    assert (first == 5) == (type(criterion) is Cop)
