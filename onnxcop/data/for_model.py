"""Opening calibration data for an analysed model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from onnxcop.analysis.analyze import Analysis
from onnxcop.data.batching import fit_batch_size
from onnxcop.data.guess_check import check_guess
from onnxcop.data.open import CalibrationData, Preprocess, open_source
from onnxcop.data.options import DataOptions
from onnxcop.data.text import with_tokenizer
from onnxcop.graph.input_spec import InputSpec
from onnxcop.images.declared import Declared
from onnxcop.runtime.inputs import model_inputs

log = logging.getLogger("onnxcop")

_SAMPLES = 512  # of the data, unless told
_LOOKED_AT = 16  # samples that are looked at before a run
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
    analysis: Analysis, options: DataOptions, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> CalibrationData | None:
    """Open the user's data; None if there is none.

    Args:
        analysis: The model.
        options: The data, and how to read them.
        input_shapes: Sizes for dynamic axes, by input name.

    Raises:
        CalibrationError: The data cannot be read or do not fit the inputs.
    """
    asked = options.preprocess
    if isinstance(asked, str):
        asked = Preprocess.named(asked)  # a name that does not exist is refused without data too
    if options.data is None:
        return None
    data = with_tokenizer(options.data, options.tokenizer)

    def opened(preprocess: Preprocess | None, samples: int, declared: Declared | None, log: bool) -> CalibrationData:
        return open_source(
            data, input_specs(analysis), preprocess=preprocess, samples=samples,
            batch_size=options.batch_size, seed=options.seed, input_shapes=input_shapes,
            settled_shapes=analysis.input_shapes, declared=declared, log_reading=log,
        )  # fmt: skip

    def reopened(preprocess: Preprocess, samples: int) -> CalibrationData:
        return opened(preprocess, samples, None, log=False)

    samples = default_samples(analysis) if options.samples is None else options.samples
    source = fit_batch_size(analysis.original, opened(asked, samples, analysis.images, log=True))
    doubt = emptiness(source)
    if doubt:
        log.warning("the calibration data tell nothing: %s; give samples as the model will see them", doubt)
    doubt = check_guess(analysis, source, reopened) if isinstance(data, str | os.PathLike | np.ndarray) else ""
    if doubt:
        log.warning("%s", doubt)
    return source


def emptiness(source: CalibrationData) -> str:
    """Why statistics of the data mean nothing, judged by some samples; empty where they may."""
    taken = source.take(_LOOKED_AT)
    samples = [{name: array for name, array in feed.items() if array.dtype.kind in "biuf"} for feed in taken.batches(1)]
    real = [array for feed in samples for array in feed.values() if array.dtype.kind == "f" and array.size > 1]
    if real and all(array.min() == array.max() for array in real):
        return f"each of {taken.count} samples looked at is one number throughout"
    first, *others = samples
    if (
        first
        and others
        and all(np.array_equal(array, other[name]) for other in others for name, array in first.items())
    ):
        return f"the {taken.count} samples looked at are all the same"
    return ""


def default_samples(analysis: Analysis) -> int:
    """How many samples to calibrate on: more of a network that is quickly run, where they cost little."""
    macs = max(float(analysis.cost.original()[0]), 1.0)
    return int(np.clip(_AFFORDABLE / macs, _SAMPLES, 2 * _SAMPLES))
