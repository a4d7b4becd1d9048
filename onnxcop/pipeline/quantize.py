"""int8 after pruning: ONNX Runtime's own quantization, with the calibration data of the run."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from onnxcop._base.keywords import by_keywords
from onnxcop._base.types import Array
from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.data.open import CalibrationData, open_data
from onnxcop.errors import CalibrationError, ModelError
from onnxcop.graph import io as models
from onnxcop.pipeline.options import PruneOptions
from onnxcop.verification.dequantize import rounds

log = logging.getLogger("onnxcop")

Mode = Literal["static", "dynamic"]
_SAMPLES = 128  # samples for the ranges of activations


@by_keywords(PruneOptions)
def quantize(model: onnx.ModelProto | str | Path, mode: Mode, asked: PruneOptions) -> onnx.ModelProto:
    """Quantize a model to int8 with ONNX Runtime.

    `static` inserts QuantizeLinear and DequantizeLinear pairs, with ranges of activations from the data and a scale
    per channel of the weights. `dynamic` quantizes weights ahead of time and activations at run time.

    Args:
        model: A path or a model in memory (never changed).
        mode: `static` or `dynamic`.
        asked: The fields of :class:`onnxcop.PruneOptions` that say what the data are and how models are run, as
            keyword arguments.

    Raises:
        CalibrationError: `static` without data.
        ModelError: The model is already quantized, or ONNX Runtime cannot quantize it.
    """
    if mode == "static" and asked.data is None:
        raise CalibrationError("static quantization takes ranges from calibration data; give --data, or use dynamic")
    analysis = analyze(model, input_shapes=asked.input_shapes, options=asked.engine)
    if rounds(analysis.original):
        raise ModelError(f"{analysis.source} is already quantized")
    source = open_data(analysis, asked, asked.input_shapes)
    with tempfile.TemporaryDirectory(prefix="onnxcop-") as folder, _quiet():
        try:
            return _quantized(analysis, source, mode, Path(folder))
        except Exception as error:  # the quantizer may raise anything for a graph that it does not accept
            cause = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(f"ONNX Runtime cannot quantize {analysis.source}: {cause}") from error


def _quantized(analysis: Analysis, source: CalibrationData | None, mode: Mode, folder: Path) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, prepared, result = (folder / f"{name}.onnx" for name in ("plain", "prepared", "int8"))
    models.save(analysis.original, plain)
    try:
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    except Exception as error:  # preparation is optional
        log.debug("preparing for quantization: %s", error)
        prepared = plain
    if mode == "dynamic":
        quantize_dynamic(prepared, result, per_channel=True, weight_type=QuantType.QInt8)
    else:
        assert source is not None
        quantize_static(
            prepared, result, _Reader(source.take(_SAMPLES)), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            calibration_providers=["CPUExecutionProvider"],
        )  # fmt: skip
    found = models.load(result)
    for entry in analysis.original.metadata_props:  # the quantizer drops some
        if entry.key not in {kept.key for kept in found.metadata_props}:
            found.metadata_props.append(entry)
    return found


class _Reader:
    """Feeds one by one, for ONNX Runtime's calibration."""

    def __init__(self, source: CalibrationData) -> None:
        self._source = source
        self.rewind()

    def rewind(self) -> None:
        self._feeds = iter(self._source.batches(1))

    def get_next(self) -> dict[str, Array] | None:
        feed = next(self._feeds, None)
        return None if feed is None else {name: np.asarray(array) for name, array in feed.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep output of the quantizer, and its messages in the root log, off the terminal."""
    root: Any = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
