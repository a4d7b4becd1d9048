"""Recovery as a stage of its own, for those who string the stages together themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx

from onnxcop.analysis import Analysis
from onnxcop.arrays import IntArray
from onnxcop.clock import Clock
from onnxcop.data import Preprocess
from onnxcop.decide import recover_units
from onnxcop.engine import EngineOptions
from onnxcop.errors import CalibrationError
from onnxcop.gather import open_data
from onnxcop.progress import Callback, shown
from onnxcop.recover import RecoverySettings


def recover(
    analysis: Analysis,
    removed: IntArray,
    data: Any,
    *,
    preprocess: Preprocess | str | None = None,
    samples: int | None = None,
    batch_size: int = 32,
    settings: RecoverySettings | None = None,
    options: EngineOptions = EngineOptions(),
    seed: int = 0,
    progress: Callback | bool | None = None,
) -> onnx.ModelProto:
    """Let the units that stay make up for those that go, in closed form.

    Args:
        analysis: The model, analysed with `biases=True` so that every layer has a bias to correct.
        removed: int64, the units to remove.
        data: Calibration data (see :func:`onnxcop.data.open_source`).
        preprocess: What is done to pictures, or its name, `imagenet` say; None to guess it.
        samples: How many samples of the data are used; None for 512, or up to 1,024 of a quick model.
        batch_size: Samples that run at once.
        settings: How hard recovery tries.
        options: How models are run.
        seed: Of the choice of samples.
        progress: True for bars, or a function called with (stage, done, total).

    Returns:
        The analysed model, in the shapes of the original, with other weights: what
        :func:`onnxcop.apply` cuts to size.

    Raises:
        CalibrationError: There are no data, or they do not fit.
    """
    source = open_data(analysis, data, preprocess, samples, batch_size, seed, analysis.input_shapes)
    if source is None:
        raise CalibrationError("recovery needs calibration data; pass data=")
    chosen = replace(settings or RecoverySettings(), seed=seed)
    with shown(progress) as tell:
        return recover_units(analysis, removed, source, chosen, options, tell, Clock()).model
