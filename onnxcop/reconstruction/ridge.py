"""Closed-form compensation for removed channels: the others predict their contribution by ridge regression.

With input channels of covariance Σ, kept ones K and removed ones R, the consumer's weights become W_K + (Σ_KK + λD)⁻¹
Σ_KR W_R. The mean loss of its output is added to its bias.
"""

from __future__ import annotations

import numpy as np

from onnxcop._base.types import BoolArray, FloatArray, IntArray
from onnxcop.calibration.statistics import Moments

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # λ, relative to the variance of every feature
_LEAST = 1e-3  # of the mean variance; smaller variances of features are raised to it
_BLOCK = 128  # rows of a matrix
_JUDGES = 512  # sums over a layer's inputs that suffice to choose its λ


def features_of(channels: IntArray, block: int) -> IntArray:
    """The features of channels, channel by channel."""
    return np.asarray((channels[:, None] * block + np.arange(block)).ravel())


def as_features(weights: FloatArray, features: int) -> FloatArray:
    """Weights [channels, outputs, taps] as [features, rest]: by channel, or by tap of every channel."""
    if features == len(weights):
        return weights.reshape(features, -1)
    return weights.transpose(0, 2, 1).reshape(features, -1)


def as_weights(flat: FloatArray, like: FloatArray) -> FloatArray:
    """Inverse of :func:`as_features`, in the shape of `like` [channels, outputs, taps]."""
    if len(flat) == len(like):
        return flat.reshape(like.shape)
    channels, outputs, taps = like.shape
    return flat.reshape(channels, taps, outputs).transpose(0, 2, 1)


def mean_output(flat: FloatArray, mean: FloatArray, outputs: int) -> FloatArray:
    """The contribution of features [features, rest] of a given mean to the mean of every output, float64 [outputs]."""
    return by_output(mean @ flat, outputs)


def by_output(values: FloatArray, outputs: int) -> FloatArray:
    """Sums of the columns that belong to the same output, float64 [outputs] of [outputs × taps]."""
    return np.asarray(values.reshape(outputs, -1).sum(axis=1))


def variances(flat: FloatArray, covariance: FloatArray) -> FloatArray:
    """The variance of every sum of features [features, sums] of a given covariance, float64 [sums]."""
    return np.asarray((flat * (covariance @ flat)).sum(axis=0))


def regularized(covariance: FloatArray, ridge: float) -> FloatArray:
    """Σ + λ D, with the features' variances in D: ridge regression on features of unit variance.

    Variances far below the mean are raised a little, so that features that hardly vary stay regularized.
    """
    own = np.diagonal(covariance)
    floor = max(_LEAST * float(own.mean()) if len(own) else 0.0, 1e-12)
    loaded = np.array(covariance, order="F")  # as LAPACK takes it: it factorizes in place, since matrices are large
    loaded[np.diag_indices(len(own))] += ridge * np.maximum(own, floor)
    return loaded


def regularized_inverse(covariance: FloatArray, ridge: float) -> FloatArray:
    """(Σ + λD)⁻¹, by Cholesky factorization if it is definite."""
    from scipy.linalg.lapack import dpotrf, dpotri

    factor, failed = dpotrf(regularized(covariance, ridge), lower=1, overwrite_a=1)
    inverse, failed = (factor, failed) if failed else dpotri(factor, lower=1, overwrite_c=1)
    return np.asarray(np.linalg.pinv(regularized(covariance, ridge))) if failed else _mirrored(inverse)


def _mirrored(lower: FloatArray) -> FloatArray:
    """The symmetric matrix with this lower triangle, in place and by blocks, since matrices are large."""
    for start in range(0, len(lower), _BLOCK):
        stop = start + _BLOCK
        corner = np.tril(lower[start:stop, start:stop])
        lower[start:stop, start:stop] = corner + np.tril(corner, -1).T
        lower[start:stop, stop:] = lower[stop:, start:stop].T
    return lower


def regularized_solve(covariance: FloatArray, ridge: float, right: FloatArray) -> FloatArray:
    """(Σ + λD)⁻¹ times a matrix [features, sums], without the inverse if Σ + λD is definite."""
    from scipy.linalg.lapack import dpotrf, dpotrs

    factor, failed = dpotrf(regularized(covariance, ridge), lower=1, overwrite_a=1)
    solved, failed = (factor, failed) if failed else dpotrs(factor, right, lower=1)
    return np.asarray(np.linalg.pinv(regularized(covariance, ridge)) @ right if failed else solved)


def compensated(
    weights: FloatArray, moments: Moments, ridge: float, keep: IntArray, removed: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Merge removed channels into kept ones in closed form.

    W'_K = W_K + Bᵀ W_R with B = Σ_RK (Σ_KK + λD)⁻¹. The change of the output's mean goes to the bias.

    Args:
        weights: float64 [channels, outputs, taps].
        moments: Of the input channels, or of their patches.
        ridge: λ relative to the variance of every feature.
        keep: Channels that stay.
        removed: Channels that are removed.

    Returns:
        New weights (zero for `gone`), and the change of the bias, float64 [outputs].
    """
    covariance, flat = moments.covariance, as_features(weights, len(moments.mean))
    block = len(flat) // len(weights)
    kept, lost = (features_of(np.sort(c), block) for c in (keep, removed))
    shared = covariance[np.ix_(kept, lost)] @ flat[lost]
    merged = np.zeros_like(flat)
    if len(kept):
        merged[kept] = flat[kept] + regularized_solve(covariance[np.ix_(kept, kept)], ridge, shared)
    return as_weights(merged, weights), mean_output(flat - merged, moments.mean, weights.shape[1])


def merge_channels(
    weights: FloatArray, moments: Moments | None, ridge: float, alive: BoolArray, removed: BoolArray
) -> tuple[FloatArray, FloatArray]:
    """Remove channels of a layer; those that stay in the same group compensate for them.

    Args:
        weights: float64 [groups, channels, outputs, taps].
        moments: Of the channels of all groups, or of their patches; None to keep the other weights unchanged.
        ridge: λ relative to the variance of every feature.
        alive: bool [groups × channels], those that stay.
        removed: bool [groups × channels], those that are removed now.

    Returns:
        New weights, zero for removed channels, and the change of the bias, float64 [groups × outputs].
    """
    groups, width, outputs, _ = weights.shape
    result, change = np.zeros_like(weights), np.zeros((groups, outputs))
    for group, own in enumerate(np.arange(groups * width).reshape(groups, width)):
        keep, lost = np.flatnonzero(alive[own]), np.flatnonzero(removed[own])
        if moments is None or not len(lost):
            result[group, keep] = weights[group, keep]
            continue
        part = moments if groups == 1 else Moments(moments.count, moments.mean[own], moments.scatter[np.ix_(own, own)])
        result[group], change[group] = compensated(weights[group], part, ridge, keep, lost)
    return result, change.reshape(-1)


def best_ridge(weights: FloatArray, fit: Moments, held_out: Moments, keep: IntArray, removed: IntArray) -> float:
    """The λ of the merge with the smallest error on held-out samples; on some of the outputs if there are many."""
    weights = weights[:, :: -(-weights[0].size // _JUDGES)]
    changes = (weights - compensated(weights, fit, ridge, keep, removed)[0] for ridge in RIDGES)
    covariance = held_out.covariance
    errors = [float(variances(as_features(change, len(held_out.mean)), covariance).sum()) for change in changes]
    return RIDGES[int(np.argmin(errors))]
