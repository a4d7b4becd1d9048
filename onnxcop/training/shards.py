"""Shards of the samples: each part of a batch comes from a shard of its own.

So the parts of a batch can be computed side by side, by threads or by workers that read one shard each. Which samples a
step takes depends on the model, the number of samples and the seed, and not on who computes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import onnx

from onnxcop._base.types import Feed, IntArray
from onnxcop.graph.linear import multiply_accumulates
from onnxcop.runtime.bound import device_of
from onnxcop.runtime.input_shapes import fed_shapes, shapes_of
from onnxcop.runtime.session import EngineOptions

_PARTS = 8  # of a batch, at most
FEWEST_MACS = 3e7  # multiply-accumulates of the network on a part; below that, starting a run costs as much


@dataclass(frozen=True, slots=True)
class PartOfBatch:
    """Samples of one shard.

    Attributes:
        shard: Number of the shard.
        indices: Places of the samples in it.
        epoch: Number of the pass over the samples.
        share: Share of the batch's samples.
    """

    shard: int
    indices: IntArray
    epoch: int
    share: float

    def divided(self, count: int) -> list[PartOfBatch]:
        """The same samples in smaller parts."""
        whole = len(self.indices)
        return [
            replace(self, indices=part, share=self.share * len(part) / whole)
            for part in np.array_split(self.indices, count)
        ]


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

    def engine(self, options: EngineOptions) -> EngineOptions:
        """How models are run for a part: with one thread if there are several, which are computed side by side."""
        return replace(options, threads=1) if self.parts > 1 else options

    def batch(self, number: int, seed: int) -> list[PartOfBatch]:
        """The samples of a step, in a random order of every shard in every pass.

        Args:
            number: Number of the step.
            seed: Random seed.
        """
        epoch, place = divmod(number, self.steps)
        parts = []
        for shard, ((start, stop), own) in enumerate(
            zip(pairwise(self.bounds), np.array_split(np.arange(self.size), self.parts), strict=True)
        ):
            order = np.random.default_rng([seed, epoch, shard]).permutation(stop - start)
            indices = order[place * len(own) : (place + 1) * len(own)]
            parts.append(PartOfBatch(shard, indices, epoch, len(own) / self.size))
        return parts


def parts_of(size: int, macs: float) -> int:
    """Into how many parts to divide a batch.

    Args:
        size: Samples of the batch.
        macs: Multiply-accumulates of the network on the batch.
    """
    return int(max(1, min(size, _PARTS, macs // FEWEST_MACS)))


def divided(shards: Shards, model: onnx.ModelProto, batch: tuple[Feed, int], options: EngineOptions) -> Shards:
    """The same samples in as many shards as the arithmetic of a batch asks for; a device computes it as a whole.

    Args:
        shards: Number of samples, and size of a batch.
        model: The network.
        batch: Some samples, and how many these are.
        options: How the network is run.
    """
    if device_of(options) is not None:
        return shards
    feed, samples = batch
    macs = multiply_accumulates(model, shapes_of(model, fed_shapes(model, feed), options))
    return replace(shards, parts=parts_of(shards.size, macs * shards.size / samples))
