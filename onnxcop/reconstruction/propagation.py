"""Importance of each layer output to the rest of the network, propagated backwards (cf. NISP, Yu et al. 2018).

Errors in different channels of a layer's output do different harm, because later layers weigh the channels differently.
Errors are propagated backwards as if they were independent. Each layer attributes the variance of its output to its
input units by squared weights. An error keeps its share of a unit's variance from the place where the unit is made to
the place where it is read, so operators in between (activations, normalizations, depthwise kernels) need no rule.

This compares only channels of one group; groups are compared by measurement.
"""

from __future__ import annotations

import numpy as np

from onnxcop._base.types import FloatArray
from onnxcop.analysis.layers import Layer
from onnxcop.calibration.patches import PatchStatistics
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.ridge import as_features, by_output, variances

_FLOOR = 1e-2  # of the mean variance of a layer's outputs; an output's own variance below it is not trusted


def propagate_importance(working: MaskedNetwork, seen: PatchStatistics) -> dict[int, FloatArray]:
    """Compute the weight of every output's error in the current network.

    Args:
        working: The network.
        seen: Second moments of the layers' inputs.

    Returns:
        By node, float64 [outputs] of mean 1.
    """
    units = np.zeros(len(working.alive))
    importance: dict[int, FloatArray] = {}
    for layer in sorted(working.layers, key=lambda one: -one.node):
        moments = seen.moments(layer)
        if moments is None or layer.groups > 1 or not working.is_open(layer):
            continue
        (weights,) = working.weights(layer)
        channels, outputs, _ = weights.shape
        flat, covariance = as_features(weights, len(moments.mean)), moments.covariance
        made = by_output(variances(flat, covariance), outputs)
        importance[layer.node] = _of_outputs(working, layer, made, units)
        parts = (flat**2 * np.diag(covariance)[:, None]).reshape(channels, -1, flat.shape[1]).sum(axis=1)
        lost = parts @ np.repeat(importance[layer.node], flat.shape[1] // outputs)
        known = layer.units >= 0
        np.add.at(units, layer.units[known], lost[known])
    return importance


def _of_outputs(working: MaskedNetwork, layer: Layer, made: FloatArray, units: FloatArray) -> FloatArray:
    """Return the cost of an error of variance 1 in every output, from the cost of its unit's own variance.

    Outputs without statistics count as the average; outputs of nearly no variance are not divided by it.
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
