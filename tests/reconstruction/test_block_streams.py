"""Heads written in bases of their own: found by structure, computing the same, and losing least."""

from __future__ import annotations

import numpy as np
import pytest
from ops.oracle import CPU
from test_transformers import WRITTEN_OUT
from transformer_models import bert

import onnxcop
from onnxcop._base.types import Feed
from onnxcop.calibration.calibrate import calibrate
from onnxcop.calibration.patches import PatchStatistics
from onnxcop.data.synthetic import synthetic_data
from onnxcop.reconstruction.block_bases import in_block_bases, watched
from onnxcop.reconstruction.block_streams import BlockStream, block_streams
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.products import losses_for, products
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.session import Session

# By model: the number of blocks of every group that may be mixed, and whether a product sums over it.
FOUND = {
    "bert": [(4, True), (4, False), (4, True), (4, False)],
    "vit, split": [(6, True), (6, True)],  # queries with their keys, and values with what reads them
    "vit, sliced": [(3, True), (3, False), (3, True), (3, False)],
    "grouped, expanded": [(2, True), (2, False)],
    "grouped, tiled": [(2, True), (2, False)],
    "rotary": [(4, False)],  # pairs that turn may not be mixed with others
    "segformer": [(2, True), (2, False)],
    "edgenext": [],  # softmax over channels
}


def network(name: str, policy: str = "finest") -> MaskedNetwork:
    return MaskedNetwork.of(onnxcop.analyze(WRITTEN_OUT[name][0](), options=CPU, biases=True, policy=policy))


def seen(working: MaskedNetwork, streams: list[BlockStream]) -> PatchStatistics:
    factors = [layer for product in products(working) for layer in product.watched]
    data = synthetic_data(working.analysis, 24, 8, 0)
    layers = [*working.layers, *factors, *watched(streams, working)]
    return PatchStatistics(calibrate(working.model, layers, data, CPU, sha=working.analysis.sha256, positions=64), {})


def outputs(working: MaskedNetwork, feeds: Feed) -> Feed:
    return Session(working.masked(), CPU).run(feeds)


@pytest.mark.parametrize("name", sorted(FOUND))
def test_heads_are_found_by_structure(name: str) -> None:
    streams = list(block_streams(network(name)))
    assert [(len(s.blocks), any(b.product for b in s.blocks)) for s in streams] == FOUND[name]


@pytest.mark.parametrize("name", sorted(WRITTEN_OUT))
def test_whole_heads_are_not_mixed(name: str) -> None:
    assert list(block_streams(network(name, "coarsest"))) == []


@pytest.mark.parametrize("name", sorted(name for name, found in FOUND.items() if found))
def test_the_network_computes_the_same_in_other_bases(name: str) -> None:
    working = network(name)
    streams = list(block_streams(working))
    changed, done = in_block_bases(working, streams, seen(working, streams))
    assert len(done) == len(streams)
    assert changed.model != working.model
    feeds = random_feeds(working.model, working.analysis.input_shapes, 3)
    expected, found = outputs(working, feeds), outputs(changed, feeds)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=0, atol=1e-4 * np.abs(values).max())


def test_leading_dimensions_carry_the_product() -> None:
    working = network("bert")
    streams = list(block_streams(working))
    changed, _ = in_block_bases(working, streams, seen(working, streams))
    moments = seen(changed, streams)
    for stream in streams:
        if not stream.blocks[0].product:
            continue
        (loss,) = losses_for(changed, moments, stream.group, streams)
        costs = loss.costs()[np.argsort(loss.units)]
        assert (np.diff(costs) <= 1e-3 * costs[0]).all()
        assert costs[0] > 3 * costs[-1]


def test_queries_and_keys_in_nested_bases_lose_less_than_stored_ones() -> None:
    analysis = onnxcop.analyze(bert(), options=CPU, biases=True)
    working = MaskedNetwork.of(analysis)
    streams = [stream for stream in block_streams(working) if stream.blocks[0].product]
    moments = seen(working, streams)
    changed, _ = in_block_bases(working, streams, moments)
    feeds = random_feeds(analysis.model, {name: (64, *shape[1:]) for name, shape in analysis.input_shapes.items()}, 3)
    (name,) = (value.name for value in analysis.model.graph.output)
    expected = outputs(working, feeds)[name]

    def error(network: MaskedNetwork) -> float:
        from_here = losses_for(network, seen(network, streams), streams[0].group, streams)[0]
        order = from_here.units[np.argsort(from_here.costs())]
        with network.without(order[: len(order) // 2]):
            return float(np.linalg.norm(outputs(network, feeds)[name] - expected))

    assert 0 < error(changed) < 0.8 * error(working)
