"""Shards of the samples: each part of a batch comes from a shard of its own.

So the parts of a batch can be computed side by side, by threads or by workers that read one shard each. Which samples a
step takes depends on the model, the number of samples and the seed, and not on who computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from onnxcop._base.types import Array, Feed, IntArray
from onnxcop.data.dataset import CalibrationData
from onnxcop.runtime.session import KeptSession, OutOfMemory
from onnxcop.training.losses import LOSS, TARGET
from onnxcop.training.samples import ImageView, SampleSet
from onnxcop.training.step import GRADIENT, WEIGHTS
from onnxcop.training.teacher import Teacher
from onnxcop.training.trainer import mean_of_parts

_PARTS = 8  # of a batch, at most
FEWEST_MACS = 3e7  # multiply-accumulates of the network on a part; below that, starting a run costs as much


def parts_of(size: int, macs: float) -> int:
    """Into how many parts to divide a batch.

    Args:
        size: Samples of the batch.
        macs: Multiply-accumulates of the network on the batch.
    """
    return int(max(1, min(size, _PARTS, macs // FEWEST_MACS)))


@dataclass(frozen=True, slots=True)
class PartOfBatch:
    """Samples of one shard.

    Attributes:
        shard: Number of the shard.
        indices: Places of the samples in it.
        view: Number of their view.
        share: Share of the batch's samples.
    """

    shard: int
    indices: IntArray
    view: int
    share: float


@dataclass(frozen=True, slots=True)
class Shards:
    """Division of samples and batches.

    Attributes:
        count: Number of samples.
        size: Samples of a batch, at most `count`.
        parts: Number of shards, at most `size`.
    """

    count: int
    size: int
    parts: int = 1

    @property
    def steps(self) -> int:
        """Batches of a pass over the samples."""
        return max(1, self.count // self.size)

    @property
    def bounds(self) -> list[int]:
        """The first sample of every shard, and the number of samples; each shard has enough for a pass."""
        ends = accumulate(len(part) for part in np.array_split(np.arange(self.size), self.parts))
        return [0, *(self.count * end // self.size for end in ends)]

    def batch(self, number: int, seed: int, views: int = 1) -> list[PartOfBatch]:
        """The samples of a step, in a random order of every shard in every pass.

        Args:
            number: Number of the step.
            seed: Random seed.
            views: Number of views; a pass takes the next one.
        """
        epoch, place = divmod(number, self.steps)
        parts = []
        for shard, ((start, stop), own) in enumerate(
            zip(pairwise(self.bounds), np.array_split(np.arange(self.size), self.parts), strict=True)
        ):
            order = np.random.default_rng([seed, epoch, shard]).permutation(stop - start)
            indices = order[place * len(own) : (place + 1) * len(own)]
            parts.append(PartOfBatch(shard, indices, epoch % views, len(own) / self.size))
        return parts


@dataclass(frozen=True, slots=True)
class Task:
    """What a student learns, and from which samples.

    Attributes:
        teacher: The model with the outputs to learn.
        split: Share of the samples that are held out, and the seed of their choice.
        views: Views of the samples.
        targets: Names of the outputs.
    """

    teacher: KeptSession
    split: tuple[float, int]
    views: Sequence[ImageView]
    targets: tuple[str, ...]

    def shard(self, source: CalibrationData, start: int, stop: int, share: float = 1.0) -> Shard:
        """The samples from one place to before another, of those that are not held out.

        Args:
            source: All samples.
            start: The first place.
            stop: After the last.
            share: Share of the memory for samples and outputs that it may take.
        """
        fit, _ = source.split(*self.split)
        samples = SampleSet.of(fit.part(start, stop), share)
        teacher = Teacher(self.teacher.session, samples, len(self.views), self.targets, share=share)
        return Shard(samples, teacher, self.views)


@dataclass(frozen=True, slots=True)
class Shard:
    """Samples of a shard, and a teacher's outputs on them.

    Attributes:
        samples: The samples.
        teacher: The outputs.
        views: Views of the samples.
    """

    samples: SampleSet
    teacher: Teacher
    views: Sequence[ImageView]

    def feed(self, indices: IntArray, view: int) -> Feed:
        """Some samples in a view, with the teacher's outputs."""
        feed = self.samples.batch(indices, self.views[view])
        answers = self.teacher.answers(indices, view, feed)
        return feed | {TARGET + name: array for name, array in answers.items()}


@dataclass
class PartGradients:
    """Gradients of parts of batches, in the process that computes them.

    Attributes:
        task: What is learned.
        gradient: The graph of a part's loss and gradient.
        shards: Division of the samples.
    """

    task: Task
    gradient: KeptSession
    shards: Shards
    _open: dict[int, Shard] = field(default_factory=dict)
    _most: int | None = None  # samples that fit into memory, if fewer than a part

    def __getstate__(self) -> dict[str, Any]:
        """Without what a worker reads itself."""
        return vars(self) | {"_open": {}, "_most": None}

    def of(self, part: PartOfBatch, weights: Array, source: CalibrationData) -> tuple[float, Array]:
        """Loss and gradient of a part, float32 [weights].

        Raises:
            OutOfMemory: A single sample does not fit.
        """
        shard = self._open.get(part.shard)
        if shard is None:
            bounds = self.shards.bounds
            start, stop = bounds[part.shard], bounds[part.shard + 1]
            shard = self._open[part.shard] = self.task.shard(source, start, stop, 1 / self.shards.parts)
        return self._of(shard, part.indices, part.view, weights)

    def _of(self, shard: Shard, indices: IntArray, view: int, weights: Array) -> tuple[float, Array]:
        if self._most is None or len(indices) <= self._most:
            try:
                values = self.gradient.session.run(shard.feed(indices, view) | {WEIGHTS: weights}, [LOSS, GRADIENT])
                return float(values[LOSS]), values[GRADIENT]
            except OutOfMemory:
                if len(indices) == 1:
                    raise
                self._most = len(indices) // 2
        return mean_of_parts(
            (len(half) / len(indices), *self._of(shard, half, view, weights)) for half in np.array_split(indices, 2)
        )

    def load(self) -> None:
        """Make the sessions now, because threads must not make them at the same time."""
        for kept in (self.gradient, self.task.teacher):
            _ = kept.session

    def close(self) -> None:
        """Close the sessions."""
        self.gradient.close()
        self.task.teacher.close()
