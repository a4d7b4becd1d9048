"""Outputs of the original, computed once for every sample and view, and kept up to 1 GB: if large, in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from onnxcop._base.types import Array, Feed, IntArray
from onnxcop.data.dataset import CalibrationData
from onnxcop.runtime.session import KeptSession, Runner
from onnxcop.training.losses import TARGET
from onnxcop.training.samples import MOST_BYTES, ImageView, LargeArrays, SampleSet
from onnxcop.training.shards import PartOfBatch, Shards

_KEPT = 2**30  # bytes of outputs to keep


class Teacher:
    """Outputs of a model on views of samples.

    Args:
        session: Runs the model.
        samples: The samples.
        views: Number of views.
        outputs: Names of the required outputs.
        share: Share of the memory for outputs that these may take.
    """

    def __init__(
        self, session: Runner, samples: SampleSet, views: int, outputs: Sequence[str], *, share: float = 1.0
    ) -> None:
        self._session, self._share = session, share
        self._samples, self._outputs = samples, list(outputs)
        self._answers: dict[int, dict[str, Array]] = {}
        self._large, self._writing = LargeArrays(), Lock()
        self._known = np.zeros((views, samples.count), np.bool_)

    def answers(self, indices: IntArray, view: int, feed: Mapping[str, Array]) -> Feed:
        """Outputs on some samples; several threads may ask.

        Args:
            indices: Indices of the samples.
            view: Number of the view.
            feed: These samples in that view.
        """
        if self._known[view, indices].all():
            return self._kept(indices, view)
        outputs = self._session.run(feed, self._outputs)
        if any(np.ndim(value) == 0 or len(value) != len(indices) for value in outputs.values()):
            return outputs  # samples are not along the first axis: outputs cannot be stored by sample
        size = sum(value.nbytes for value in outputs.values()) / len(indices) * self._known.size
        if size > self._share * _KEPT:
            return outputs
        with self._writing:
            cached = self._answers.setdefault(view, {})
            for name, value in outputs.items():
                if name not in cached:
                    shape, in_file = (self._samples.count, *value.shape[1:]), size > self._share * MOST_BYTES
                    cached[name] = self._large.make(f"{view} {name}", shape, value.dtype, in_file=in_file)
                cached[name][indices] = value
                self._large.note(value.nbytes)
            self._known[view, indices] = True
            return self._kept(indices, view)

    def _kept(self, indices: IntArray, view: int) -> Feed:
        return {name: self._large.take(f"{view} {name}", indices, 0) for name in self._answers[view]}


@dataclass
class Lesson:
    """What a student learns: a teacher's outputs on views of those samples that are not held out.

    Attributes:
        teacher: The teacher.
        split: Share of the samples that are held out, and the seed of their choice.
        views: Views of the samples; a pass takes the next one.
        targets: Names of the outputs.
        shards: Division of the samples.
    """

    teacher: KeptSession
    split: tuple[float, int]
    views: Sequence[ImageView]
    targets: tuple[str, ...]
    shards: Shards
    _open: dict[int, tuple[SampleSet, Teacher]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Without what a worker reads itself."""
        return vars(self) | {"_open": {}}

    def feed(self, part: PartOfBatch, source: CalibrationData) -> Feed:
        """The samples of a part with the teacher's outputs; those of its shard are read first.

        Raises:
            CalibrationError: The samples of its shard are of different shapes.
        """
        if part.shard not in self._open:
            self._open[part.shard] = self._opened(part.shard, source)
        samples, teacher = self._open[part.shard]
        view = part.epoch % len(self.views)
        feed = samples.batch(part.indices, self.views[view])
        answers = teacher.answers(part.indices, view, feed)
        return feed | {TARGET + name: array for name, array in answers.items()}

    def _opened(self, shard: int, source: CalibrationData) -> tuple[SampleSet, Teacher]:
        fit, _ = source.split(*self.split)
        bounds, share = self.shards.bounds, 1 / self.shards.parts
        samples = SampleSet.of(fit.part(bounds[shard], bounds[shard + 1]), share)
        return samples, Teacher(self.teacher.session, samples, len(self.views), self.targets, share=share)

    def load(self) -> None:
        """Make the teacher's session now, because threads must not make it at the same time."""
        _ = self.teacher.session

    def close(self) -> None:
        """Close it."""
        self.teacher.close()
