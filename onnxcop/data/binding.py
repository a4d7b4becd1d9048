"""Binding of arrays to a model's inputs: which array feeds which input, and where its samples are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import Array, Feed
from onnxcop.data.inputs import BatchLayout, fits
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec, format_shape
from onnxcop.images.declared import Declared
from onnxcop.images.preprocess import Preprocess
from onnxcop.images.reader import ImageReader, image_layout, image_reader


@dataclass(frozen=True, slots=True)
class ArrayView:
    """The samples in one array.

    Attributes:
        count: Number of samples.
        take: Takes the i-th sample, with the rank of the input and size 1 on its batch axis, if it has one.
        shared: Whether one sample is used with every sample of the other inputs.
    """

    count: int
    take: Callable[[Array, int], Array]
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Binding:
    """The arrays that feed the inputs.

    Attributes:
        keys: The array's key by input name.
        views: The view of that array by input name.
        count: The number of samples.
    """

    keys: Mapping[str, str]
    views: Mapping[str, ArrayView]
    count: int


class Binder:
    """Binds named arrays to the inputs of one model.

    Args:
        layout: The model's inputs and their batch axes.
        preprocess: Preprocessing that the user asks for, for image files and arrays of bytes.
        declared: Preprocessing that the model declares.
        settled: Concrete shapes of the inputs, for the size of images if an input leaves it open.
    """

    def __init__(
        self,
        layout: BatchLayout,
        preprocess: Preprocess | None = None,
        declared: Declared | None = None,
        settled: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.layout = layout
        self.readers: dict[str, ImageReader] = {}  # image readers by input, made on first use
        self._preprocess = preprocess
        self._declared = declared
        self._settled = settled or {}

    def reader(self, spec: InputSpec) -> ImageReader:
        """The image reader of an input."""
        if spec.name not in self.readers:
            settled = self._settled.get(spec.name)
            shape = None if settled is None else tuple(settled)
            self.readers[spec.name] = image_reader(spec, self._preprocess, self._declared, shape)
        return self.readers[spec.name]

    def bind(self, arrays: Mapping[str, Array], origin: str) -> Binding:
        """Choose an array for every input.

        By name; else by position for the names that `numpy.savez` gives to unnamed arrays; else the only array with a
        fitting rank, sizes and type. Other arrays are ignored.

        Args:
            arrays: Arrays by key; only shape and dtype are used.
            origin: The file or object that they come from, for messages.

        Raises:
            CalibrationError: An input has no array, or one that does not fit.
        """
        specs = self.layout.specs
        keys = {spec.name: spec.name for spec in specs if spec.name in arrays}
        positional = [f"arr_{place}" for place in range(len(specs))]
        if not keys and list(arrays) == positional:
            keys = {spec.name: key for spec, key in zip(specs, positional, strict=True)}
        for spec in specs:
            if spec.name not in keys:
                free = {key: arrays[key] for key in arrays if key not in keys.values()}
                keys[spec.name] = self._choose(spec, free, origin)
        views = {
            spec.name: self._view(spec, arrays[keys[spec.name]], f"{origin}: '{keys[spec.name]}'") for spec in specs
        }
        counts = {name: view.count for name, view in views.items() if not view.shared}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"'{name}' has {count}" for name, count in counts.items())
            raise CalibrationError(
                f"{origin}: the inputs differ in their number of samples ({listed}); give as many for each"
            )
        return Binding(keys, views, next(iter(counts.values()), 1))

    def sample(self, binding: Binding, arrays: Mapping[str, Array], index: int, origin: str) -> Feed:
        """The `index`-th sample of bound arrays, in the dtypes of the inputs."""
        feed = {}
        for spec in self.layout.specs:
            view = binding.views[spec.name]
            taken = view.take(arrays[binding.keys[spec.name]], 0 if view.shared else index)
            feed[spec.name] = cast(taken, spec, f"{origin}, sample {index + 1}")
        return feed

    def _choose(self, spec: InputSpec, free: Mapping[str, Array], origin: str) -> str:
        fitting = [
            key
            for key, array in free.items()
            if castable(array.dtype, spec.dtype) and self._find_view(spec, array) is not None
        ]
        exact = [key for key in fitting if free[key].dtype == spec.dtype]
        for candidates in (fitting, exact):
            if len(candidates) == 1:
                return candidates[0]
        if not fitting and len(free) == 1 and len(self.layout.specs) == 1:
            return next(iter(free))  # so that the message says why it does not fit
        contents = ", ".join(f"'{key}' {_describe(array)}" for key, array in free.items()) or "nothing"
        problem = "several arrays fit" if fitting else "no array is for"
        raise CalibrationError(
            f"{origin}: {problem} the model's input {spec}; it holds {contents}; name the array '{spec.name}'"
        )

    def _view(self, spec: InputSpec, array: Array, label: str) -> ArrayView:
        view = self._find_view(spec, array)
        if view is None:
            dims = self.layout.sample_dims(spec)
            expected = f"samples of {format_shape(dims)}, stacked or one by one"
            if array.ndim == 4 and fits([array.shape[place] for place in (0, 3, 1, 2)], spec.shape):
                expected += " (this looks channels-last: transpose it, or give uint8 images)"
            raise CalibrationError(
                f"{label} {_describe(array)} does not fit the model's input {spec}; expected {expected}"
            )
        if not castable(array.dtype, spec.dtype):
            raise CalibrationError(
                f"{label} {_describe(array)} cannot be converted to {spec.dtype.name} for the "
                f"model's input {spec}; convert it first"
            )
        return view

    def _find_view(self, spec: InputSpec, array: Array) -> ArrayView | None:
        if array.dtype == np.uint8 and self._is_picture(spec):
            view = _picture_view(array.shape, self.reader(spec))
            if view is not None:
                return view
        axis = self.layout.axes[spec.name]
        if axis is None:
            return _whole_view(array.shape, spec)
        return _stacked_view(array.shape, spec, axis)

    def _is_picture(self, spec: InputSpec) -> bool:
        explicit = self._preprocess is not None and self._preprocess.layout is not None
        return image_layout(spec) is not None or (explicit and len(spec.shape) == 4)


def _stacked_view(shape: tuple[int, ...], spec: InputSpec, axis: int) -> ArrayView | None:
    """Samples along the batch axis of an input."""
    rank = len(spec.shape)
    dims = spec.shape[:axis] + spec.shape[axis + 1 :]
    if len(shape) == rank and fits(shape[:axis] + shape[axis + 1 :], dims):
        before = (slice(None),) * axis
        return ArrayView(shape[axis], lambda array, i: array[(*before, slice(i, i + 1))])
    if len(shape) == rank - 1 and fits(shape, dims):  # one sample
        return ArrayView(1, lambda array, _: np.expand_dims(array, axis))
    if len(shape) == rank + 1 and axis == 0 and fits(shape[2:], dims):  # batches of samples
        size = shape[1]
        return ArrayView(shape[0] * size, lambda array, i: array[i // size, i % size : i % size + 1])
    for place, expected in enumerate(spec.shape):  # an axis of size 1 left out, as gray images do
        if expected == 1 and place != axis and len(shape) == rank - 1:
            inner = _stacked_view((*shape[:place], 1, *shape[place:]), spec, axis)
            if inner is not None:
                return _widened(inner, place)
    return None


def _widened(view: ArrayView, place: int) -> ArrayView:
    return ArrayView(view.count, lambda array, i: view.take(np.expand_dims(array, place), i))


def _whole_view(shape: tuple[int, ...], spec: InputSpec) -> ArrayView | None:
    """Samples that are complete values of an input without a batch axis."""
    if fits(shape, spec.shape):
        return ArrayView(1, lambda array, _: array, shared=True)
    if fits(shape[1:], spec.shape) and len(shape) > 0:
        return ArrayView(shape[0], lambda array, i: array[i], shared=shape[0] == 1)
    size = spec.shape[0] if spec.shape else None
    if isinstance(size, int) and fits(shape[1:], spec.shape[1:]) and shape and shape[0] >= size:
        # Rows in a file that go through the model `size` at a time.
        return ArrayView(shape[0] // size, lambda array, i: array[i * size : (i + 1) * size])
    return None


def _picture_view(shape: tuple[int, ...], reader: ImageReader) -> ArrayView | None:
    """Images in an array of bytes: N H W C, N C H W, N H W, H W C, C H W or H W."""
    last = len(shape) > 2 and shape[-1] in (1, 3, 4)
    gray_stack = len(shape) == 3 and reader.channels == "gray"  # [3, H, W] is three images
    first = len(shape) > 2 and shape[-3] in ((1,) if gray_stack else (1, 3)) and not last
    many = len(shape) == 4 or (len(shape) == 3 and not last and not first)
    if len(shape) not in (2, 3, 4) or (len(shape) == 4 and not last and not first):
        return None

    def take(array: Array, index: int) -> Array:
        pixels = array[index] if many else array
        if first:
            pixels = pixels.transpose(1, 2, 0)
        elif not last:
            pixels = pixels[:, :, None]
        return reader.from_pixels(np.asarray(pixels))[None]

    return ArrayView(shape[0] if many else 1, take)


def castable(source: np.dtype[np.generic], target: np.dtype[np.generic]) -> bool:
    """Whether values of one dtype may be converted to that of an input implicitly."""
    if source == target or target.kind == "O":
        return True
    if target.kind == "V":  # bfloat16 and float8, which numpy's rules do not know
        return source.kind in "iufbV"
    if source.kind in "iub" and target.kind in "iu":
        return True  # :func:`cast` checks the range
    return bool(np.can_cast(source, target, casting="same_kind")) and source.kind != "O"


def cast(array: Array, spec: InputSpec, origin: str) -> Array:
    """`array` in the dtype of an input, contiguous and in memory.

    Raises:
        CalibrationError: Values do not fit into the input's type, or are not finite.
    """
    if array.dtype.kind in "iu" and spec.dtype.kind in "iu" and array.size:
        limits = np.iinfo(spec.dtype)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise CalibrationError(
                f"{origin}: values {low}..{high} do not fit the model's input {spec}; give {limits.min}..{limits.max}"
            )
    if array.dtype.kind == "f":
        _check_finite(array, spec, origin)
    with np.errstate(over="ignore"):
        result = np.array(array, dtype=spec.dtype, order="C", copy=True)
    if array.dtype.kind == "f" and spec.dtype.kind == "f" and np.isinf(result).sum() > np.isinf(array).sum():
        raise CalibrationError(
            f"{origin}: a sample of the model's input {spec} holds {np.abs(array[np.isfinite(array)]).max():.3g}, more "
            f"than {spec.dtype.name} can hold; scale it"
        )
    return result


def _check_finite(array: Array, spec: InputSpec, origin: str) -> None:
    """Refuse NaN and infinity; minus infinity is allowed, because masks that are added to scores contain it."""
    for what, mask in (("NaN", np.isnan(array)), ("infinity", np.isposinf(array))):
        if mask.any():
            raise CalibrationError(f"{origin}: a sample of the model's input {spec} holds {what}; repair or remove it")


def _describe(array: Array) -> str:
    return f"{array.dtype.name}{format_shape(array.shape)}"
