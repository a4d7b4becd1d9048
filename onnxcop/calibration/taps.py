"""The tensors that calibration observes, and how densely their positions are sampled."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from onnxcop.analysis.layers import Layer
from onnxcop.calibration.statistics import tap_key
from onnxcop.graph.shapes import ShapeMap
from onnxcop.graph.subgraphs import made


@dataclass(frozen=True, slots=True)
class Tap:
    """A tensor with observed channels.

    Attributes:
        key: Name of its statistics, see :func:`onnxcop.calibration.statistics.tap_key`.
        tensor: Name of the tensor.
        axis: Its channel axis, of `outer * channels * inner` entries.
        outer: Blocks of all channels on that axis.
        channels: Number of channels.
        inner: Neighbouring positions of one channel on that axis.
        shape: Shape of the tensor for a batch of `samples`.
        samples: Number of samples in that batch.
        kind: Its data type, a constant of `onnx.TensorProto`.
        recurrent: Whether a recurrent layer reads it, so that its leading axis is time.
    """

    key: str
    tensor: str
    axis: int
    outer: int
    channels: int
    inner: int
    shape: tuple[int, ...]
    samples: int
    kind: int
    recurrent: bool

    @property
    def batch_axis(self) -> int:
        """The axis of the samples; a recurrent layer reads time first."""
        return 1 if self.recurrent else 0

    @property
    def position_axes(self) -> dict[int, int]:
        """The other axes along which positions are, with their sizes."""
        others = (self.batch_axis, self.axis)
        return {axis: n for axis, n in enumerate(self.shape) if axis not in others and n > 1}

    @property
    def blocks(self) -> int:
        """Positions of a sample that share one entry of the position axes.

        They are on the channel axis, or on the batch axis where windows are folded into it.
        """
        folded = 1 if self.batch_axis == self.axis else self.shape[self.batch_axis] // self.samples
        return max(1, folded) * self.outer * self.inner

    @property
    def positions(self) -> int:
        """Observations of every channel in one sample."""
        return self.blocks * math.prod(self.position_axes.values())


def taps_of(
    model: onnx.ModelProto, layers: Iterable[Layer], shapes: ShapeMap, samples: int, widest: int
) -> tuple[Tap, ...]:
    """The distinct tensors that layers read.

    Args:
        model: The model.
        layers: Its layers.
        shapes: Its shapes for a batch of `samples`.
        samples: Number of samples in a batch.
        widest: Tensors of more channels are left out.
    """
    taps: dict[str, Tap] = {}
    outer = made(model.graph)
    for layer in layers:
        if layer.tensor not in outer:
            continue  # inside a body of control flow, which cannot return tensors here
        info = shapes[layer.tensor]
        key = tap_key(layer)
        if layer.channels > widest or key in taps or info.shape is None:
            continue
        taps[key] = Tap(
            key=key,
            tensor=layer.tensor,
            axis=layer.axis % len(info.shape),
            outer=layer.outer,
            channels=layer.channels,
            inner=layer.inner,
            shape=info.shape,
            samples=samples,
            kind=info.elem_type,
            recurrent=layer.kernel.kind == "recurrent",
        )
    return tuple(taps.values())


def stride(tap: Tap, positions: int) -> int:
    """A stride, 1 or even, that leaves at most `positions` of a sample, and not many fewer.

    It is the same for all position axes, and divides the longest about evenly. Every axis keeps at least one entry.
    """
    sizes = tap.position_axes.values()
    if not sizes:
        return 1
    longest, best = max(sizes), 1
    while tap.blocks * math.prod(_kept(n, best) for n in sizes) > positions:
        if best > longest:
            return best
        best = 2 if best == 1 else best + 2
    even = longest / _kept(longest, best)
    return best if best == 1 else max(best, 2 * round(even / 2))


def _kept(size: int, stride: int) -> int:
    """How many entries of an axis lie at half a stride and every stride from there."""
    return size if stride == 1 else max(1, -(-(size - stride // 2) // stride))
