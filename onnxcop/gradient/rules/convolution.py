"""Gradients of convolutions, as convolutions and matrix products.

With respect to the input: the transposed convolution. With respect to the weights: patches of the input times
the gradient of the output, summed over samples,

    dW[o, c, t] = Σ_n Σ_l dY[n, o, l] · X[n, c, l · stride + t · dilation - pad].

Patches are the general way. Dense layers of stride 1 and depthwise layers have quicker ones, without a copy of the
input for every tap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcop.gradient.builder import INT64, NoGradient, Tensor, concat, padded
from onnxcop.gradient.node import Vjp

_FEW_CHANNELS = 8  # below this, products of shifted copies are too thin


@dataclass(frozen=True, slots=True)
class Window:
    """How a window moves over the spatial axes.

    Attributes:
        kernel: Its size along each of them.
        strides: Its steps.
        dilations: Distance of its taps.
        begin: Padding before.
        end: Padding behind.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(
        cls, x: Tensor, kernel: Sequence[int], strides: Sequence[int] | None, dilations: Sequence[int] | None,
        pads: Sequence[int] | None, auto_pad: str,
    ) -> Window:  # fmt: skip
        """Read it from the attributes of a node that reads `x`."""
        axes = len(kernel)
        steps = tuple(strides or [1] * axes)
        taps = tuple(dilations or [1] * axes)
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            missing = []
            for size, k, s, d in zip(x.sizes[2:], kernel, steps, taps, strict=True):
                if not isinstance(size, int):
                    raise NoGradient(f"its auto_pad is {auto_pad}, and the size of its input is not fixed")
                missing.append(max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0))
            less = [m // 2 for m in missing]
            more = [m - half for m, half in zip(missing, less, strict=True)]
            begin, end = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
        else:
            both = list(pads or [0] * (2 * axes)) if auto_pad != "VALID" else [0] * (2 * axes)
            begin, end = both[:axes], both[axes:]
        return cls(kernel=tuple(kernel), strides=steps, dilations=taps, begin=tuple(begin), end=tuple(end))

    @property
    def pads(self) -> list[int]:
        """As the attribute."""
        return [*self.begin, *self.end]

    @property
    def taps(self) -> int:
        """Elements of the window."""
        return math.prod(self.kernel)

    @property
    def reach(self) -> tuple[int, ...]:
        """How many elements it spans along each axis, less one."""
        return tuple((k - 1) * d for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def point(self) -> bool:
        """Whether it is a single element that visits all others."""
        return self.taps == 1 and set(self.strides) == {1} and not any(self.pads)


def spread(g: Tensor, weights: Tensor, x: Tensor, window: Window, group: int = 1) -> Tensor:
    """The transposed convolution of `g`, with the shape of `x`: every element of `g` returns to its sources."""
    axes = len(window.kernel)
    settings: dict[str, Any] = {"strides": list(window.strides), "dilations": list(window.dilations), "group": group}
    if g.shape is not None and all(isinstance(size, int) for size in (*x.sizes[2:], *g.shape[2:])):
        extra = [
            size + begin + end - ((o - 1) * s + reach + 1)
            for size, o, s, reach, begin, end in zip(
                x.sizes[2:], g.shape[2:], window.strides, window.reach, window.begin, window.end, strict=True
            )
        ]  # fmt: skip
        if all(0 <= more < s for more, s in zip(extra, window.strides, strict=True)):
            return g.op("ConvTranspose", weights, pads=window.pads, output_padding=extra, **settings)
    full = g.op("ConvTranspose", weights, **settings)
    return fitted(full, x, [-begin for begin in window.begin], axes)


def fitted(full: Tensor, x: Tensor, before: Sequence[int], axes: int) -> Tensor:
    """Zeros added (or elements removed) along the spatial axes, so that the result has the sizes of `x` there.

    Args:
        full: The tensor.
        x: The tensor whose sizes it gets.
        before: How many zeros come before, negative to remove elements.
        axes: How many spatial axes there are.
    """
    start = full.builder.ints(*before)
    sizes = [t.op("Shape", elem_type=INT64, start=2, end=2 + axes) for t in (x, full)]
    after = sizes[0] - sizes[1] - start
    return padded(full, start, after, 2, 0)


def windowed(rule: Callable[[Tensor, Tensor, Tensor, Window, int], Tensor], transposed: bool = False) -> Vjp:
    """A rule of (g, x, w, window, group) as one of a node's attributes.

    Args:
        rule: The rule.
        transposed: Whether the window moves over the output, as that of a ConvTranspose does.
    """

    def of_node(
        g: Tensor, y: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, *, strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None, group: int = 1,
        auto_pad: str = "NOTSET", kernel_shape: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None, output_shape: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        if output_shape or (transposed and auto_pad not in ("NOTSET", "VALID")):
            raise NoGradient("it has auto_pad or output_shape")
        window = Window.of(y if transposed else x, fixed(w)[2:], strides, dilations, pads, auto_pad)
        if any(more >= step for more, step in zip(output_padding or (), window.strides, strict=False)):
            raise NoGradient("its output_padding is as large as its stride")
        return rule(g, x, w, window, group)

    return of_node


def conv_input(g: Tensor, x: Tensor, w: Tensor, window: Window, group: int) -> Tensor:
    """The transposed convolution; of single elements, a convolution with the transposed weights."""
    if window.point and group == 1:
        return g.op("Conv", w.transpose([1, 0, *range(2, w.rank)]))
    return spread(g, w, x, window, group)


def conv_weights(g: Tensor, x: Tensor, w: Tensor, window: Window, group: int) -> Tensor:
    """Patches times the gradient."""
    return correlate(x, g, fixed(w), window, group)


def conv_transpose_input(g: Tensor, x: Tensor, w: Tensor, window: Window, group: int) -> Tensor:
    """The convolution that it is the transpose of."""
    return g.op("Conv", w, strides=list(window.strides), dilations=list(window.dilations), group=group,
                pads=window.pads)  # fmt: skip


def conv_transpose_weights(g: Tensor, x: Tensor, w: Tensor, window: Window, group: int) -> Tensor:
    """As of a convolution, with input and gradient exchanged."""
    return correlate(g, x, fixed(w), window, group)


def correlate(x: Tensor, g: Tensor, shape: Sequence[int], window: Window, group: int) -> Tensor:
    """Sums over samples and positions of products of `g` with the window's patches of `x`.

    Args:
        x: What the window moves over, [N, C, ...].
        g: The gradient at each of its positions, [N, O, ...].
        shape: Of the weights, [O, C / group, ...].
        window: The window.
        group: How many groups of channels are apart.
    """
    out, per_group = shape[0], shape[1]
    channels, batch = per_group * group, (g.shape or x.shape or (None,))[0]
    if group == 1 and window.point:
        rows, columns = g.reshape([0, out, -1]), x.reshape([0, channels, -1])
        return (rows @ columns.swap(3)).sum([0]).reshape(shape)
    if group == 1 and set(window.strides) == {1} and channels >= _FEW_CHANNELS:
        return correlate_densely(x, g, shape, window)
    if group == out == channels and isinstance(batch, int):
        return correlate_by_channel(x, g, shape, window, batch)
    found = patches(x, channels, window).reshape([0, group, per_group * window.taps, -1])
    rows = g.reshape([0, group, out // group, -1])
    return (rows @ found.swap(4)).sum([0]).reshape(shape)


def correlate_densely(x: Tensor, g: Tensor, shape: Sequence[int], window: Window) -> Tensor:
    """The same for stride 1 and one group: products of shifted copies, which take less memory than patches.

    The gradient is shifted along all axes but the last, and its copies are stacked as channels; `x` is shifted along
    the last. So a window of k × k needs k products of matrices, with k times as many rows.
    """
    axes, (out, channels, *kernel) = len(window.kernel), shape
    rows = []
    for tap in np.ndindex(*kernel[:-1]):
        moved = g
        for axis, place in enumerate(tap):
            moved = shifted(moved, 2 + axis, axes, place * window.dilations[axis] - window.begin[axis], x)
        rows.append(moved)
    stacked = concat(rows, 1).reshape([0, math.prod(kernel[:-1]) * out, -1])
    products = []
    for place in range(kernel[-1]):
        moved = shifted(x, 1 + axes, axes, window.begin[-1] - place * window.dilations[-1], g)
        product = stacked @ moved.reshape([0, channels, -1]).swap(3)
        products.append(product.sum([0]).unsqueeze([2]))  # [rows, C, 1]
    found = concat(products, 2).reshape([*kernel[:-1], out, channels, kernel[-1]])
    return found.transpose([axes - 1, axes, *range(axes - 1), axes + 1])


def correlate_by_channel(x: Tensor, g: Tensor, shape: Sequence[int], window: Window, batch: int) -> Tensor:
    """The same for a depthwise convolution on a batch of known size: a convolution of every image with its gradient.

    Each channel of each sample is a group of its own. The gradient is the kernel: its elements are as far apart as the
    window's steps, and the result's are as far apart as the window's taps.
    """
    build, channels, axes = x.builder, shape[0], len(window.kernel)
    images = [t.reshape(concat([build.ints(*lead), t.op("Shape", elem_type=INT64, start=2, end=2 + axes)], 0))
              for t, lead in ((x, (1, batch * channels)), (g, (batch * channels, 1)))]  # fmt: skip
    found = images[0].op("Conv", images[1], group=batch * channels, strides=list(window.dilations),
                         dilations=list(window.strides), pads=window.pads)  # fmt: skip
    places = build.ints(*range(2, 2 + axes))
    exact = found.op("Slice", build.ints(*[0] * axes), build.ints(*window.kernel), places)
    return exact.reshape([batch, channels, -1]).sum([0]).reshape(shape)


def shifted(x: Tensor, axis: int, axes: int, before: int, like: Tensor) -> Tensor:
    """A tensor moved along an axis, with zeros in place of what is missing, and with the size of another one there.

    Args:
        x: The tensor.
        axis: The axis.
        axes: Number of spatial axes.
        before: How many zeros come before, negative to remove elements.
        like: The other tensor.
    """
    sizes = [None if t.shape is None else t.shape[axis] for t in (x, like)]
    build, behind = x.builder, 1 + axes - axis
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        missing = sizes[1] - sizes[0] - before
        return x if before == missing == 0 else padded(x, build.ints(before), build.ints(missing), axis, behind)
    start = build.ints(before)
    return padded(x, start, like.dim(axis) - x.dim(axis) - start, axis, behind)


def patches(x: Tensor, channels: int, window: Window) -> Tensor:
    """The elements under the window at every position, [N, channels * taps, ...], by one-hot kernels."""
    build, taps = x.builder, window.taps
    one_hot = x.number(np.eye(taps).reshape(taps, 1, *window.kernel))
    kernels = one_hot.op("Tile", build.ints(channels, *[1] * (1 + len(window.kernel))))
    return x.op("Conv", kernels, group=channels, strides=list(window.strides), dilations=list(window.dilations),
                pads=window.pads)  # fmt: skip


def channel_sums(g: Tensor, y: Tensor, *_: Tensor) -> Tensor:
    """Sums over all axes but the channels'."""
    return g.sum([0, *range(2, y.rank)])


def fixed(x: Tensor) -> list[int]:
    """The shape of a tensor whose sizes are all fixed."""
    sizes = [size for size in x.sizes if isinstance(size, int)]
    if len(sizes) < len(x.sizes):
        raise NoGradient(f"the shape of {x.name!r} is not fixed")
    return sizes


CONVOLUTIONS: dict[str, tuple[Vjp, ...]] = {
    "Conv": (windowed(conv_input), windowed(conv_weights), channel_sums),
    "ConvTranspose": (windowed(conv_transpose_input, True), windowed(conv_transpose_weights, True), channel_sums),
}
