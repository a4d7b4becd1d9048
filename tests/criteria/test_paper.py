"""Statements of the COP paper that can be checked without training, against a transcription of its equations.

W. Wang, C. Fu, J. Guo, D. Cai, X. He: "COP: Customized Deep Model Compression via Regularized
Correlation-Based Filter-Level Pruning", IJCAI 2019. The transcription below knows nothing of graphs:
it has the networks' layers, weights and map sizes, and the equations. FLOPs are two per
multiply-accumulate, biases count as parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
from paper_models import MOBILENET, VGG16, changed, dense_chain, mobilenet, resnet32, vgg16, weights_of
from scipy import special, stats

import onnxcop
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import choose
from onnxcop.allocation.limits import Limits
from onnxcop.criteria.cop import Cop, chance_level
from onnxcop.criteria.cop_regularization import Regularizer

Vector = np.ndarray[Any, Any]
CPU = onnxcop.EngineOptions(provider="cpu", threads=1)

ANY = Limits(multiple_of=1)  # the paper knows of no blocks


def subject_of(model: onnx.ModelProto) -> onnxcop.PruningContext:
    analysis = onnxcop.analyze(model, options=CPU)
    return onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost)


def units_made_by(context: onnxcop.PruningContext, layer: str) -> Vector:
    """The units of the dependency group that a layer's filters belong to, in the order of the filters."""
    names = [node.name for node in context.model.graph.node]
    (group,) = (g for g in context.structure.groups if layer in {names[node] for node in g.producers})
    return group.units


# The equations


@dataclass
class Network:
    """A network as the paper sees it.

    Attributes:
        weights: Kernels [Cout, Cin, …] by layer.
        positions: Height × width of every layer's output.
        nexts: For every layer that is pruned the (layer, …, next layer) that it is scored by; several
            for coupled layers, whose score is the mean. What stands between is depthwise.
        normalize: Of correlations within a layer.
        corrected: Whether what chance explains is taken off.
    """

    weights: dict[str, Vector]
    positions: dict[str, int]
    nexts: dict[str, list[tuple[str, ...]]]
    corrected: bool = False
    normalize: str = "max"
    top_k: int = 3

    def correlations(self, reader: str) -> Vector:
        """Step 2: R̃ of a layer's input channels."""
        found, scale = self.raw(reader)
        return found / scale

    def raw(self, reader: str) -> tuple[Vector, float]:
        """Step 1: R of a layer's input channels, by their outgoing weights, and what it is normalized by."""
        kernel = self.weights[reader]
        taps = kernel.reshape(*kernel.shape[:2], -1)
        found = np.mean([np.abs(np.corrcoef(taps[:, :, t].T)) for t in range(taps.shape[2])], axis=0)
        np.fill_diagonal(found, 0.0)
        return found, self.scale(found)

    def scale(self, found: Vector) -> float:
        off = found[~np.eye(len(found), dtype=bool)]
        return float({"max": off.max(), "l1": off.mean(), "l2": np.sqrt((off**2).mean())}[self.normalize])

    def chance(self, reader: str) -> float:
        """The mean of the largest |ρ| that a channel shows by chance, in the units of step 2."""
        kernel = self.weights[reader]
        outputs, channels = kernel.shape[:2]
        taps = int(np.prod(kernel.shape[2:], dtype=int))
        square = stats.beta(0.5, (outputs - 2) / 2)  # of a correlation of N values
        upper = [1 - (i + 0.5) / (channels - 1) for i in range(self.top_k)]
        if taps == 1:
            level = np.mean([np.sqrt(square.ppf(p)) for p in upper])
        else:
            mean = special.beta(1, (outputs - 2) / 2) / special.beta(0.5, (outputs - 2) / 2)
            spread = mean * (1 - mean) / ((square.mean() - mean**2) / taps) - 1
            level = np.mean([stats.beta(mean * spread, (1 - mean) * spread).ppf(p) for p in upper])
        return float(level) / self.raw(reader)[1]

    def redundancy(self, normalized: Vector, reader: str) -> Vector:
        """Step 3: the mean of the largest three."""
        top = np.sort(normalized, axis=1)[:, ::-1][:, : self.top_k].mean(axis=1)
        return top - (self.chance(reader) if self.corrected else 0.0)

    def cost(self, layer: str, into: int, out: int) -> tuple[float, float]:
        """FLOPs and parameters of a layer of the given width."""
        area = int(np.prod(self.weights[layer].shape[2:], dtype=int))
        pairs = out if layer.startswith("dw") else into * out
        return 2.0 * self.positions[layer] * area * pairs, float(area * pairs + out)

    def pair_cost(self, pair: tuple[str, ...], width: int, before: int, after: int) -> Vector:
        """Step 4: C and P of a layer of `width` filters with the next, and a depthwise layer between."""
        first, *between, last = pair
        costs = [self.cost(first, before, width), *(self.cost(d, width, width) for d in between)]
        return np.sum([*costs, self.cost(last, width, after)], axis=0)


def terms(network: Network) -> dict[str, tuple[Vector, float, float]]:
    """(1 - s, FLOPs term, parameters term) of every layer that is pruned, at the original widths.

    Step 6: coupled layers share the mean of their scores.
    """
    shape = {name: kernel.shape for name, kernel in network.weights.items()}
    costs = {
        pair: network.pair_cost(pair, shape[pair[0]][0], shape[pair[0]][1], shape[pair[-1]][0])
        for pairs in network.nexts.values()
        for pair in pairs
    }
    top_flops, top_params = (max(np.log2(cost[kind]) for cost in costs.values()) for kind in (0, 1))
    found = {}
    for layer, pairs in network.nexts.items():
        evidence = np.mean([network.redundancy(network.correlations(p[-1]), p[-1]) for p in pairs], axis=0)
        flops = float(np.mean([1 - np.log2(costs[p][0]) / top_flops for p in pairs]))
        params = float(np.mean([1 - np.log2(costs[p][1]) / top_params for p in pairs]))
        found[layer] = (1 - evidence, flops, params)
    return found


def greedy(network: Network, chain: list[str], steps: int, beta: float, gamma: float) -> list[tuple[str, int]]:
    """Step 5 on a chain of layers: the (layer, filter) removed at each step."""
    readers = dict(pairwise(chain))
    widths = {layer: len(network.weights[layer]) for layer in chain}
    tables = {layer: network.correlations(reader) for layer, reader in readers.items()}
    lost = {layer: np.zeros(widths[layer], dtype=bool) for layer in readers}
    offsets = {layer: network.chance(reader) if network.corrected else 0.0 for layer, reader in readers.items()}
    inputs = dict(((after, before) for before, after in pairwise(chain)))
    order = []
    for _ in range(steps):
        costs = {
            layer: network.pair_cost(
                (layer, reader), widths[layer], widths[inputs[layer]] if layer in inputs else 3, widths[reader]
            )
            for layer, reader in readers.items()
        }
        top = np.max([np.log2(cost) for cost in costs.values()], axis=0)
        best = (np.inf, "", -1)
        for layer in readers:
            largest = np.sort(tables[layer], axis=1)[:, -network.top_k :].mean(axis=1)
            score = 1 - (largest - offsets[layer]) + np.dot(1 - np.log2(costs[layer]) / top, (beta, gamma))
            score[lost[layer]] = np.inf
            place = int(np.argmin(score))
            best = min(best, (float(score[place]), layer, place))
        _, layer, place = best
        order.append((layer, place))
        lost[layer][place] = True
        tables[layer][place, :] = tables[layer][:, place] = 0.0
        widths[layer] -= 1
    return order


def kernels(model: onnx.ModelProto) -> dict[str, Vector]:
    return {name.removesuffix(".w"): values for name, values in weights_of(model).items() if name.endswith(".w")}


def vgg_chain() -> tuple[list[str], dict[str, int]]:
    """Names of VGG-16's layers and the side of their maps as a fraction of the image's."""
    names, shrink, block, number = [], {}, 1, 1
    for width in VGG16:
        if width:
            names.append(f"conv{block}_{number}")
            shrink[names[-1]] = 2 ** (block - 1)
        block, number = (block, number + 1) if width else (block + 1, 1)
    return [*names, "hidden", "classes"], shrink


def vgg_network(model: onnx.ModelProto, **options: Any) -> Network:
    chain, shrink = vgg_chain()
    positions = {name: (32 // by) ** 2 for name, by in shrink.items()} | {"hidden": 1, "classes": 1}
    return Network(kernels(model), positions, {a: [(a, b)] for a, b in pairwise(chain)}, **options)


def resnet_network(model: onnx.ModelProto, **options: Any) -> Network:
    weights = kernels(model)
    positions = {"stem": 32**2, "classes": 1}
    nexts: dict[str, list[tuple[str, ...]]] = {}
    for stage in range(3):
        sources = ["stem"] * (stage == 0) + [f"s{stage}b{block}.two" for block in range(5)]
        readers = [[f"s{stage}b{block}.one"] for block in range(stage > 0, 5)]
        readers.append([f"s{stage + 1}b0.one", f"s{stage + 1}b0.short"] if stage < 2 else ["classes"])
        nexts[sources[-1]] = [(s, r) for s, found in zip(sources, readers, strict=True) for r in found]
        for block in range(5):
            one, two = f"s{stage}b{block}.one", f"s{stage}b{block}.two"
            nexts[one] = [(one, two)]
            positions |= dict.fromkeys((one, two, f"s{stage}b0.short"), (32 // 2**stage) ** 2)
    return Network(weights, positions, nexts, **options)


def mobilenet_network(model: onnx.ModelProto, **options: Any) -> Network:
    side, positions, pointwise = 32, {"stem": 32**2, "classes": 1}, ["stem"]
    nexts: dict[str, list[tuple[str, ...]]] = {}
    for number, (_, stride) in enumerate(MOBILENET):
        side = -(-side // stride)
        positions |= dict.fromkeys((f"dw{number}", f"pw{number}"), side**2)
        nexts[pointwise[-1]] = [(pointwise[-1], f"dw{number}", f"pw{number}")]
        pointwise.append(f"pw{number}")
    nexts[pointwise[-1]] = [(pointwise[-1], "classes")]
    return Network(kernels(model), positions, nexts, **options)


# (a) Costs


def test_costs_of_the_papers_filters() -> None:
    """9,216 parameters hang on one filter of conv4_2 and on two of conv3_2, and 14.5 and 57.8 MFLOPs.

    Both follow from pictures of 224×224 (maps of 28×28 and 56×56) and two FLOPs per
    multiply-accumulate, in the filter's own layer and the next; the filter's bias is not in the paper's
    number: conv4_2 has 9·512 own weights and 9·512 in the next, and 2·28²·9,216 = 14,450,688.
    """
    context = subject_of(vgg16(224))
    structure, cost, regularizer = context.structure, context.cost, Regularizer.of(context)
    names = [node.name for node in context.model.graph.node]
    for layer, reader, filters, flops in (("conv4_2", "conv4_3", 1, 14.5e6), ("conv3_2", "conv3_3", 2, 57.8e6)):
        units = units_made_by(context, layer)[:filters]
        macs, params, _ = cost.original() - cost.of_units(units)
        assert params == 9216 + filters
        assert round(2 * macs / 1e6, 1) == flops / 1e6
        pair = regularizer.pairs.index((names.index(layer), names.index(reader)))
        before = np.array([kind[pair] for kind in regularizer.pair_costs(structure.axis_sizes)])
        after = np.array([kind[pair] for kind in regularizer.pair_costs(cost.kept_counts(units))])
        np.testing.assert_array_equal(before - after, [2 * macs, params])


# (b) Scores

NETWORKS = {
    "vgg16": (lambda: vgg16(divide=8), vgg_network),
    "resnet32": (resnet32, resnet_network),
    "mobilenet": (lambda: mobilenet(divide=8), mobilenet_network),
}


@pytest.mark.parametrize("corrected", [False, True], ids=["letter", "corrected"])
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_follow_the_equations(name: str, corrected: bool) -> None:
    build, describe = NETWORKS[name]
    model = build()
    context = subject_of(model)
    ranking = Cop(alpha=0.5, beta=2.0, gamma=3.0, narrow_correction=corrected).rank(context)
    kept = context.structure.axis_sizes
    found, importance = ranking.terms(kept), ranking.importance(kept)
    expected = terms(describe(model, corrected=corrected))
    assert sum(len(units_made_by(context, layer)) for layer in expected) == len(importance)
    for layer, (correlation, flops, params) in expected.items():
        units = units_made_by(context, layer)
        np.testing.assert_allclose(found["correlation"][units], correlation, rtol=0, atol=1e-9)
        np.testing.assert_allclose(found["flops"][units], flops, rtol=0, atol=1e-9)
        np.testing.assert_allclose(found["params"][units], params, rtol=0, atol=1e-9)
        total = 0.5 * correlation + 2.0 * flops + 3.0 * params
        np.testing.assert_allclose(importance[units], total, rtol=0, atol=1e-9)


@pytest.mark.parametrize("how", ["l1", "l2"])
def test_other_normalizations(how: str) -> None:
    model = vgg16(divide=8)
    context = subject_of(model)
    ranking = Cop(normalization=how, narrow_correction=False).rank(context)
    found = ranking.terms(context.structure.axis_sizes)["correlation"]
    for layer, (correlation, _, _) in terms(vgg_network(model, normalize=how)).items():
        np.testing.assert_allclose(found[units_made_by(context, layer)], correlation, rtol=0, atol=1e-9)


def test_scores_do_not_depend_on_the_order_of_parallel_layers() -> None:
    """A projection may stand before or after the convolutions beside it."""
    scores = []
    for last in (False, True):
        context = subject_of(resnet32(shortcut_last=last))
        importance = Cop().rank(context).importance(context.structure.axis_sizes)
        scores.append([importance[units_made_by(context, f"s{stage}b1.two")] for stage in range(3)])
    for first, second in zip(*scores, strict=True):
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-12)


# (c) The choice


@pytest.mark.parametrize("corrected", [False, True], ids=["letter", "corrected"])
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (3.0, 0.0), (0.0, 3.0)])
def test_the_same_filters_are_removed_in_the_same_order(beta: float, gamma: float, corrected: bool) -> None:
    model = vgg16(divide=8)
    context = subject_of(model)
    criterion = Cop(beta=beta, gamma=gamma, narrow_correction=corrected)
    removed = choose(context, criterion.rank(context), Budget(filters=0.8), ANY).removed.tolist()
    assert len(removed) > 100
    chain, _ = vgg_chain()
    order = greedy(vgg_network(model, corrected=corrected), chain, len(removed), beta, gamma)
    assert [int(units_made_by(context, layer)[place]) for layer, place in order] == removed


# (d) Preference


def test_beta_spares_flops_and_gamma_parameters() -> None:
    """The direction of the paper's table 4: the same number of filters, chosen for FLOPs or for parameters."""
    context = subject_of(vgg16(divide=4))
    for filters in (0.7, 0.35):
        faster, smaller = (
            choose(context, Cop(beta=beta, gamma=gamma).rank(context), Budget(filters=filters), ANY)
            for beta, gamma in ((3.0, 0.0), (0.0, 3.0))
        )
        assert len(faster.removed) == len(smaller.removed) > 0
        assert faster.cost[0] < smaller.cost[0]
        assert smaller.cost[1] < faster.cost[1]


# (e) Traps


def test_a_dead_channel_is_removed_first() -> None:
    model = vgg16(divide=8)
    kernel = kernels(model)["conv3_2"]
    kernel[:, 5] = 0.0
    context = subject_of(changed(model, conv3_2__w=kernel))
    (first, *_) = choose(context, Cop().rank(context), Budget(filters=0.99), ANY).removed.tolist()
    assert first == units_made_by(context, "conv3_1")[5]


@pytest.mark.parametrize("size", [1e-14, 1e-8, 1e-6], ids=str)
def test_nearly_dead_channels_are_removed_first(size: float) -> None:
    """What weight decay leaves of a filter's readers: noise that looks like nothing else."""
    model, planted = vgg16(divide=4), [5, 17, 30]
    kernel = kernels(model)["conv4_2"]
    rng = np.random.default_rng(1)
    kernel[:, planted] = size * 0.05 * rng.standard_normal(kernel[:, planted].shape)
    context = subject_of(changed(model, conv4_2__w=kernel))
    removed = choose(context, Cop().rank(context), Budget(filters=0.99), ANY).removed.tolist()
    assert set(removed[:3]) == set(units_made_by(context, "conv4_1")[planted].tolist())


def test_a_nearly_dead_channel_is_no_evidence() -> None:
    """It may copy another, which is not redundant for that."""
    model, scores = vgg16(divide=4), []
    kernel = kernels(model)["conv4_2"]
    for like in (3, 4):
        kernel[:, 5] = 1e-9 * kernel[:, like]
        context = subject_of(changed(model, conv4_2__w=kernel))
        units = units_made_by(context, "conv4_1")
        scores.append(Cop().rank(context).importance(context.structure.axis_sizes)[units])
    np.testing.assert_array_equal(scores[0], scores[1])


@pytest.mark.parametrize("corrected", [False, True], ids=["letter", "corrected"])
def test_one_of_two_twins_stays(corrected: bool) -> None:
    """Once the first is gone nothing speaks against the second."""
    model = vgg16(divide=4)
    kernel = kernels(model)["conv4_3"]
    kernel[:, 7] = kernel[:, 90]
    context = subject_of(changed(model, conv4_3__w=kernel))
    criterion, only = Cop(narrow_correction=corrected), Limits(only=("conv4_2",), multiple_of=1)
    units = units_made_by(context, "conv4_2")
    scores = criterion.rank(context).importance(context.structure.axis_sizes)
    twins = set(units[np.argsort(scores[units])[:2]].tolist())
    assert twins == set(units[[7, 90]].tolist())
    removed = choose(context, criterion.rank(context), Budget(filters=0.95), only).removed.tolist()
    assert len(removed) > 40
    assert removed[0] in twins
    assert not twins & set(removed[1:40])


def test_a_layer_before_ten_classes_is_not_favoured() -> None:
    """Weights have nothing to do with one another, so every layer should give its share."""
    shares = {}
    for corrected in (False, True):
        gone = np.zeros(3)
        for seed in range(3):
            context = subject_of(dense_chain((256, 256, 256, 256, 10), seed))
            criterion = Cop(beta=0.0, gamma=0.0, narrow_correction=corrected)
            removed = choose(context, criterion.rank(context), Budget(filters=0.7), ANY).removed
            gone += np.bincount(context.structure.group_of[removed], minlength=3)
        assert context.structure.groups[2].units.tolist() == units_made_by(context, "fc2").tolist()
        shares[corrected] = gone[2] / gone.sum()
    assert shares[False] > 0.6  # the paper's rule takes most from the layer before the classes
    assert 0.25 < shares[True] < 0.42


@pytest.mark.parametrize(("outputs", "taps", "channels"), [(10, 1, 128), (10, 9, 128), (64, 1, 64), (32, 9, 32)])
def test_chance_level_is_what_unrelated_weights_reach(outputs: int, taps: int, channels: int) -> None:
    rng = np.random.default_rng(3)
    reached = []
    for _ in range(4):
        draw = rng.standard_normal((taps, channels, outputs))
        table = np.mean([np.abs(np.corrcoef(rows)) for rows in draw], axis=0)
        np.fill_diagonal(table, 0.0)
        reached.append(np.sort(table, axis=1)[:, -3:].mean())
    level = chance_level(outputs - 1, taps, channels - 1, 3)
    assert level == pytest.approx(np.mean(reached), rel=0.03)
