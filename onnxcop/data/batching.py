"""Whether a model whose batch is dynamic takes more than one sample in a run.

Exporters declare a batch of any size and write sizes of the sample they traced with into the graph: a
Reshape to [1, 2048] runs with one sample only. Such a model is calibrated sample by sample.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx

from onnxcop._base.types import Feed
from onnxcop.data.dataset import CalibrationData
from onnxcop.errors import EngineError
from onnxcop.runtime.session import EngineOptions, Session

log = logging.getLogger("onnxcop")


def fit_batch_size(model: onnx.ModelProto, source: CalibrationData) -> CalibrationData:
    """The samples as the model takes them: one by one where it cannot be run, or mixes them, with two."""
    layout = source.layout
    if layout.size is not None or all(axis is None for axis in layout.axes.values()):
        return source
    two, one = (next(source.batches(size), {}) for size in (2, 1))
    if not _same_shapes(two, one) and not _takes(model, two, one):
        log.info("the model declares a batch of any size, but runs with one sample only: samples run one by one")
        return source.one_by_one()
    return source


def _takes(model: onnx.ModelProto, two: Feed, one: Feed) -> bool:
    """Whether it runs with two samples and then gives more than with one; so too where it does not run at all."""
    try:
        with Session(model, EngineOptions(provider="cpu")) as session:
            alone = session.run(one)
            try:
                return not _same_shapes(session.run(two), alone)
            except EngineError:
                return False
    except EngineError as error:  # whoever needs it to run will say so
        log.debug("trying two samples in a run: %s", error)
        return True


def _same_shapes(first: Feed, second: Feed) -> bool:
    return all(np.shape(array) == np.shape(second[name]) for name, array in first.items())
