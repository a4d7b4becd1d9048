"""How far a network's outputs are from the original's, on the same samples.

For a classifier (one output of two axes, scores over classes) the Kullback–Leibler divergence of its
predictions and the top-1 agreement; otherwise, and for probabilities of labels that do not exclude each
other, the relative error of every output, averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcop.arrays import Array, FloatArray

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
    """

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = [dict(batch) for batch in outputs]
        self.names = [
            name for name, value in self.outputs[0].items()
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size
        ]  # fmt: skip
        first = self.outputs[0]
        single = len(self.names) == 1 and first[self.names[0]].ndim == 2 and first[self.names[0]].shape[1] > 1
        self.classifier = single and not all(independent(batch[self.names[0]]) for batch in self.outputs)
        self._logs = [log_probabilities(batch[self.names[0]]) for batch in self.outputs] if self.classifier else []

    def __len__(self) -> int:
        return sum(len(batch[self.names[0]]) for batch in self.outputs) if self.names else 0

    def compare(self, outputs: Outputs) -> Divergence:
        """Distance of other outputs on the same samples."""
        if self.classifier:
            return self._compare_classes(outputs)
        errors = []
        for name in self.names:
            gap = energy = 0.0
            for mine, theirs in zip(self.outputs, outputs, strict=True):
                a, b = mine[name].astype(np.float64), theirs[name].astype(np.float64)
                if a.shape != b.shape:
                    return Divergence(float("inf"), "error")
                known = np.isfinite(a)
                gap += float(((a - b)[known] ** 2).sum())
                energy += float((a[known] ** 2).sum())
            errors.append(np.sqrt(gap / energy) if energy > 0 else np.sqrt(gap))
        value = float(np.mean(errors)) if errors else 0.0
        return Divergence(value if np.isfinite(value) else float("inf"), "error")

    def _compare_classes(self, outputs: Outputs) -> Divergence:
        name, total, same, count = self.names[0], 0.0, 0, 0
        for mine, logs, theirs in zip(self.outputs, self._logs, outputs, strict=True):
            other = log_probabilities(theirs[name])
            possible = ~np.isneginf(logs)  # a class that is ruled out adds nothing
            gap = np.subtract(logs, other, out=np.zeros_like(logs), where=possible)
            total += float((np.exp(logs) * gap).sum())
            same += int((mine[name].argmax(axis=1) == theirs[name].argmax(axis=1)).sum())
            count += len(logs)
        value = max(total / max(count, 1), 0.0)  # rounding can leave a little less than nothing
        return Divergence(value if np.isfinite(value) else float("inf"), "kl", same / max(count, 1))


def independent(scores: Array) -> bool:
    """Whether scores are probabilities of labels that do not exclude each other: from 0 to 1, of any sum."""
    within = bool(scores.size) and float(scores.min()) >= 0 and float(scores.max()) <= 1
    return within and not np.allclose(scores.astype(np.float64).sum(axis=1), 1.0, atol=1e-3)


def log_probabilities(scores: Array) -> FloatArray:
    """Log-probabilities of class scores [samples, classes], whether they are logits or probabilities."""
    values = scores.astype(np.float64)
    if values.min() >= 0 and np.allclose(values.sum(axis=1), 1.0, atol=1e-3):
        return np.log(np.maximum(values, 1e-12))
    values = values - values.max(axis=1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=1, keepdims=True)))
