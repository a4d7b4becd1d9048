"""How far the outputs of two models agree on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import Array
from onnxcop.data.open import CalibrationData
from onnxcop.reconstruction.divergence import Reference
from onnxcop.runtime.session import EngineOptions, Session, run_batched

Progress = Callable[[str, float, float | None], None]


@dataclass(frozen=True, slots=True)
class OutputGap:
    """One output of two models.

    Attributes:
        name: Of the output, in both models or in the first.
        error: ‖b - a‖ / ‖a‖ over all samples, of finite numbers; None for what is not floating point.
        worst: The largest |b - a| over the largest |a|.
        equal: Fraction of elements that are equal, for what is not floating point.
        note: Why there are no numbers.
    """

    name: str
    error: float | None = None
    worst: float | None = None
    equal: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Agreement:
    """The outputs of two models on the same samples.

    Attributes:
        outputs: One by one.
        divergence: Kullback–Leibler divergence in nats, of classifiers (one output of two axes).
        top1: Fraction of samples with the same top class, of classifiers.
        samples: How many.
    """

    outputs: tuple[OutputGap, ...]
    divergence: float | None
    top1: float | None
    samples: int


@dataclass
class _Sums:
    """What adds up over batches, of one output."""

    gap: float = 0.0
    energy: float = 0.0
    largest_gap: float = 0.0
    largest: float = 0.0
    same: int = 0
    count: int = 0
    is_float: bool = True
    note: str = ""

    def add(self, a: Any, b: Any) -> None:
        if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.dtype.kind not in "fiub":
            self.note = "not numbers"
        elif a.shape != b.shape:
            self.note = f"{list(a.shape)} beside {list(b.shape)}"
        elif a.dtype.kind == "f":
            known = np.isfinite(a)
            one, two = a[known].astype(np.float64), b[known].astype(np.float64)
            if one.size:
                self.gap += float(((two - one) ** 2).sum())
                self.energy += float((one**2).sum())
                self.largest_gap = max(self.largest_gap, float(np.abs(two - one).max()))
                self.largest = max(self.largest, float(np.abs(one).max()))
        else:
            self.is_float = False
            self.same += int((a == b).sum())
            self.count += a.size

    def result(self, name: str) -> OutputGap:
        if self.note:
            return OutputGap(name, note=self.note)
        if not self.is_float:
            return OutputGap(name, equal=self.same / max(self.count, 1))
        error = float(np.sqrt(self.gap / self.energy)) if self.energy > 0 else float(np.sqrt(self.gap))
        worst = self.largest_gap / self.largest if self.largest > 0 else self.largest_gap
        return OutputGap(name, _number(error), _number(worst))


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def agreement(
    a: onnx.ModelProto,
    b: onnx.ModelProto,
    source: CalibrationData,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    options: EngineOptions = EngineOptions(),
    progress: Progress | None = None,
) -> Agreement:
    """Run two models on the same samples, each at the precision of its inputs.

    Args:
        a: The reference.
        b: The other model.
        source: The samples, by names of the reference's inputs.
        inputs: Names of the other model's inputs by those of the reference's.
        outputs: The same for outputs; only these are compared.
        options: How both are run.
        progress: Called with (stage, done, total).

    Raises:
        EngineError: One of the models does not run.
    """
    sums = {name: _Sums() for name in outputs}
    divergence, same, seen = 0.0, 0.0, 0
    classifier = bool(outputs)
    with Session(a, options) as one, Session(b, options) as two:
        types = {spec.name: spec.dtype for spec in two.inputs}
        for feed, expected in run_batched(one, source.batches(), source.layout.axes, list(outputs)):
            given = {inputs[name]: value.astype(types[inputs[name]], copy=False) for name, value in feed.items()}
            found = two.run(given, list(outputs.values()))
            count = _samples(feed, source)
            seen += count
            for name, other in outputs.items():
                sums[name].add(expected[name], found[other])
            classifier = classifier and _alike(expected, found, outputs)
            if classifier and (reference := Reference([expected])).classifier:
                gap = reference.compare([{name: found[other] for name, other in outputs.items()}])
                divergence, same = divergence + gap.value * count, same + (gap.agreement or 0.0) * count
            else:
                classifier = False
            if progress is not None:
                progress("comparing outputs", seen, source.count)
    scale = max(seen, 1)
    return Agreement(
        tuple(total.result(name) for name, total in sums.items()),
        _number(divergence / scale) if classifier else None,
        same / scale if classifier else None,
        seen,
    )


def _samples(feed: Mapping[str, Array], source: CalibrationData) -> int:
    return next((feed[name].shape[axis] for name, axis in source.layout.axes.items() if axis is not None), 1)


def _alike(expected: Mapping[str, Any], found: Mapping[str, Any], outputs: Mapping[str, str]) -> bool:
    return all(getattr(expected[a], "shape", 0) == getattr(found[b], "shape", 1) for a, b in outputs.items())


def paired(a: Sequence[str], b: Sequence[str]) -> dict[str, str]:
    """Which names of two lists belong together: equal ones, and those left over by their order if as many are."""
    pairs = {name: name for name in a if name in b}
    rest = [name for name in a if name not in pairs], [name for name in b if name not in pairs]
    if len(rest[0]) == len(rest[1]):
        pairs |= dict(zip(*rest, strict=True))
    return {name: pairs[name] for name in a if name in pairs}
