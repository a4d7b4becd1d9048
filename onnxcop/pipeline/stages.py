"""Recovery as a stage of its own, for those who string the stages together themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx

from onnxcop._base.progress import Callback, shown
from onnxcop._base.timing import Clock
from onnxcop._base.types import IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.data.for_model import open_data
from onnxcop.data.open import Preprocess
from onnxcop.data.options import DataOptions
from onnxcop.errors import CalibrationError
from onnxcop.pipeline.decide import recover_units
from onnxcop.recovery.rounds import RecoverySettings
from onnxcop.runtime.session import EngineOptions


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
        data: Calibration data (see :func:`onnxcop.data.open.open_source`).
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
    asked = DataOptions(data=data, preprocess=preprocess, samples=samples, batch_size=batch_size, seed=seed)
    source = open_data(analysis, asked, analysis.input_shapes)
    if source is None:
        raise CalibrationError("recovery needs calibration data; pass data=")
    chosen = replace(settings or RecoverySettings(), seed=seed)
    with shown(progress) as tell:
        return recover_units(analysis, removed, source, chosen, options, tell, Clock()).model
