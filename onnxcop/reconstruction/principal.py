"""Principal channels: a basis of a linear stream in which few channels carry what matters.

A stream x of covariance Σ is read by layers whose output errors weigh what A = Σ W diag(m) Wᵀ says. Of
all linear maps to k channels and back, the one that loses least follows from the singular value
decomposition A^½ Σ^½ = U S Vᵀ: the first k of z = Uᵀ A^½ x, and x = A^-½ U z. The channels of z are
uncorrelated and nested, whatever k, so that they can be removed one after another. Until then nothing is
lost: layers that make the stream write z, and those that read it undo the mix.
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

_FLOOR = 1e-4  # of the largest weight and variance, below which directions are not distinguished


@dataclass(frozen=True, slots=True)
class Basis:
    """A change of basis: z = `into` x and x = `back` z, both float64 [channels, channels]."""

    into: FloatArray
    back: FloatArray


def in_principal_channels(
    network: MaskedNetwork, streams: Sequence[Stream], seen: PatchStatistics
) -> tuple[MaskedNetwork, tuple[Stream, ...]]:
    """A copy of a network that computes the same, with streams written in principal channels.

    Args:
        network: The network.
        streams: Linear streams of it.
        seen: Moments of what its layers sum over.

    Returns:
        The copy, and those streams of which enough is known.
    """
    importance = propagate_importance(network, seen)
    bases = [(stream, principal_basis(network, stream, seen, importance)) for stream in streams]
    found = [(stream, basis) for stream, basis in bases if basis is not None]
    rotated = network.copy()
    for stream, basis in found:
        change_basis(rotated, stream, basis)
    return rotated, tuple(stream for stream, _ in found)


def principal_basis(
    working: MaskedNetwork, stream: Stream, seen: PatchStatistics, importance: Mapping[int, FloatArray]
) -> Basis | None:
    """The basis in which a stream's channels are ordered by what the layers that read them lose.

    Args:
        working: The network; removed channels stay as they are.
        stream: One of its streams.
        seen: Moments of what the layers sum over.
        importance: By node, what an error in each output counts.

    Returns:
        The basis, or None where nothing is known of the stream.
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
    """The basis whose first channels lose least, whatever their number, of x with a covariance, weighed by a matrix.

    In it both matrices are diagonal and the same, the largest entries first.
    """
    root, inverse = _roots(weight)
    vectors, sizes, _ = np.linalg.svd(root @ _roots(covariance)[0])
    scale = np.sqrt(np.maximum(sizes, sizes[0] * _FLOOR))  # variances between those of outputs and inputs
    return Basis((vectors.T @ root) / scale[:, None], (inverse @ vectors) * scale)


def _roots(matrix: FloatArray) -> tuple[FloatArray, FloatArray]:
    """A symmetric matrix's square root and that root's inverse, small eigenvalues raised."""
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
    """Put a normalization's factors into the weights before it, so that only its shift is left."""
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
    """Replace the channels of a stored tensor by mixes of them, `mix` [new, old]."""
    moved = np.moveaxis(working.read(place.name).astype(np.float64), place.axis, 0)
    blocks = moved.reshape(place.outer, len(mix), place.inner, -1)
    mixed = np.einsum("nc,ocir->onir", mix, blocks, optimize=True)
    working.write(place.name, np.moveaxis(mixed.reshape(moved.shape), 0, place.axis))
