"""Principal channels: a basis of a linear stream that concentrates the signal in few channels.

Let Σ be the covariance of a stream x. The layers that read it weigh errors by A = Σ W diag(m) Wᵀ. The singular value
decomposition A^½ Σ^½ = U S Vᵀ gives the linear map to k channels and back that loses least: the first k channels of z =
Uᵀ A^½ x, with x = A^-½ U z. These channels are uncorrelated and nested for every k, so they can be removed one after
another. The change of basis itself loses nothing: layers that make the stream write z, and layers that read it undo the
mix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import FloatArray
from onnxcop.calibration.patches import PatchStatistics, averaged
from onnxcop.reconstruction.linear_streams import Norm, Place, Stream
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.propagation import propagate_importance
from onnxcop.reconstruction.ridge import as_features, by_output, variances

_FLOOR = 1e-4  # of the largest weight and variance; directions below it are not distinguished


@dataclass(frozen=True, slots=True)
class Basis:
    """A change of basis: z = `into` x and x = `back` z, both float64 [channels, channels]."""

    into: FloatArray
    back: FloatArray


def in_principal_channels(
    network: MaskedNetwork, streams: Sequence[Stream], seen: PatchStatistics
) -> tuple[MaskedNetwork, tuple[Stream, ...]]:
    """Return an equivalent copy of a network whose streams are written in principal channels.

    Args:
        network: The network.
        streams: Its linear streams.
        seen: Second moments of the inputs of its layers.

    Returns:
        The copy, and the streams with enough statistics for a basis.
    """
    importance = propagate_importance(network, seen)
    bases = [(stream, principal_basis(network, stream, seen, importance)) for stream in streams]
    known_bases = [(stream, basis) for stream, basis in bases if basis is not None]
    rotated = network.copy()
    for stream, basis in known_bases:
        change_basis(rotated, stream, basis)
    return rotated, tuple(stream for stream, _ in known_bases)


def principal_basis(
    working: MaskedNetwork, stream: Stream, seen: PatchStatistics, importance: Mapping[int, FloatArray]
) -> Basis | None:
    """Return the basis that orders a stream's channels by their importance to the layers that read them.

    Args:
        working: The network; removed channels stay as they are.
        stream: One of its streams.
        seen: Second moments of the layers' inputs.
        importance: By node, the weight of an error in each output.

    Returns:
        The basis, or None if the stream has no statistics.
    """
    width = stream.group.width
    weight, covariance = np.zeros((width, width)), np.zeros((width, width))
    for layer in stream.layers:
        moments = seen.moments(layer)
        if moments is None:
            return None
        (weights,) = working.weights(layer)
        flat = as_features(weights, len(moments.mean))
        outputs = weights.shape[1]
        matter = importance.get(layer.node, np.ones(outputs))
        made = by_output(variances(flat, moments.covariance), outputs)
        energy = max(float(made @ matter), 1e-30)
        own = averaged(moments, width) if len(moments.mean) > width else moments
        order = np.argsort(layer.units)  # of the layer's channels, in the group's order
        by_channel = (weights * matter[None, :, None]).reshape(width, -1)
        weight += (by_channel @ weights.reshape(width, -1).T)[np.ix_(order, order)] / energy
        covariance += own.covariance[np.ix_(order, order)] / max(float(np.trace(own.covariance)), 1e-30)
    alive = np.flatnonzero(working.alive[stream.group.units])
    if len(alive) < 2:
        return None
    square = np.ix_(alive, alive)
    nested = nested_basis(weight[square], covariance[square])
    into, back = np.eye(width), np.eye(width)
    into[square], back[square] = nested.into, nested.back
    return Basis(into, back)


def nested_basis(weight: FloatArray, covariance: FloatArray) -> Basis:
    """Return the basis whose first k channels lose least for every k, given a covariance and a weighting matrix.

    In this basis both matrices are diagonal and equal, with the largest entries first.
    """
    root, inverse = _roots(weight)
    vectors, sizes, _ = np.linalg.svd(root @ _roots(covariance)[0])
    scale = np.sqrt(np.maximum(sizes, sizes[0] * _FLOOR))  # variances between those of outputs and inputs
    return Basis((vectors.T @ root) / scale[:, None], (inverse @ vectors) * scale)


def _roots(matrix: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the square root of a symmetric matrix and its inverse; small eigenvalues are raised."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.sqrt(np.maximum(values, max(float(values[-1]), 1e-30) * _FLOOR))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def change_basis(working: MaskedNetwork, stream: Stream, basis: Basis) -> None:
    """Write a stream of a network in another basis; the network's outputs stay as they are."""
    for norm in stream.norms:
        _take_over(working, norm)
    for place in stream.made:
        _mix(working, place, basis.into)
    for place in stream.read:
        _mix(working, place, basis.back.T)


def _take_over(working: MaskedNetwork, norm: Norm) -> None:
    """Fold a normalization's factors into the weights before it, so that only its shift remains."""
    scale, shift, mean, variance = (
        working.read(name).astype(np.float64) for name in (norm.scale, norm.shift, norm.mean, norm.variance)
    )
    factor = scale / np.sqrt(variance + norm.epsilon)
    for place in (norm.kernel, norm.bias):
        if place is not None:
            _mix(working, place, np.diag(factor))
    working.write(norm.shift, shift - mean * factor)
    working.write(norm.scale, np.ones_like(scale))
    working.write(norm.mean, np.zeros_like(mean))
    working.write(norm.variance, np.full_like(variance, 1.0 - norm.epsilon))


def _mix(working: MaskedNetwork, place: Place, mix: FloatArray) -> None:
    """Replace the channels of a stored tensor by linear combinations of them, `mix` [new, old]."""
    moved = np.moveaxis(working.read(place.name).astype(np.float64), place.axis, 0)
    blocks = moved.reshape(place.outer, len(mix), place.inner, -1)
    mixed = np.einsum("nc,ocir->onir", mix, blocks, optimize=True)
    working.write(place.name, np.moveaxis(mixed.reshape(moved.shape), 0, place.axis))
