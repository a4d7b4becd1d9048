"""Patches that the graph unfolds, against patches extracted with numpy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_models import chain, finished, weights

from onnxcop._base.types import FloatArray
from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.analysis.layers import Layer, layers_of
from onnxcop.calibration.calibrate import calibrate
from onnxcop.calibration.patches import PatchStatistics, unfolded
from onnxcop.calibration.statistics import Moments
from onnxcop.data.open import input_specs, open_source
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions(provider="cpu", threads=1)
SIZE = 9


def one_layer(kernel: tuple[int, int], strides: list[int], pads: list[int], dilations: list[int]) -> onnx.ModelProto:
    """A pointwise convolution, whose output another convolution of any geometry reads."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], "first"),
        helper.make_node("Conv", ["c1", "w2"], ["c2"], "second", strides=strides, pads=pads, dilations=dilations),
        helper.make_node("GlobalAveragePool", ["c2"], ["y"], "pool"),
    ]
    graph = helper.make_graph(
        nodes, "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6, 1, 1])],
        [weights("w1", (4, 3, 1, 1)), weights("w2", (6, 4, *kernel))],
    )  # fmt: skip
    return finished(graph)


def observed(analysis: Analysis, pictures: np.ndarray) -> tuple[PatchStatistics, list[Layer]]:
    working = MaskedNetwork.of(analysis)
    layers = layers_of(analysis.model, analysis.structure)
    model, patches = unfolded(analysis.model, layers, working.partition.shapes)
    data = open_source({"x": pictures}, input_specs(analysis), samples=len(pictures), batch_size=4, seed=0)
    taps = [patches.get(layer.node, layer) for layer in layers]
    return PatchStatistics(calibrate(model, taps, data, CPU, sha=analysis.sha256, positions=None), patches), layers


def by_hand(
    maps: FloatArray, kernel: tuple[int, int], strides: list[int], pads: list[int], dilations: list[int]
) -> Moments:
    """Moments of the patches [channels × taps] at every place of maps [N, C, H, W]."""
    padded = np.pad(maps, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    rows = []
    for top in range(0, padded.shape[2] - reach[0] + 1, strides[0]):
        for left in range(0, padded.shape[3] - reach[1] + 1, strides[1]):
            window = padded[:, :, top : top + reach[0] : dilations[0], left : left + reach[1] : dilations[1]]
            rows.append(window.reshape(len(maps), -1))
    x = np.concatenate(rows)
    centred = x - x.mean(axis=0)
    return Moments(len(x), x.mean(axis=0), centred.T @ centred)


@pytest.mark.parametrize(
    ("kernel", "strides", "pads", "dilations"),
    [
        ((3, 3), [1, 1], [1, 1, 1, 1], [1, 1]),
        ((3, 2), [2, 1], [0, 1, 2, 0], [1, 1]),
        ((1, 3), [1, 2], [0, 0, 0, 0], [1, 3]),
    ],
)
def test_patches_are_those_the_convolution_sums_over(
    kernel: tuple[int, int], strides: list[int], pads: list[int], dilations: list[int]
) -> None:
    analysis = analyze(one_layer(kernel, strides, pads, dilations), options=CPU)
    pictures = np.random.default_rng(0).standard_normal((6, 3, SIZE, SIZE)).astype(np.float32)
    seen, layers = observed(analysis, pictures)
    first = onnx.numpy_helper.to_array(analysis.model.graph.initializer[0]).astype(np.float64)
    maps = np.einsum("oc,nchw->nohw", first[:, :, 0, 0], pictures.astype(np.float64))
    expected = by_hand(maps, kernel, strides, pads, dilations)
    found = seen.moments(next(layer for layer in layers if layer.tensor == "c1"))
    assert found is not None and found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.scatter, expected.scatter, rtol=1e-4, atol=1e-4)


def test_channels_are_the_average_over_taps() -> None:
    analysis = analyze(one_layer((3, 3), [1, 1], [1, 1, 1, 1], [1, 1]), options=CPU)
    pictures = np.random.default_rng(1).standard_normal((6, 3, SIZE, SIZE)).astype(np.float32)
    seen, layers = observed(analysis, pictures)
    layer = next(layer for layer in layers if layer.tensor == "c1")
    whole, channels = seen.moments(layer), seen.by_channel(layers).moments(layer)
    assert whole is not None and channels is not None
    taps = whole.covariance.reshape(4, 9, 4, 9)
    np.testing.assert_allclose(channels.covariance, sum(taps[:, t, :, t] for t in range(9)) / 9)
    np.testing.assert_allclose(channels.mean, whole.mean.reshape(4, 9).mean(axis=1))


def test_only_kernels_of_several_taps_are_unfolded_and_none_too_wide() -> None:
    analysis = analyze(chain(), options=CPU)
    layers = layers_of(analysis.model, analysis.structure)
    shapes = MaskedNetwork.of(analysis).partition.shapes
    model, patches = unfolded(analysis.model, layers, shapes)
    assert [analysis.model.graph.node[node].name for node in patches] == ["conv2"]
    assert len(model.graph.node) == len(analysis.model.graph.node) + 1
    same, none = unfolded(analysis.model, layers, shapes, widest=8 * 9 - 1)
    assert not none and len(same.graph.node) == len(analysis.model.graph.node)
