"""How far a network's outputs are from the original's, on the same samples.

For a classifier (one output of two axes, scores over classes) the Kullback–Leibler divergence of its
predictions and the top-1 agreement; otherwise, and for probabilities of labels that do not exclude each
other, the relative error of every output, averaged. An output whose parts are of very different size along an
axis (a detector's boxes and scores) is averaged over these parts, none of which counts more than wholly wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import Array, FloatArray

_UNEVEN = 1e4  # ratio of energies, from which parts of an output are quantities of different kinds

Outputs = Sequence[Mapping[str, Array]]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Distance of a network's outputs from the reference.

    Attributes:
        value: KL divergence in nats for classifiers, else relative error ‖y - y₀‖ / ‖y₀‖; lower is nearer.
        kind: "kl" or "error".
        agreement: Fraction of samples with the same top-1 class, for classifiers.
    """

    value: float
    kind: str
    agreement: float | None = None


@dataclass(frozen=True, slots=True)
class Waypoint:
    """How far a network was from the original on its way to the budget, on held-out samples.

    Attributes:
        name: What had just been done.
        macs: Fraction of the multiply-accumulates that were left.
        divergence: Distance from the original then.
        agreement: Fraction of samples with the same top-1 class, for classifiers.
    """

    name: str
    macs: float
    divergence: float
    agreement: float | None = None


class Reference:
    """The original's outputs on a set of samples.

    Args:
        outputs: Batches of outputs by name.
        roots: Whether outputs from 0 to 1 are compared by their square roots (Hellinger's distance of
            probabilities): where all are next to 0, as for inputs that are made up, few would outweigh the rest.
        temperature: What logits are divided by before their softmax. Above 1 all classes of a sample tell how
            far it is off, not the likeliest alone, so that a difference shows on fewer samples.
    """

    def __init__(self, outputs: Outputs, *, roots: bool = False, temperature: float = 1.0) -> None:
        self.temperature = temperature
        self.outputs = [dict(batch) for batch in outputs]
        self.names = [
            name for name, value in self.outputs[0].items()
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size
        ]  # fmt: skip
        first = self.outputs[0]
        single = len(self.names) == 1 and first[self.names[0]].ndim == 2 and first[self.names[0]].shape[1] > 1
        self.classifier = single and not all(independent(batch[self.names[0]]) for batch in self.outputs)
        told = self.names if roots and not self.classifier else []
        self._rooted = {name for name in told if all(within_one(batch[name]) for batch in self.outputs)}
        self._energies = {} if self.classifier else {name: self._slices(name) for name in self.names}
        self._logs = [self._log_shares(batch) for batch in self.outputs] if self.classifier else []

    def softened(self, temperature: float) -> Reference:
        """The same at another temperature; itself where there are no classes."""
        return Reference(self.outputs, temperature=temperature) if self.classifier else self

    def __len__(self) -> int:
        return sum(len(batch[self.names[0]]) for batch in self.outputs) if self.names else 0

    def compare(self, outputs: Outputs) -> Divergence:
        """Distance of other outputs on the same samples."""
        if self.classifier:
            return self._compare_classes(outputs)
        errors = []
        for name in self.names:
            axis, energy = self._energies[name]
            gap = np.zeros(len(energy))
            for mine, theirs in zip(self.outputs, outputs, strict=True):
                a, b = self._read(name, mine), self._read(name, theirs)
                if a.shape != b.shape:
                    return Divergence(float("inf"), "error")
                gap += _summed(np.subtract(a, b, out=np.zeros_like(a), where=np.isfinite(a)) ** 2, axis)
            if not np.isfinite(gap).all():
                return Divergence(float("inf"), "error")
            shares = np.where(energy > 0, gap / np.where(energy > 0, energy, 1.0), gap)
            errors.append(np.sqrt(shares[0] if axis is None else np.minimum(shares, 1.0).mean()))
        return Divergence(float(np.mean(errors)) if errors else 0.0, "error")

    def _read(self, name: str, batch: Mapping[str, Array]) -> FloatArray:
        values = batch[name].astype(np.float64)
        return np.sqrt(np.maximum(values, 0.0)) if name in self._rooted else values

    def _log_shares(self, batch: Mapping[str, Array]) -> FloatArray:
        found = log_probabilities(batch[self.names[0]])
        return found if self.temperature == 1 else log_probabilities(found / self.temperature)

    def _slices(self, name: str) -> tuple[int | None, FloatArray]:
        """The axis along which an output holds quantities of very different size, and the energy of each.

        A detector's boxes, in pixels, would hide its scores if all were summed up.
        """
        values = [np.nan_to_num(self._read(name, batch), posinf=0.0, neginf=0.0) ** 2 for batch in self.outputs]
        shape = values[0].shape
        if len(shape) > 2:
            axis = 1 + int(np.argmin(shape[1:]))  # the others are positions
            if all(value.shape[axis] == shape[axis] for value in values):
                energy = _sum_of(values, axis)
                present = energy[energy > 0]
                if len(present) and present.max() > _UNEVEN * present.min():
                    return axis, energy
        return None, _sum_of(values, None)

    def _compare_classes(self, outputs: Outputs) -> Divergence:
        name, total, same, count = self.names[0], 0.0, 0, 0
        for mine, logs, theirs in zip(self.outputs, self._logs, outputs, strict=True):
            other = self._log_shares(theirs)
            possible = ~np.isneginf(logs)  # a class that is ruled out adds nothing
            gap = np.subtract(logs, other, out=np.zeros_like(logs), where=possible)
            total += float((np.exp(logs) * gap).sum())
            same += int((mine[name].argmax(axis=1) == theirs[name].argmax(axis=1)).sum())
            count += len(logs)
        value = max(total / max(count, 1), 0.0)  # rounding can leave a little less than nothing
        return Divergence(value if np.isfinite(value) else float("inf"), "kl", same / max(count, 1))


def _sum_of(values: Sequence[FloatArray], axis: int | None) -> FloatArray:
    """Sums over all axes but one (None for that one too) and over batches, float64 [size of the axis, or 1]."""
    return np.asarray(np.sum([_summed(value, axis) for value in values], axis=0))


def _summed(values: FloatArray, axis: int | None) -> FloatArray:
    return np.asarray(values.sum(axis=tuple(a for a in range(values.ndim) if a != axis))).reshape(-1)


def independent(scores: Array) -> bool:
    """Whether scores are probabilities of labels that do not exclude each other: from 0 to 1, of any sum."""
    return within_one(scores) and not np.allclose(scores.astype(np.float64).sum(axis=1), 1.0, atol=1e-3)


def within_one(scores: Array) -> bool:
    """Whether all scores lie from 0 to 1."""
    return bool(scores.size) and float(scores.min()) >= 0 and float(scores.max()) <= 1


def log_probabilities(scores: Array) -> FloatArray:
    """Log-probabilities of class scores [samples, classes], whether they are logits or probabilities."""
    values = scores.astype(np.float64)
    if values.min() >= 0 and np.allclose(values.sum(axis=1), 1.0, atol=1e-3):
        return np.log(np.maximum(values, 1e-12))
    values = values - values.max(axis=1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=1, keepdims=True)))
