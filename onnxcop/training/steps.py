"""Steps of training: on whole batches, or on parts that threads or workers compute side by side."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import numpy as np

from onnxcop._base.types import Array, Feed, IntArray
from onnxcop.data.dataset import CalibrationData
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.runtime.providers import OutOfMemory
from onnxcop.runtime.session import EngineOptions, KeptSession
from onnxcop.training.shards import PartGradients, PartOfBatch, Shards, Task
from onnxcop.training.trainer import StepResult, Trainer, mean_of_parts

log = logging.getLogger("onnxcop")

Read = Callable[[int, IntArray], Feed]  # the feed of some samples: the number of the pass, and their places


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
        """End threads."""
        ...


class BatchSteps:
    """Steps on whole batches, read in a separate thread while ONNX Runtime computes the step before.

    Args:
        trainer: Runs them.
        read: Builds the feeds.
        shards: Division of the samples, in one part.
        seed: Random seed of their order.
    """

    def __init__(self, trainer: Trainer, read: Read, shards: Shards, seed: int) -> None:
        self._trainer, self._read, self._shards, self._seed = trainer, read, shards, seed
        self._parts = 1
        self._pool = ThreadPoolExecutor(1, "onnxcop-batches")
        self._pending: dict[tuple[int, int], Future[list[Feed]]] = {}

    def make(self, number: int, rate: float, *, last: bool = False) -> tuple[StepResult, IntArray]:
        """Make one step; a batch that does not fit into memory is computed in parts from now on."""
        indices = self._indices(number)
        while True:
            try:
                parts = self._ahead(number, last)
                shares = [len(part) / len(indices) for part in np.array_split(indices, self._parts)]
                return self._trainer.step_in_parts(parts, shares, rate), indices
            except OutOfMemory:
                if self._parts >= len(indices):
                    raise
                self._parts *= 2
                log.info("out of memory: from now on a step computes its batch in %d parts", self._parts)

    def _ahead(self, number: int, last: bool) -> list[Feed]:
        """The feeds of a step; reading goes on with the next step unless this is the last."""
        requests = [(number, self._parts)] if last else [(number, self._parts), (number + 1, self._parts)]
        self._pending = {key: self._pending.get(key) or self._pool.submit(self._feeds, *key) for key in requests}
        return self._pending[requests[0]].result()

    def _feeds(self, number: int, parts: int) -> list[Feed]:
        epoch = number // self._shards.steps
        return [self._read(epoch, part) for part in np.array_split(self._indices(number), parts)]

    def _indices(self, number: int) -> IntArray:
        return self._shards.batch(number, self._seed)[0].indices

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class ShardedSteps:
    """Steps on batches whose parts are computed side by side, with one thread each.

    Args:
        trainer: Holds the weights; it only updates them from now on.
        task: What is learned.
        source: The samples.
        shards: Their division.
        seed: Random seed of their order.
        options: How to run models.
        crew: Computes the parts; without workers, threads of this process do.
    """

    def __init__(
        self, *, trainer: Trainer, task: Task, source: CalibrationData, shards: Shards, seed: int,
        options: EngineOptions, crew: Crew = HERE,
    ) -> None:  # fmt: skip
        self._trainer, self._shards, self._seed = trainer, shards, seed
        self._views, self._source, self._crew = len(task.views), source, crew
        self._gradients = PartGradients(task, KeptSession(trainer.split(), replace(options, threads=1)), shards)
        self._shared = crew.share(self._gradients), crew.share(source, keep=True)
        self._threads: ThreadPoolExecutor | None = None
        if not crew.spread:
            self._gradients.load()
            width = min(shards.parts, options.threads or os.cpu_count() or 1)
            self._threads = ThreadPoolExecutor(width, "onnxcop-parts")

    def make(self, number: int, rate: float, *, last: bool = False) -> tuple[StepResult, IntArray]:
        """Make one step."""
        parts = self._shards.batch(number, self._seed, self._views)
        found = self._found(parts, self._trainer.weights)
        loss, gradient = mean_of_parts((part.share, *one) for part, one in zip(parts, found, strict=True))
        places = [start + part.indices for start, part in zip(self._shards.bounds[:-1], parts, strict=True)]
        return self._trainer.update(loss, gradient, rate), np.concatenate(places)

    def _found(self, parts: Sequence[PartOfBatch], weights: Array) -> Iterable[tuple[float, Array]]:
        """Loss and gradient of each part."""
        if self._threads is not None:
            return self._threads.map(lambda part: self._gradients.of(part, weights, self._source), parts)
        plan, source = self._shared
        homes = [part.shard for part in parts]
        return self._crew.run(_gradient, parts, plan, self._crew.share(weights), source, homes=homes)

    def close(self) -> None:
        """End threads and close sessions."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._gradients.close()


def _gradient(
    part: PartOfBatch, gradients: PartGradients, weights: Array, source: CalibrationData
) -> tuple[float, Array]:
    """Loss and gradient of a part in a worker."""
    return gradients.of(part, weights, source)
