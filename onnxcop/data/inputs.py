"""Inputs of a model and their batch axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnxcop._base.types import Array
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec, format_shape


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """The batch axis of each input.

    Attributes:
        specs: The inputs, with the user's shapes filled in.
        axes: Batch axis by input name, or None: such an input is fed whole, and samples share a run only if their
            values of it are equal.
        size: The number of samples in every batch if the model fixes it, else None.
    """

    specs: tuple[InputSpec, ...]
    axes: Mapping[str, int | None]
    size: int | None

    def spec(self, name: str) -> InputSpec:
        """The input called `name`, which must exist."""
        return next(spec for spec in self.specs if spec.name == name)

    def samples_in(self, feed: Mapping[str, Array]) -> int:
        """The number of samples in a batch, arrays by input name."""
        return next((feed[name].shape[axis] for name, axis in self.axes.items() if axis is not None), 1)

    def sample_dims(self, spec: InputSpec) -> tuple[int | str | None, ...]:
        """The shape of one sample of `spec`, without its batch axis."""
        axis = self.axes[spec.name]
        return spec.shape if axis is None else spec.shape[:axis] + spec.shape[axis + 1 :]


def fits(shape: Sequence[int], dims: Sequence[int | str | None]) -> bool:
    """Whether an array of `shape` has the rank and the fixed sizes of `dims`."""
    return len(shape) == len(dims) and all(
        not isinstance(dim, int) or size == dim for size, dim in zip(shape, dims, strict=True)
    )


def with_shapes(inputs: Sequence[InputSpec], input_shapes: Mapping[str, Sequence[int]] | None) -> tuple[InputSpec, ...]:
    """The inputs with the dynamic sizes that `input_shapes` gives.

    A leading 1 for a dynamic leading axis leaves the number of samples in a batch free; any other
    number fixes it.

    Raises:
        CalibrationError: `input_shapes` names an unknown input, or contradicts the model.
    """
    given = dict(input_shapes or {})
    result = []
    for spec in inputs:
        shape = given.pop(spec.name, None)
        if shape is None:
            result.append(spec)
            continue
        sizes = tuple(int(size) for size in shape)
        if not fits(sizes, spec.shape) or any(size < 1 for size in sizes):
            raise CalibrationError(
                f"input shape {format_shape(sizes)} does not fit the model's input {spec}; "
                "give one positive size per axis and keep the fixed ones"
            )
        free = bool(sizes) and sizes[0] == 1 and not isinstance(spec.shape[0], int)
        result.append(replace(spec, shape=spec.shape[:1] + sizes[1:] if free else sizes))
    if given:
        known = ", ".join(spec.name for spec in inputs)
        raise CalibrationError(f"input shape given for '{next(iter(given))}', but the model's inputs are: {known}")
    return tuple(result)


def batch_layout(specs: Sequence[InputSpec]) -> BatchLayout:
    """Find the batch axis of every input.

    A dynamic first axis is the batch, unless every such input has one axis only (a waveform of any length). Inputs with
    a fixed first axis use the axis with the batch's name. If all first sizes are fixed and equal, they are the batch.
    Sizes above 1 count as a batch only in inputs of rank 4 and more, because `[80, 3000]` is more likely a spectrogram.
    """
    ranked = [spec for spec in specs if spec.shape]
    dynamic = [spec for spec in ranked if not isinstance(spec.shape[0], int)]
    axes: dict[str, int | None] = {spec.name: None for spec in specs}
    if any(len(spec.shape) > 1 for spec in dynamic):
        return BatchLayout(tuple(specs), *_dynamic_axes(ranked, dynamic, axes))
    wide = [spec for spec in ranked if len(spec.shape) > 1]
    leading = {spec.shape[0] for spec in wide}
    if len(leading) == 1:
        size = leading.pop()
        if isinstance(size, int) and (size == 1 or max(len(spec.shape) for spec in wide) >= 4):
            axes |= {spec.name: 0 for spec in wide}
            return BatchLayout(tuple(specs), axes, size)
    return BatchLayout(tuple(specs), axes, None)


def _dynamic_axes(
    ranked: Sequence[InputSpec], dynamic: Sequence[InputSpec], axes: dict[str, int | None]
) -> tuple[dict[str, int | None], int | None]:
    axes = axes | {spec.name: 0 for spec in dynamic}
    names = Counter(name for spec in dynamic if isinstance(name := spec.shape[0], str))
    batch_name = names.most_common(1)[0][0] if names else None
    unclear = False
    for spec in ranked:
        if axes[spec.name] is None:
            if batch_name is not None and batch_name in spec.shape:
                axes[spec.name] = spec.shape.index(batch_name)
            else:
                unclear |= any(not isinstance(size, int) for size in spec.shape)
    # If a dynamic axis may or may not be the batch, one sample at a time is safe.
    return axes, 1 if unclear else None
