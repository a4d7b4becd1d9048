"""Synthetic inputs for a model without data, of several families.

Natural signals are smooth: their spectrum falls off with frequency, and the channels of an image are similar. *Noise*
has such a spectrum with random phases; *waves* are a few pure frequencies, some of them clipped to steps; *white* noise
has a flat spectrum. No family resembles the model's real inputs, but a property that holds on all of them is likely to
hold there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from onnxcop._base.types import Array, FloatArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.data.open import CalibrationData, fit_batch_size, input_specs, open_source
from onnxcop.graph.input_spec import InputSpec

Family = Callable[[np.random.Generator, Sequence[int]], FloatArray]

_LONG = 4  # a longer axis is one along which signals are smooth; others are channels
_WAVES = 12  # most frequencies in a sample


def synthetic_data(
    analysis: Analysis, samples: int, batch_size: int, seed: int, family: Family | None = None
) -> CalibrationData:
    """Synthetic samples for a model's inputs.

    Args:
        analysis: The model, with the shapes of its analysis.
        samples: How many.
        batch_size: Samples per batch.
        seed: Random seed.
        family: The family of real-valued inputs; :func:`random_family` by default. Integers are 0 or 1, or
            bytes of any value.
    """
    rng = np.random.default_rng(seed)
    specs = input_specs(analysis)
    chosen = random_family if family is None else family

    def feeds() -> Iterator[dict[str, Array]]:
        for _ in range(samples):
            yield {spec.name: _draw(rng, spec, analysis.input_shapes[spec.name], chosen) for spec in specs}

    source = open_source(
        list(feeds()), specs, samples=samples, batch_size=batch_size, seed=seed,
        input_shapes={name: shape for name, shape in analysis.input_shapes.items() if name in {s.name for s in specs}},
    )  # fmt: skip
    return fit_batch_size(analysis.original, source)


def _draw(rng: np.random.Generator, spec: InputSpec, shape: Sequence[int], family: Family) -> Array:
    if spec.dtype.kind == "b":
        return rng.random(tuple(shape)) < 0.5
    if spec.dtype.kind in "iu":
        high = 256 if spec.dtype.itemsize == 1 else 2
        return np.asarray(rng.integers(0, high, tuple(shape))).astype(spec.dtype)
    return rescaled(rng, family(rng, shape)).astype(spec.dtype)


def random_family(rng: np.random.Generator, shape: Sequence[int]) -> FloatArray:
    """One of the families, float64 `shape`."""
    return (noise, waves, white)[int(rng.integers(3))](rng, shape)


def white(rng: np.random.Generator, shape: Sequence[int]) -> FloatArray:
    """Gaussian noise without any structure, float64 `shape`."""
    return np.asarray(rng.standard_normal(tuple(shape)))


def noise(rng: np.random.Generator, shape: Sequence[int]) -> FloatArray:
    """Gaussian noise with an amplitude that falls off with frequency to a random power, float64 `shape`."""
    values = np.asarray(rng.standard_normal(tuple(shape)))
    axes = _long(shape)
    if not axes:
        return values
    falling = np.fft.fftn(correlated(rng, values, axes), axes=axes) * (_radius(shape, axes) + 1.0) ** -rng.uniform(
        0.5, 1.5
    )
    return np.asarray(np.fft.ifftn(falling, axes=axes).real)


def waves(rng: np.random.Generator, shape: Sequence[int]) -> FloatArray:
    """A few pure frequencies of random direction and phase, lower ones stronger, float64 `shape`."""
    axes = _long(shape)
    if not axes:
        return np.asarray(rng.uniform(-1.7, 1.7, tuple(shape)))
    values = np.zeros(tuple(shape))
    for _ in range(int(rng.integers(3, _WAVES + 1))):
        cycles = {axis: rng.uniform(-1, 1) * (shape[axis] / 2) ** rng.uniform(0.1, 1) for axis in axes}
        place = sum(cycles[axis] * _along(axis, np.linspace(0, 1, shape[axis]), len(shape)) for axis in axes)
        small = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
        amplitude = correlated(rng, rng.standard_normal(small), axes) / (
            1 + np.sqrt(sum(c**2 for c in cycles.values()))
        )
        values = values + amplitude * np.cos(2 * np.pi * (place + rng.random()))
    if rng.random() < 0.5:
        values = np.tanh(4 * values / max(float(values.std()), 1e-12))
    return values


def rescaled(rng: np.random.Generator, values: FloatArray) -> FloatArray:
    """Values of a random deviation about a random mean, like inputs of any normalization."""
    return values / max(float(values.std()), 1e-12) * rng.uniform(0.5, 1.5) + 0.3 * rng.standard_normal()


def correlated(rng: np.random.Generator, values: FloatArray, axes: Sequence[int]) -> FloatArray:
    """Values with correlated channels (axes that are not long, after the first)."""
    others = tuple(axis for axis in range(1, values.ndim) if axis not in axes)
    if not others:
        return values
    common = values.mean(axis=others, keepdims=True)
    share = rng.uniform(0, 1)
    count = float(np.prod([values.shape[axis] for axis in others]))
    return np.asarray(share * np.sqrt(count) * common + (1 - share) * values)


def _long(shape: Sequence[int]) -> list[int]:
    return [axis for axis, size in enumerate(shape) if axis > 0 and size > _LONG]


def _radius(shape: Sequence[int], axes: Sequence[int]) -> FloatArray:
    """Distance of every entry of a spectrum from frequency zero, in cycles; broadcasts to `shape`."""
    squared = np.zeros([1] * len(shape))
    for axis in axes:
        frequency = np.fft.fftfreq(shape[axis]) * shape[axis]
        squared = squared + _along(axis, frequency**2, len(shape))
    return np.asarray(np.sqrt(squared))


def _along(axis: int, values: Array, rank: int) -> Array:
    """Values along one axis of an array, in a shape that broadcasts over the others."""
    return values.reshape([-1 if other == axis else 1 for other in range(rank)])
