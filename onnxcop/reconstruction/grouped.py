"""Merging in grouped convolutions, where channels can be made up for by those of their own group alone."""

from __future__ import annotations

import numpy as np

from onnxcop._base.types import BoolArray, IntArray
from onnxcop.analysis.layers import Layer
from onnxcop.calibration.patches import PatchStatistics
from onnxcop.calibration.statistics import Moments
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.ridge import compensated


def merge_groups(
    working: MaskedNetwork, layer: Layer, fit: PatchStatistics, ridge: float, alive: BoolArray, gone: IntArray
) -> bool:
    """Merge stripes of a grouped convolution, every group for itself; whether that was possible."""
    moments, kernel = fit.moments(layer), layer.kernel
    name = working.weight_name(layer.node, kernel.input)
    if moments is None or name is None or kernel.kind != "conv" or kernel.zero is not None:
        return False
    values = working.read(name)
    groups, width = layer.groups, layer.channels // layer.groups
    split = values.astype(np.float64).reshape(groups, values.shape[0] // groups, width, -1)
    bias_change = np.zeros(split.shape[:2])
    lost_mask = np.zeros(layer.channels, dtype=np.bool_)
    lost_mask[gone] = True
    for group in range(groups):
        own = slice(group * width, (group + 1) * width)
        keep, dead = np.flatnonzero(alive[own]), np.flatnonzero(lost_mask[own])
        if not len(keep) or not len(dead):
            continue
        part = Moments(moments.count, moments.mean[own], moments.scatter[own, own])
        new, lost = compensated(split[group].transpose(1, 0, 2), part, ridge, keep, dead)
        split[group], bias_change[group] = new.transpose(1, 0, 2), lost
    working.write(name, split.reshape(values.shape))
    bias = working.bias_name(layer.node, "conv", kernel.bias)
    if bias is not None:
        old = working.read(bias)
        working.write(bias, old.astype(np.float64) + bias_change.reshape(old.shape))
    return True
