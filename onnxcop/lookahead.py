"""How much each output of a layer matters to the layers after it.

An error in a layer's output is not as bad in every channel: what the next layer hardly weighs is hardly
missed, and so on to the end of the network. Errors are followed backwards through squared weights, as if
they were independent and no activation stood between: a unit matters by what it adds to the error of
every layer that reads it. This decides only between channels of one group; groups are compared by
measurement.
"""

from __future__ import annotations

import numpy as np

from onnxcop.arrays import FloatArray
from onnxcop.layers import Layer
from onnxcop.working import Working


def output_importance(working: Working) -> dict[int, FloatArray]:
    """The weight of every output's error in the network as it stands: by node, float64 [outputs] of mean 1."""
    units = np.zeros(len(working.alive))
    found: dict[int, FloatArray] = {}
    for layer in sorted(working.layers, key=lambda one: -one.node):
        if not working.is_open(layer):
            continue
        weights = working.weights(layer)
        found[layer.node] = _of_outputs(working, layer, weights.shape[1], units)
        lost = np.einsum("cot,o->c", weights**2, found[layer.node])
        known = layer.units >= 0
        np.add.at(units, layer.units[known], lost[known])
    return found


def _of_outputs(working: Working, layer: Layer, outputs: int, units: FloatArray) -> FloatArray:
    """What is known of the units that a layer's outputs belong to; others count as the average."""
    structure = working.analysis.structure
    label = structure.coupling.labels.get(working.model.graph.node[layer.node].input[layer.kernel.input])
    atoms = None if label is None else label[layer.kernel.out_axis]
    if atoms is None or len(atoms) != outputs:
        return np.ones(outputs)
    own = structure.units_on(atoms)
    matter = np.where(own >= 0, units[own], 0.0)
    known = matter > 0
    if not known.any():
        return np.ones(outputs)
    matter[own < 0] = matter[known].mean()
    return np.asarray(matter / matter.mean())
