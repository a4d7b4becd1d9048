"""Opening calibration data for an analysed model, and making some up where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxcop.analysis import Analysis
from onnxcop.data import CalibrationData, Preprocess, open_source
from onnxcop.probe import model_inputs
from onnxcop.specs import InputSpec
from onnxcop.together import fitting

_SAMPLES = 512  # of the data, unless told
_AFFORDABLE = 5e10  # multiply-accumulates over all samples, up to which there may be more of them


def input_specs(analysis: Analysis) -> list[InputSpec]:
    """What the model must be fed with."""
    return [
        InputSpec(
            value.name,
            np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            tuple(
                dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param or None
                for dim in value.type.tensor_type.shape.dim
            ),
        )
        for value in model_inputs(analysis.original)
    ]


def open_data(
    analysis: Analysis, data: Any, preprocess: Preprocess | None, samples: int | None, batch_size: int, seed: int,
    input_shapes: Mapping[str, Sequence[int]] | None,
) -> CalibrationData | None:  # fmt: skip
    """Open the user's data; None where there is none."""
    if data is None:
        return None
    samples = default_samples(analysis) if samples is None else samples
    source = open_source(
        data, input_specs(analysis), preprocess=preprocess, samples=samples, batch_size=batch_size,
        seed=seed, input_shapes=input_shapes,
    )  # fmt: skip
    return fitting(analysis.original, source)


def default_samples(analysis: Analysis) -> int:
    """How many samples to calibrate on: more of a network that is quickly run, where they cost little."""
    macs = max(float(analysis.cost.original()[0]), 1.0)
    return int(np.clip(_AFFORDABLE / macs, _SAMPLES, 2 * _SAMPLES))


def synthetic_data(analysis: Analysis, samples: int, batch_size: int, seed: int) -> CalibrationData:
    """Inputs made up for a model without data: smooth noise, whose spectrum falls off as in natural signals.

    White noise excites a network's first filters as nothing natural does; noise with a 1/f spectrum
    along the spatial axes comes much nearer.
    """
    rng = np.random.default_rng(seed)
    specs = input_specs(analysis)

    def feeds() -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        for _ in range(samples):
            yield {spec.name: _draw(rng, spec, analysis.input_shapes[spec.name]) for spec in specs}

    source = open_source(
        list(feeds()), specs, samples=samples, batch_size=batch_size, seed=seed,
        input_shapes={name: shape for name, shape in analysis.input_shapes.items() if name in {s.name for s in specs}},
    )  # fmt: skip
    return fitting(analysis.original, source)


def _draw(rng: np.random.Generator, spec: InputSpec, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    if spec.dtype.kind == "b":
        return rng.random(tuple(shape)) < 0.5
    if spec.dtype.kind in "iu":
        high = 256 if spec.dtype.itemsize == 1 else 2
        return np.asarray(rng.integers(0, high, tuple(shape))).astype(spec.dtype)
    values = np.asarray(rng.standard_normal(tuple(shape)))
    axes = [axis for axis, size in enumerate(shape) if axis > 0 and size > 4]
    if axes:
        spectrum = np.fft.fftn(values, axes=axes)
        squared = np.zeros([1] * values.ndim)
        for axis in axes:
            frequency = np.fft.fftfreq(shape[axis]) * shape[axis]
            squared = squared + (frequency**2).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
        values = np.fft.ifftn(spectrum / np.sqrt(squared + 1.0), axes=axes).real
        values = values / max(float(values.std()), 1e-12) * rng.uniform(0.5, 1.5) + 0.3 * rng.standard_normal()
    return values.astype(spec.dtype)
