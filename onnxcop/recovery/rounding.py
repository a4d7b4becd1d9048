"""Rounding of a layer's weights to steps, so that their errors cancel on the inputs that the layer sees.

Features are rounded one after another. Those that follow are corrected by what they can predict of the error, given the
second moments of the inputs (Hassibi and Stork, "Optimal Brain Surgeon", 1993; Frantar et al., "GPTQ", ICLR 2023).
"""

from __future__ import annotations

import numpy as np

from onnxcop._base.types import FloatArray

_DAMPING = 1e-2  # of the mean second moment, added to all


def rounded(weights: FloatArray, steps: FloatArray, limit: int) -> FloatArray:
    """Every weight rounded to its nearest number of steps.

    Args:
        weights: float64 [groups, features, outputs].
        steps: Sizes of steps, float64 [groups, 1, outputs].
        limit: Largest number of steps.

    Returns:
        Whole numbers of steps, in float64 and the shape of the weights.
    """
    return np.asarray(np.clip(np.rint(weights / steps), -limit, limit))


def rounded_together(weights: FloatArray, steps: FloatArray, limit: int, moments: FloatArray) -> FloatArray:
    """Weights rounded so that the errors of one output cancel.

    Args:
        weights: float64 [groups, features, outputs].
        steps: Sizes of steps, float64 [groups, 1, outputs].
        limit: Largest number of steps.
        moments: Second moments of the features, float64 [groups, features, features].

    Returns:
        Whole numbers of steps, in float64 and the shape of the weights.

    Raises:
        LinAlgError: The moments are not those of real numbers.
    """
    size = moments.shape[1]
    scale = np.trace(moments, axis1=1, axis2=2) / size
    damped = moments + (_DAMPING * np.maximum(scale, np.finfo(np.float64).tiny))[:, None, None] * np.eye(size)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).swapaxes(1, 2)  # [groups, features, features]
    left, found = weights.copy(), np.empty_like(weights)
    for place in range(size):
        found[:, place] = rounded(left[:, place], steps[:, 0], limit)
        error = (left[:, place] - found[:, place] * steps[:, 0]) / upper[:, place, place, None]
        left[:, place + 1 :] -= upper[:, place, place + 1 :, None] * error[:, None]
    return found
