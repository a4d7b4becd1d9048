"""How much each output of a layer matters to the layers after it.

An error in a layer's output is not as bad in every channel: what the next layer hardly weighs is hardly
missed, and so on to the end of the network. Errors are followed backwards as if they were independent:
of a unit's variance every layer that reads it makes so much of its own output's, by squared weights, and
an error that is so large a part of the unit's variance where it is made is as large a part of it where it
is read. What is between (activations, normalizations, depthwise kernels) need not be known for that.
This decides only between channels of one group; groups are compared by measurement.
"""

from __future__ import annotations

import numpy as np

from onnxcop._base.types import FloatArray
from onnxcop.analysis.layers import Layer
from onnxcop.calibration.patches import PatchStatistics
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.ridge import as_features, by_output, variances

_FLOOR = 1e-2  # of the mean variance of a layer's outputs, below which an output's own is not believed


def propagate_importance(working: MaskedNetwork, seen: PatchStatistics) -> dict[int, FloatArray]:
    """The weight of every output's error in the network as it is now.

    Args:
        working: The network.
        seen: Moments of what its layers sum over.

    Returns:
        By node, float64 [outputs] of mean 1.
    """
    units = np.zeros(len(working.alive))
    found: dict[int, FloatArray] = {}
    for layer in sorted(working.layers, key=lambda one: -one.node):
        moments = seen.moments(layer)
        if moments is None or layer.groups > 1 or not working.is_open(layer):
            continue
        (weights,) = working.weights(layer)
        channels, outputs, _ = weights.shape
        flat, covariance = as_features(weights, len(moments.mean)), moments.covariance
        made = by_output(variances(flat, covariance), outputs)
        found[layer.node] = _of_outputs(working, layer, made, units)
        parts = (flat**2 * np.diag(covariance)[:, None]).reshape(channels, -1, flat.shape[1]).sum(axis=1)
        lost = parts @ np.repeat(found[layer.node], flat.shape[1] // outputs)
        known = layer.units >= 0
        np.add.at(units, layer.units[known], lost[known])
    return found


def _of_outputs(working: MaskedNetwork, layer: Layer, made: FloatArray, units: FloatArray) -> FloatArray:
    """What an error of variance 1 costs in every output, from what its unit's own variance does.

    Outputs of which nothing is known count as the average; those that hardly vary are not divided by.
    """
    structure = working.analysis.structure
    label = structure.coupling.labels.get(working.model.graph.node[layer.node].input[layer.kernel.input])
    atoms = None if label is None else label[layer.kernel.out_axis]
    if atoms is None or len(atoms) != len(made):
        return np.ones(len(made))
    own = structure.units_on(atoms)
    matter = np.where(own >= 0, units[own], 0.0) / np.maximum(made, _FLOOR * made.mean() + 1e-30)
    known = matter > 0
    if not known.any():
        return np.ones(len(made))
    matter[own < 0] = matter[known].mean()
    return np.asarray(matter / matter.mean())
