"""Agreement of the outputs of two models on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import Feed
from onnxcop.data.open import CalibrationData
from onnxcop.outputs.judgement import judge
from onnxcop.reconstruction.divergence import Figures, Reference
from onnxcop.runtime.session import EngineOptions, Session, run_batched

_KEPT = 1 << 28  # bytes of outputs to keep of each model; the rest is only summed


@dataclass(frozen=True, slots=True)
class OutputGap:
    """Difference of one output of two models.

    Attributes:
        name: Name of the output, in both models or in the first.
        error: ‖b - a‖ / ‖a‖ over all samples, of finite numbers; None unless floating point.
        worst: The largest |b - a| over the largest |a|.
        equal: Fraction of elements that are equal, if not floating point.
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
        outputs: Gap of each output.
        figures: Kinds of the outputs, and the distance of `b` from `a` with intervals; None if their shapes differ.
        samples: Number of samples.
    """

    outputs: tuple[OutputGap, ...]
    figures: Figures | None
    samples: int


@dataclass
class _Sums:
    """Running sums of one output over batches."""

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
    *,
    progress: Progress = silent,
    task: str | None = None,
) -> Agreement:
    """Run two models on the same samples, each at the precision of its inputs.

    Args:
        a: The reference.
        b: The other model.
        source: The samples, keyed by inputs of the reference.
        inputs: Maps inputs of the reference to inputs of the other model.
        outputs: The same for outputs; only these are compared.
        options: How to run both.
        progress: Called with (stage, done, total).
        task: The task of the models, if the user names it (see :data:`onnxcop.outputs.tasks.TASKS`).

    Raises:
        EngineError: One of the models does not run.
    """
    sums = {name: _Sums() for name in outputs}
    kept, seen = KeptOutputs(), 0
    with Session(a, options) as one, Session(b, options) as two:
        types = {spec.name: spec.dtype for spec in two.inputs}
        for feed, expected in run_batched(one, source.batches(), source.layout.axes, list(outputs)):
            given = {inputs[name]: value.astype(types[inputs[name]], copy=False) for name, value in feed.items()}
            theirs = two.run(given, list(outputs.values()))
            count = source.layout.samples_in(feed)
            seen += count
            for name, other in outputs.items():
                sums[name].add(expected[name], theirs[other])
            kept.add(expected, {name: theirs[other] for name, other in outputs.items()}, count)
            progress("comparing outputs", seen, source.count)
    return Agreement(tuple(total.result(name) for name, total in sums.items()), kept.figures(a, task), seen)


@dataclass
class KeptOutputs:
    """Outputs of both models to compare together, as many as fit in memory."""

    one: list[Feed] = field(default_factory=list)
    other: list[Feed] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    size: int = 0
    alike: bool = True

    def add(self, one: Feed, other: Feed, count: int) -> None:
        self.alike = self.alike and all(
            getattr(value, "shape", 0) == getattr(other[name], "shape", 1) for name, value in one.items()
        )
        self.size += sum(getattr(value, "nbytes", 0) for value in one.values())
        if self.alike and (self.size <= _KEPT or not self.one):
            self.one.append(one)
            self.other.append(other)
            self.counts.append(count)

    def figures(self, model: onnx.ModelProto, task: str | None) -> Figures | None:
        if not self.alike or not self.one or not self.one[0]:
            return None
        judgements = judge(self.one, self.counts, model, task)
        if not judgements.entries:
            return None
        return Reference(self.one, judgements=judgements, counts=self.counts).figures(self.other)


def paired(a: Sequence[str], b: Sequence[str]) -> dict[str, str]:
    """Pair the names of two lists: equal names first, then the others by position if there are as many of both."""
    pairs = {name: name for name in a if name in b}
    rest = [name for name in a if name not in pairs], [name for name in b if name not in pairs]
    if len(rest[0]) == len(rest[1]):
        pairs |= dict(zip(*rest, strict=True))
    return {name: pairs[name] for name in a if name in pairs}
