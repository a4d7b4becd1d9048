"""Padding at the end of sequences, found by an input mask and removed.

Sequences are padded to equal length, and a mask of ones and zeros marks the real part. If the model takes sequences of
any length, samples of similar length run together without the padding that all of them share. Then statistics describe
the sequences alone, and runs are shorter. The caller first checks that outputs stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import Array, Feed, IntArray
from onnxcop.data.dataset import CalibrationData
from onnxcop.data.inputs import BatchLayout


@dataclass(frozen=True, slots=True)
class Padding:
    """How batches lose the padding that all their samples share.

    Attributes:
        mask: Name of the input that marks the real part.
        axes: By input, the axis along which sequences run.
    """

    mask: str
    axes: Mapping[str, int]

    def lengths(self, batch: Mapping[str, Array]) -> IntArray:
        """Length of the real part of every sample's sequence."""
        return np.asarray((batch[self.mask] != 0).sum(axis=1), dtype=np.int64)

    def trimmed(self, batch: Feed) -> Feed:
        """A batch up to the end of its longest sequence."""
        longest = max(1, int(self.lengths(batch).max()))
        return {
            name: np.ascontiguousarray(np.take(values, np.arange(longest), axis=self.axes[name]))
            if name in self.axes else values
            for name, values in batch.items()
        }  # fmt: skip


def padding_of(data: CalibrationData) -> Padding | None:
    """The padding of data; None if there is no such mask, or the model fixes the length."""
    first = next(data.batches(), None)
    if first is None:
        return None
    for name in first:
        axes = _sequence_axes(data.layout, name, first)
        if axes and all(_is_mask(batch[name]) for batch in data.batches()):
            padding = Padding(name, axes)
            if any((padding.lengths(batch) < batch[name].shape[1]).any() for batch in data.batches()):
                return padding
    return None


def _is_mask(values: Array) -> bool:
    """Whether every row is ones and then zeros, and none is empty."""
    if values.ndim != 2 or not np.isin(values, (0, 1)).all() or not (values[:, :1] == 1).all():
        return False
    return bool((np.diff(values.astype(np.int8), axis=1) <= 0).all())


def _sequence_axes(layout: BatchLayout, mask: str, batch: Mapping[str, Array]) -> dict[str, int]:
    """The axis of every input that varies with the second axis of a mask; empty if a size is fixed."""
    if layout.axes[mask] != 0 or batch[mask].ndim != 2:
        return {}
    dynamic, size = layout.spec(mask).shape[1], batch[mask].shape[1]
    if isinstance(dynamic, int):
        return {}
    axes: dict[str, int] = {}
    for name, values in batch.items():
        dims = layout.spec(name).shape
        own = [
            axis for axis, length in enumerate(values.shape)
            if axis != layout.axes[name] and length == size and axis < len(dims)
            and (dims[axis] == dynamic if isinstance(dynamic, str) else dims[axis] is None)
        ]  # fmt: skip
        if len(own) > 1:
            return {}
        if own:
            axes[name] = own[0]
    return axes


class TrimmedData(CalibrationData):
    """Samples in the order of their length, in batches without the padding that all of them share."""

    padding: Padding

    @classmethod
    def of(cls, data: CalibrationData, padding: Padding) -> TrimmedData:
        """The same samples, trimmed."""
        lengths = np.concatenate([padding.lengths(batch) for batch in data.batches()])
        return cls._made(data.ordered(np.argsort(lengths, kind="stable")), padding)

    @classmethod
    def _made(cls, data: CalibrationData, padding: Padding) -> TrimmedData:
        trimmed = cls.__new__(cls)
        trimmed.__dict__.update(vars(data))
        trimmed.padding = padding
        return trimmed

    def batches(self, batch_size: int | None = None) -> Iterator[Feed]:
        """The samples in batches, arrays by input name, without shared padding."""
        yield from map(self.padding.trimmed, super().batches(batch_size))

    def _with(self, order: IntArray, description: str = "") -> CalibrationData:
        return self._made(super()._with(order, description), self.padding)
