"""The kind of every output of a model, decided on evidence or given by the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxcop._base.lookup import check_known
from onnxcop._base.types import Array
from onnxcop.errors import CalibrationError
from onnxcop.outputs.detections import DETECTIONS
from onnxcop.outputs.evidence import activations, by_sample, metadata, sample_axis
from onnxcop.outputs.kind import OutputEvidence, OutputKind
from onnxcop.outputs.kinds import KINDS
from onnxcop.outputs.tasks import TASKS

Outputs = Sequence[Mapping[str, Array]]  # outputs of a network, batch by batch


@dataclass(frozen=True, slots=True)
class Judgement:
    """The kind of an output, and the evidence.

    Attributes:
        outputs: Names of the outputs that form this kind together.
        kind: Their kind.
        why: The evidence.
        axes: The axis of the samples in each of them, None if there is none.
    """

    outputs: tuple[str, ...]
    kind: OutputKind
    why: str
    axes: tuple[int | None, ...]

    def __str__(self) -> str:
        """A sentence for the summary."""
        names = " and ".join(self.outputs)
        return f"output {names}: {self.kind.title}, compared by {self.kind.compared_by} ({self.why})"


@dataclass(frozen=True, slots=True)
class Judgements:
    """The kinds of all outputs of a model.

    Attributes:
        entries: One entry for every output, or for outputs that belong together.
        metadata: Metadata of the model.
    """

    entries: tuple[Judgement, ...]
    metadata: Mapping[str, str]


def sample_counts(outputs: Outputs) -> list[int]:
    """The number of samples in each batch, from the first axis of the first output that has one."""
    return [next((len(a) for a in batch.values() if isinstance(a, np.ndarray) and a.ndim), 1) for batch in outputs]


def judge(
    outputs: Outputs, counts: Sequence[int] | None = None, model: onnx.ModelProto | None = None, task: str | None = None
) -> Judgements:
    """Decide the kind of every output.

    Args:
        outputs: Outputs of the original on calibration data, batch by batch.
        counts: Number of samples of every batch; None to take it from the outputs.
        model: The original, for evidence from its graph and metadata.
        task: The task that the user names, one of :data:`onnxcop.outputs.tasks.TASKS`.

    Raises:
        CalibrationError: No output has the form that the task needs.
    """
    counts = sample_counts(outputs) if counts is None else counts
    ends = {} if model is None else activations(model)
    notes = {} if model is None else metadata(model)
    names = [
        name for name, value in outputs[0].items()
        if all(isinstance(batch[name], np.ndarray) for batch in outputs) and value.dtype.kind == "f" and value.size
    ]  # fmt: skip
    axes = {name: sample_axis([batch[name].shape for batch in outputs], counts) for name in names}
    left = [
        OutputEvidence(
            name,
            [by_sample(batch[name], axes[name], count) for batch, count in zip(outputs, counts, strict=True)],
            ends.get(name, ""),
            notes,
        )
        for name in names
    ]
    entries: list[Judgement] = []

    def add(kind: OutputKind, which: tuple[str, ...], why: str) -> None:
        entries.append(Judgement(which, kind, why, tuple(axes[name] for name in which)))
        left[:] = [output for output in left if output.name not in which]

    if task is not None:
        for kind, which in _of_task(left, task):
            add(kind, which, f"--task {task}")
    for kind in KINDS:
        for finding in kind.recognize(list(left)):
            add(kind, finding.outputs, finding.why)
    order = {name: place for place, name in enumerate(names)}
    entries.sort(key=lambda judgement: order[judgement.outputs[0]])
    return Judgements(tuple(entries), notes)


def _of_task(outputs: Sequence[OutputEvidence], task: str) -> list[tuple[OutputKind, tuple[str, ...]]]:
    """The outputs that fit the user's task, each by itself; boxes and scores that belong together as one."""
    check_known(task, TASKS, "task", CalibrationError)
    if task in DETECTIONS.tasks and (pairs := [f.outputs for f in DETECTIONS.recognize(outputs) if len(f.outputs) > 1]):
        return [(DETECTIONS, pair) for pair in pairs]
    found: list[tuple[OutputKind, tuple[str, ...]]] = [
        (kind, (output.name,))
        for output in outputs
        for kind in KINDS
        if len(output.shape) in kind.tasks.get(task, ()) and (kind is not DETECTIONS or min(output.shape[1:]) > 4)
    ]
    if not found and outputs:
        shapes = ", ".join(f"{output.name} {list(output.shape)}" for output in outputs)
        raise CalibrationError(f"--task {task}: no output has the form of that ({shapes}); leave --task out")
    return found
