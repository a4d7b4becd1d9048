"""Steps of training: on whole batches, or on parts that threads or workers compute side by side."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxcop._base.types import Array, Feed, IntArray
from onnxcop.data.dataset import CalibrationData
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.runtime.providers import OutOfMemory
from onnxcop.runtime.session import EngineOptions, KeptSession
from onnxcop.training.losses import LOSS
from onnxcop.training.shards import PartOfBatch, Shards
from onnxcop.training.step import GRADIENT, WEIGHTS
from onnxcop.training.trainer import StepResult, Trainer, mean_of_parts

log = logging.getLogger("onnxcop")


class Feeds(Protocol):
    """Samples with what is to be learned."""

    def feed(self, part: PartOfBatch, source: CalibrationData) -> Feed:
        """The feed of a part of a batch."""
        ...

    def load(self) -> None:
        """Make what threads must not make at the same time."""
        ...

    def close(self) -> None:
        """Close sessions."""
        ...


class Steps(Protocol):
    """Makes the steps of a run."""

    def make(self, number: int, rate: float, *, last: bool = False) -> tuple[StepResult, IntArray]:
        """Make one step; returns its result and the places of its samples.

        Args:
            number: Number of the step, which chooses the samples.
            rate: Learning rate.
            last: Whether no step follows.

        Raises:
            OutOfMemory: A single sample does not fit.
        """
        ...

    def close(self) -> None:
        """End threads and close sessions."""
        ...


@dataclass(frozen=True, slots=True)
class Course:
    """The samples of all steps.

    Attributes:
        feeds: Samples with what is to be learned.
        source: Where they come from.
        shards: Their division.
        seed: Random seed of their order.
    """

    feeds: Feeds
    source: CalibrationData
    shards: Shards
    seed: int

    def parts(self, number: int) -> list[PartOfBatch]:
        """The parts of a step's batch."""
        return self.shards.batch(number, self.seed)

    def places(self, parts: Sequence[PartOfBatch]) -> IntArray:
        """Places of a batch among all samples."""
        return np.concatenate([self.shards.bounds[part.shard] + part.indices for part in parts])


def steps_of(trainer: Trainer, course: Course, options: EngineOptions, crew: Crew = HERE) -> Steps:
    """The steps of a course: in parts if it has several, else on whole batches."""
    if course.shards.parts == 1:
        return BatchSteps(trainer, course)
    return ShardedSteps(trainer, course, options, crew)


class BatchSteps:
    """Steps on whole batches, read in a separate thread while ONNX Runtime computes the step before.

    Args:
        trainer: Runs them.
        course: The samples, in one shard.
    """

    def __init__(self, trainer: Trainer, course: Course) -> None:
        self._trainer, self._course = trainer, course
        self._parts = 1
        self._pool = ThreadPoolExecutor(1, "onnxcop-batches")
        self._pending: dict[tuple[int, int], Future[list[Feed]]] = {}

    def make(self, number: int, rate: float, *, last: bool = False) -> tuple[StepResult, IntArray]:
        """Make one step; a batch that does not fit into memory is computed in parts from now on."""
        (batch,) = self._course.parts(number)
        while True:
            try:
                feeds = self._ahead(number, last)
                shares = [part.share for part in batch.divided(self._parts)]
                return self._trainer.step_in_parts(feeds, shares, rate), self._course.places([batch])
            except OutOfMemory:
                if self._parts >= len(batch.indices):
                    raise
                self._parts *= 2
                log.info("out of memory: from now on a step computes its batch in %d parts", self._parts)

    def _ahead(self, number: int, last: bool) -> list[Feed]:
        """The feeds of a step; reading goes on with the next step unless this is the last."""
        requests = [(number, self._parts)] if last else [(number, self._parts), (number + 1, self._parts)]
        self._pending = {key: self._pending.get(key) or self._pool.submit(self._feeds, *key) for key in requests}
        return self._pending[requests[0]].result()

    def _feeds(self, number: int, parts: int) -> list[Feed]:
        (batch,) = self._course.parts(number)
        return [self._course.feeds.feed(part, self._course.source) for part in batch.divided(parts)]

    def close(self) -> None:
        """End the thread and close sessions."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._course.feeds.close()


@dataclass
class PartGradients:
    """Gradients of parts of batches, in the process that computes them.

    Attributes:
        graph: The graph of a part's loss and gradient.
        feeds: Samples with what is to be learned.
    """

    graph: KeptSession
    feeds: Feeds
    _most: int | None = None  # samples that fit into memory, if fewer than a part

    def of(self, part: PartOfBatch, weights: Array, source: CalibrationData) -> tuple[float, float, Array]:
        """Share of the batch, loss and gradient of a part, float32 [weights].

        Raises:
            OutOfMemory: A single sample does not fit.
        """
        if self._most is None or len(part.indices) <= self._most:
            try:
                values = self.graph.session.run(self.feeds.feed(part, source) | {WEIGHTS: weights}, [LOSS, GRADIENT])
                return part.share, float(values[LOSS]), values[GRADIENT]
            except OutOfMemory:
                if len(part.indices) == 1:
                    raise
                self._most = len(part.indices) // 2
        halves = (self.of(half, weights, source) for half in part.divided(2))
        return part.share, *mean_of_parts((share / part.share, loss, slope) for share, loss, slope in halves)

    def load(self) -> None:
        """Make the sessions now, because threads must not make them at the same time."""
        _ = self.graph.session
        self.feeds.load()

    def close(self) -> None:
        """Close the sessions."""
        self.graph.close()
        self.feeds.close()


class ShardedSteps:
    """Steps on batches whose parts are computed side by side, with one thread each.

    Args:
        trainer: Holds the weights; it only updates them from now on.
        course: The samples.
        options: How to run models.
        crew: Computes the parts; without workers, threads of this process do.
    """

    def __init__(self, trainer: Trainer, course: Course, options: EngineOptions, crew: Crew = HERE) -> None:
        self._trainer, self._course, self._crew = trainer, course, crew
        self._gradients = PartGradients(KeptSession(trainer.split(), course.shards.engine(options)), course.feeds)
        self._shared = crew.share(self._gradients), crew.share(course.source, keep=True)
        self._threads: ThreadPoolExecutor | None = None
        if not crew.spread:
            self._gradients.load()
            width = min(course.shards.parts, options.threads or os.cpu_count() or 1)
            self._threads = ThreadPoolExecutor(width, "onnxcop-parts")

    def make(self, number: int, rate: float, *, last: bool = False) -> tuple[StepResult, IntArray]:
        """Make one step."""
        parts = self._course.parts(number)
        loss, gradient = mean_of_parts(self._found(parts, self._trainer.weights))
        return self._trainer.update(loss, gradient, rate), self._course.places(parts)

    def _found(self, parts: Sequence[PartOfBatch], weights: Array) -> Iterable[tuple[float, float, Array]]:
        """Share, loss and gradient of each part."""
        if self._threads is not None:
            return self._threads.map(lambda part: self._gradients.of(part, weights, self._course.source), parts)
        gradients, source = self._shared
        homes = [part.shard for part in parts]
        return self._crew.run(_gradient, parts, gradients, self._crew.share(weights), source, homes=homes)

    def close(self) -> None:
        """End threads and close sessions."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._gradients.close()


def _gradient(
    part: PartOfBatch, gradients: PartGradients, weights: Array, source: CalibrationData
) -> tuple[float, float, Array]:
    """Share, loss and gradient of a part in a worker."""
    return gradients.of(part, weights, source)
