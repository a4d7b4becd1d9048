"""Least squares of a layer from sums over rows, so that no row has to be stored.

For input rows a and the residual r of a layer's output, only Σa, Σr, Σaaᵀ, Σarᵀ and Σr² are accumulated. The
regression, its error on other rows, and means and deviations of the output under any weights follow from them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import Array, BoolArray, FloatArray

_BLOCK = 1 << 15  # numbers that are added at once
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_LEAST = 1e-3  # of the mean variance; smaller variances of inputs are raised to it
_STEADY = 1e-10  # variance over squared mean; below it an output is constant up to rounding


@dataclass(frozen=True, slots=True)
class BatchSums:
    """Sums over the rows of a batch, about their means.

    Attributes:
        count: Rows, at least one.
        inputs: float64 [groups, features], the mean of a.
        missing: float64 [groups, outputs], the mean of r.
        gram: [groups, features, features], Σ(a - mean)(a - mean)ᵀ, in the precision of the data.
        cross: [groups, features, outputs], Σ(a - mean)(r - mean)ᵀ, likewise.
        squares: float64 [groups, outputs], Σ(r - mean)².
    """

    count: int
    inputs: FloatArray
    missing: FloatArray
    gram: Array
    cross: Array
    squares: FloatArray

    @classmethod
    def of(cls, inputs: FloatArray, missing: FloatArray, *, single: bool) -> BatchSums:
        """Sum over rows; arguments as of :meth:`RowSums.add`."""
        mean_a, mean_r = inputs.mean(axis=0), missing.mean(axis=0)
        kind = np.dtype(np.float32 if single else np.float64)
        a: Array = np.ascontiguousarray((inputs - mean_a).transpose(1, 0, 2), kind)
        r: Array = np.ascontiguousarray((missing - mean_r).transpose(1, 0, 2), kind)
        turned = a.transpose(0, 2, 1)
        squares = (r.astype(np.float64) ** 2).sum(axis=1)
        return cls(
            count=len(inputs), inputs=mean_a, missing=mean_r, gram=turned @ a, cross=turned @ r, squares=squares
        )  # fmt: skip


@dataclass
class RowSums:
    """Sums over rows in double precision; each batch is centred on its mean and summed in its own precision.

    Attributes:
        count: Rows.
        inputs: float64 [groups, features], Σa.
        missing: float64 [groups, outputs], Σr.
        gram: float64 [groups, features, features], Σaaᵀ.
        cross: float64 [groups, features, outputs], Σarᵀ.
        squares: float64 [groups, outputs], Σr².
    """

    count: int
    inputs: FloatArray
    missing: FloatArray
    gram: FloatArray
    cross: FloatArray
    squares: FloatArray

    @classmethod
    def empty(cls, groups: int, features: int, outputs: int) -> RowSums:
        """Sums over no rows."""
        return cls(
            count=0, inputs=np.zeros((groups, features)), missing=np.zeros((groups, outputs)),
            gram=np.zeros((groups, features, features)), cross=np.zeros((groups, features, outputs)),
            squares=np.zeros((groups, outputs)),
        )  # fmt: skip

    def add(self, inputs: FloatArray, missing: FloatArray, *, single: bool) -> None:
        """Add rows.

        Args:
            inputs: a, float64 [rows, groups, features].
            missing: r, float64 [rows, groups, outputs].
            single: Whether products may be taken in single precision, that of the data.
        """
        if len(inputs):
            self.include(BatchSums.of(inputs, missing, single=single))

    def include(self, batch: BatchSums) -> None:
        """Add the rows of a batch from its sums; the order of batches decides the rounding."""
        rows, mean_a, mean_r = batch.count, batch.inputs, batch.missing
        self.count += rows
        self.inputs += rows * mean_a
        self.missing += rows * mean_r
        _add_products(self.gram, batch.gram, rows * mean_a, mean_a)
        _add_products(self.cross, batch.cross, rows * mean_a, mean_r)
        self.squares += batch.squares + rows * mean_r**2

    def absorb(self, other: RowSums) -> None:
        """Add the rows of other sums."""
        self.count += other.count
        self.inputs += other.inputs
        self.missing += other.missing
        self.gram += other.gram
        self.cross += other.cross
        self.squares += other.squares

    def centred(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Covariances of inputs, of inputs with what is missing, and variances of what is missing."""
        mean_a, mean_r = self.inputs / self.count, self.missing / self.count
        gram = self.gram / self.count - mean_a[:, :, None] * mean_a[:, None, :]
        cross = self.cross / self.count - mean_a[:, :, None] * mean_r[:, None, :]
        return gram, cross, self.squares / self.count - mean_r**2

    def error(self, change: FloatArray, shift: FloatArray, counted: BoolArray) -> float:
        """Σ(r - a·change - shift)² over rows and the selected outputs.

        Args:
            change: Of the weights, float64 [groups, features, outputs].
            shift: Of the bias, float64 [groups, outputs].
            counted: bool [groups, outputs].
        """
        moved = np.einsum("gf,gfo->go", self.inputs, change)
        total = self.squares - 2 * np.einsum("gfo,gfo->go", self.cross, change)
        total += np.einsum("gfo,gfo->go", self.gram @ change, change)
        total += 2 * shift * (moved - self.missing) + self.count * shift**2
        return float(total[counted].sum())


def _add_products(total: FloatArray, centred: Array, left: FloatArray, right: FloatArray) -> None:
    """Add products about means, and those of the means, in blocks that stay in the cache of the processor.

    Args:
        total: float64 [groups, a, b], added to.
        centred: [groups, a, b].
        left: float64 [groups, a].
        right: float64 [groups, b].
    """
    groups, rows, columns = total.shape
    several = max(1, _BLOCK // max(1, rows * columns))
    step = max(1, _BLOCK // max(1, columns))
    for first, row in itertools.product(range(0, groups, several), range(0, rows, step)):
        place = slice(first, first + several), slice(row, row + step)
        own = total[place]
        own += centred[place]
        own += left[place][:, :, None] * right[place[0]][:, None]


@dataclass(frozen=True, slots=True)
class FittedLayer:
    """The weights of a layer, as regression needs them.

    Attributes:
        weights: float64 [groups, features, outputs].
        bias: float64 [groups, outputs], None if it has none.
        features: float64 [groups, features], 1 for features that remain, else 0.
        outputs: bool [groups, outputs], which are there.
    """

    weights: FloatArray
    bias: FloatArray | None
    features: FloatArray
    outputs: BoolArray

    def missing(self, inputs: FloatArray, outputs: FloatArray) -> FloatArray:
        """What the layer's outputs lack, float64 [rows, groups, outputs], for inputs [rows, groups, features]."""
        missing = outputs - (inputs.transpose(1, 0, 2) @ self.weights).transpose(1, 0, 2)
        return missing if self.bias is None else missing - self.bias


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """A change of a layer by ridge regression.

    Attributes:
        ridge: λ, relative to the variance of every input.
        change: Of the weights, float64 [groups, features, outputs].
        shift: Of the bias, float64 [groups, outputs].
    """

    ridge: float
    change: FloatArray
    shift: FloatArray


@dataclass(frozen=True, slots=True)
class _Equations:
    """Normal equations of the change of a layer's weights, without features that are gone.

    Attributes:
        gram: float64 [groups, features, features].
        cross: float64 [groups, features, outputs].
        inputs: float64 [groups, features], means; zero if the layer has no bias.
        missing: float64 [groups, outputs], likewise.
        sizes: float64 [groups, features], variances of the inputs, those far below their mean raised to a part of it.
        there: float64 [groups, features, 1], 1 for features that remain, else 0.
    """

    gram: FloatArray
    cross: FloatArray
    inputs: FloatArray
    missing: FloatArray
    sizes: FloatArray
    there: FloatArray

    @classmethod
    def of(cls, layer: FittedLayer, fit: RowSums) -> _Equations:
        if layer.bias is None:
            gram, cross = fit.gram / fit.count, fit.cross / fit.count
            inputs, missing = np.zeros_like(fit.inputs), np.zeros_like(fit.missing)
        else:
            gram, cross, _ = fit.centred()
            inputs, missing = fit.inputs / fit.count, fit.missing / fit.count
        there = layer.features[:, :, None]
        gram = gram * (there * layer.features[:, None])
        own = np.einsum("gff->gf", gram)
        mean = own.sum(axis=1, keepdims=True) / np.maximum(layer.features.sum(axis=1, keepdims=True), 1)
        sizes = np.maximum(own, np.maximum(_LEAST * mean, 1e-12))
        return cls(gram=gram, cross=cross * there, inputs=inputs, missing=missing, sizes=sizes, there=there)

    def solved(self, ridge: float) -> RidgeFit | None:
        """The solution; None if sums in single precision of nearly dependent inputs allow none."""
        loaded = self.gram.copy()
        np.einsum("gff->gf", loaded)[...] += ridge * self.sizes
        try:
            change = _positive_solve(loaded, self.cross) * self.there
        except np.linalg.LinAlgError:
            return None
        return RidgeFit(ridge, change, self.missing - np.einsum("gf,gfo->go", self.inputs, change))


def solve(layer: FittedLayer, fit: RowSums, hold: RowSums) -> RidgeFit | None:
    """Ridge regression of the change of weights, per group, with λ chosen on held-out rows.

    Args:
        layer: The layer.
        fit: Rows to fit on.
        hold: Others, to choose λ on.

    Returns:
        The change, or None if none comes nearer on the held-out rows.
    """
    equations = _Equations.of(layer, fit)
    best: tuple[float, RidgeFit] | None = None
    for ridge in RIDGES:
        found = equations.solved(ridge)
        if found is None:
            continue
        error = hold.error(found.change, found.shift, layer.outputs)
        if best is not None and error > best[0]:
            break  # past the minimum: more regularization only approaches no change
        best = (error, found)
    before = float(hold.squares[layer.outputs].sum())
    return None if best is None or best[0] >= before else best[1]


def solve_with(layer: FittedLayer, fit: RowSums, ridge: float) -> RidgeFit | None:
    """Ridge regression of the change of weights with a known λ; None if it has no solution."""
    return _Equations.of(layer, fit).solved(ridge)


def matched_moments(layer: FittedLayer, bias: FloatArray, fit: RowSums) -> tuple[FloatArray, FloatArray]:
    """Scale and shift every output to the target mean and deviation.

    This re-estimates normalization statistics and folds them into the weights, as in REPAIR (Jordan et al. 2023).
    """
    weights = layer.weights
    gram, cross, missing = fit.centred()
    own = np.einsum("gfo,gfo->go", gram @ weights, weights)
    product = np.einsum("gf,gfo->go", fit.inputs / fit.count, weights)
    varies = own > _STEADY * product**2
    target = np.maximum(own + 2 * np.einsum("gfo,gfo->go", cross, weights) + missing, 0.0)
    scale = np.sqrt(np.divide(target, own, out=np.ones_like(own), where=varies))
    scale = np.clip(scale, 0.5, 2.0)
    return weights * scale[:, None, :], product + bias + fit.missing / fit.count - scale * product


def _positive_solve(matrices: FloatArray, right: FloatArray) -> FloatArray:
    """Solve systems [groups, n, n] that are symmetric and positive definite."""
    from scipy.linalg import cho_factor, cho_solve

    if len(matrices) > 1:
        return np.asarray(np.linalg.solve(matrices, right))
    return np.asarray(cho_solve(cho_factor(matrices[0], lower=True, check_finite=False), right[0]))[None]
