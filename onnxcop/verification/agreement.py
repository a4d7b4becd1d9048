"""Agreement of the outputs of two models on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import Feed
from onnxcop.data.dataset import CalibrationData, Item
from onnxcop.outputs.judgement import judge
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.reconstruction.divergence import Figures, Reference
from onnxcop.runtime.session import EngineOptions, KeptSession, run_batched

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

    def include(self, batch: _Sums) -> None:
        """Add the sums of another batch."""
        self.gap += batch.gap
        self.energy += batch.energy
        self.largest_gap = max(self.largest_gap, batch.largest_gap)
        self.largest = max(self.largest, batch.largest)
        self.same += batch.same
        self.count += batch.count
        self.is_float = self.is_float and batch.is_float
        self.note = batch.note or self.note

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
    crew: Crew = HERE,
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
        crew: Runs the batches; their sums are added in the order of the batches.

    Raises:
        EngineError: One of the models does not run.
    """
    sums = {name: _Sums() for name in outputs}
    kept, seen = KeptOutputs(), 0
    engine = crew.engine(options)
    both = _Both(KeptSession(a, engine), KeptSession(b, engine), inputs, outputs)
    try:
        for batch in _in_order(both, source, crew, lambda: kept.room):
            seen += batch.count
            for name, total in sums.items():
                total.include(batch.sums[name])
            kept.add(batch)
            progress("comparing outputs", seen, source.count)
    finally:
        both.close()
    return Agreement(tuple(total.result(name) for name, total in sums.items()), kept.figures(a, task), seen)


@dataclass(frozen=True, slots=True)
class ComparedBatch:
    """What a batch says about two models.

    Attributes:
        count: Number of samples.
        sums: Sums by output.
        alike: Whether all outputs are of the same shapes.
        size: Bytes of the first model's outputs.
        outputs: Those of both, by the names of the first; None if they are not wanted.
    """

    count: int
    sums: Mapping[str, _Sums]
    alike: bool
    size: int
    outputs: tuple[Feed, Feed] | None

    @classmethod
    def of(cls, count: int, one: Feed, two: Feed, *, wanted: bool = True) -> ComparedBatch:
        """Compare the outputs of both models, named alike, on so many samples."""
        sums = {name: _Sums() for name in one}
        for name, total in sums.items():
            total.add(one[name], two[name])
        alike = all(getattr(value, "shape", 0) == getattr(two[name], "shape", 1) for name, value in one.items())
        size = sum(getattr(value, "nbytes", 0) for value in one.values())
        return cls(count, sums, alike=alike, size=size, outputs=(one, two) if wanted else None)


@dataclass
class _Both:
    """Two models to compare, with the names of their inputs and outputs."""

    one: KeptSession
    two: KeptSession
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    def compared(
        self, feeds: Iterable[Feed], data: CalibrationData, wanted: Callable[[], bool]
    ) -> Iterator[ComparedBatch]:
        """Run both on batches, or on parts of those that do not fit in memory."""
        types = {spec.name: spec.dtype for spec in self.two.session.inputs}
        for feed, found in run_batched(self.one.session, feeds, data.layout.axes, list(self.outputs)):
            given = {self.inputs[n]: value.astype(types[self.inputs[n]], copy=False) for n, value in feed.items()}
            theirs = self.two.session.run(given, list(self.outputs.values()))
            other = {name: theirs[counterpart] for name, counterpart in self.outputs.items()}
            yield ComparedBatch.of(data.layout.samples_in(feed), found, other, wanted=wanted())

    def close(self) -> None:
        """Close both sessions."""
        self.one.close()
        self.two.close()


def _compared(wish: tuple[Item, bool], both: _Both, data: CalibrationData) -> list[ComparedBatch]:
    """Compare two models on a batch in a worker."""
    item, wanted = wish
    return list(both.compared(data.feeds_of(item), data, lambda: wanted))


def _in_order(both: _Both, data: CalibrationData, crew: Crew, wanted: Callable[[], bool]) -> Iterator[ComparedBatch]:
    """Compare two models on all batches."""
    if not crew.spread:
        yield from both.compared(data.batches(), data, wanted)
        return
    wishes = ((item, wanted()) for item in data.items())
    for parts in crew.run(_compared, wishes, crew.share(both), crew.share(data, keep=True)):
        yield from parts


@dataclass
class KeptOutputs:
    """Outputs of both models to compare together, as many as fit in memory."""

    one: list[Feed] = field(default_factory=list)
    other: list[Feed] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    size: int = 0
    alike: bool = True

    @property
    def room(self) -> bool:
        """Whether outputs of another batch may be kept."""
        return self.alike and (self.size <= _KEPT or not self.one)

    def add(self, batch: ComparedBatch) -> None:
        self.alike = self.alike and batch.alike
        self.size += batch.size
        if self.room and batch.outputs is not None:
            one, other = batch.outputs
            self.one.append(one)
            self.other.append(other)
            self.counts.append(batch.count)

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
