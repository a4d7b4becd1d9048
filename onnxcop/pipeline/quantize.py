"""int8 after pruning: ONNX Runtime's own quantization, with the calibration data of the run."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx

from onnxcop._base.keywords import by_keywords
from onnxcop._base.lookup import check_known
from onnxcop._base.types import Array, Feed
from onnxcop.analysis.analyze import analyze
from onnxcop.data.open import CalibrationData, open_data
from onnxcop.errors import CalibrationError, ModelError, OnnxcopError
from onnxcop.graph import io as models
from onnxcop.pipeline.decide import Request
from onnxcop.pipeline.options import PruneOptions, Quantization
from onnxcop.pipeline.unseen import UnseenSamples
from onnxcop.reconstruction.divergence import Figures
from onnxcop.recovery.equalize import equalized
from onnxcop.recovery.int8 import with_fitted_layers
from onnxcop.recovery.int8_ranges import around_layers, least_error_ranges, quantized_tensors
from onnxcop.report.result import PruneResult
from onnxcop.report.summary import Int8Report
from onnxcop.runtime.latency import timed
from onnxcop.verification.dequantize import rounds

log = logging.getLogger("onnxcop")

_SAMPLES = 128  # samples for the ranges of activations
_HELD_OUT = 64  # other samples, which choose between candidates; a third if there are few
_LAYERS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]
_WORTH_FLOAT = 0.7  # share of the divergence below which other operators stay in floating point
_WORTH_ENDS = 0.95  # the same for the first and last layers
_FIRST, _LAST = 0.1, 0.25  # share of the layers that are called so
_POWERS = 2.0, 3.0  # of the error, if all operators are quantized, and if only layers are
_FEWEST = 6  # samples of which some are held out
_BATCH, _LARGEST_BATCH = 4, 1 << 22  # samples, and bytes of their inputs
_LARGEST = 1 << 28  # bytes of all inputs


@by_keywords(PruneOptions)
def quantize(model: onnx.ModelProto | str | Path, mode: Quantization, asked: PruneOptions) -> onnx.ModelProto:
    """Quantize a model to int8 with ONNX Runtime.

    `static` inserts QuantizeLinear and DequantizeLinear pairs, with ranges of activations from the data and a scale
    per channel of the weights. Channels of one tensor are balanced, ranges have the least error, and layers are fitted
    to the rounding, where that helps on held-out samples. `dynamic` quantizes weights ahead of time and activations at
    run time.

    Args:
        model: A path or a model in memory (never changed).
        mode: `static` or `dynamic`.
        asked: The fields of :class:`onnxcop.PruneOptions` that say what the data are and how models are run, as
            keyword arguments.

    Raises:
        CalibrationError: `static` without data.
        ModelError: The model is already quantized, or ONNX Runtime cannot quantize it.
    """
    check_quantization(mode, asked.data)
    analysis = analyze(model, input_shapes=asked.input_shapes, options=asked.engine)
    source = open_data(analysis, asked, asked.input_shapes)
    return in_int8(analysis.original, mode, source, asked, name=analysis.source)[0]


def check_quantization(mode: str | None, data: object) -> None:
    """Refuse impossible quantization before anything is run.

    Raises:
        CalibrationError: Static quantization without data.
        ModelError: A mode that does not exist.
    """
    if mode is not None:
        check_known(mode, get_args(Quantization), "quantization")
    if mode == "static" and data is None:
        raise CalibrationError("static quantization takes ranges from calibration data; give --data, or use dynamic")


def with_int8(request: Request, result: PruneResult) -> PruneResult:
    """The result with an int8 model beside it if requested, timed and compared like the pruned one."""
    asked, analysis, unseen = request.asked, request.analysis, request.unseen
    if asked.then_quantize is None:
        return result
    with request.clock.stage("quantization"):
        name = f"the pruned {analysis.source}"
        model, chosen = in_int8(result.model, asked.then_quantize, request.source, asked, name)
        engine, seconds = asked.engine, asked.latency_seconds
        latency = timed(analysis.original, model, analysis.timing_feed, engine, seconds) if seconds > 0 else None
        figures = None if unseen is None else unseen.figures(model)
    report_int8 = Int8Report(
        mode=asked.then_quantize, chosen=chosen, bytes=model.ByteSize(), latency=latency, figures=figures
    )
    report = replace(result.report, int8=report_int8, seconds=dict(request.clock.seconds))
    return replace(result, report=report, int8=model)


def in_int8(
    model: onnx.ModelProto, mode: str, source: CalibrationData | None, asked: PruneOptions, name: str = "the model"
) -> tuple[onnx.ModelProto, str]:
    """Quantize a model, by the method whose result is closest to it on held-out samples.

    Results are compared with the model itself, also if it was pruned: beside what pruning changed, a difference
    between two methods would hardly show.

    Args:
        model: The model in floating point.
        mode: `static` or `dynamic`.
        source: Calibration data; None for dynamic quantization without any.
        asked: Options of the run: engine and task.
        name: Name of the model in messages.

    Returns:
        The int8 model, and a description of how it was made.

    Raises:
        ModelError: The model is already quantized, or ONNX Runtime cannot quantize it.
    """
    if rounds(model):
        raise ModelError(f"{name} is already quantized")
    with tempfile.TemporaryDirectory(prefix="onnxcop-") as folder, _quiet():
        try:
            plain = prepared(model, Path(folder))
            if mode == "dynamic" or source is None:
                quantized, chosen = _dynamic(plain, Path(folder)), ""
            else:
                quantized, chosen = _static(plain, Path(folder), source, asked, model)
        except OnnxcopError:
            raise
        except Exception as error:  # the quantizer may raise anything for a graph that it does not accept
            cause = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(f"ONNX Runtime cannot quantize {name}: {cause}") from error
    for entry in model.metadata_props:  # the quantizer drops some
        if entry.key not in {kept.key for kept in quantized.metadata_props}:
            quantized.metadata_props.append(entry)
    return quantized, chosen


def prepared(model: onnx.ModelProto, folder: Path) -> Path:
    """Path of a model that is prepared for the quantizer: shapes inferred, batch normalizations folded."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, prepared = folder / "plain.onnx", folder / "prepared.onnx"
    models.save(model, plain)
    try:
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    except Exception as error:  # preparation is optional
        log.debug("preparing for quantization: %s", error)
        return plain
    return prepared


def _dynamic(plain: Path, folder: Path) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(plain, folder / "int8.onnx", per_channel=True, weight_type=QuantType.QInt8)
    return models.load(folder / "int8.onnx")


@dataclass(frozen=True, slots=True)
class Int8Choice:
    """An int8 model to choose.

    Attributes:
        judged: How it differs from the model in floating point on held-out samples; None if that is not known.
        int8: The model.
        base: The model that was quantized.
        said: Description of its ranges.
    """

    judged: Figures | None
    int8: onnx.ModelProto
    base: onnx.ModelProto
    said: str

    @property
    def distance(self) -> float:
        """Divergence; infinite if it is not known."""
        return math.inf if self.judged is None else self.judged.divergence.value

    def agrees_more(self, other: Int8Choice) -> bool:
        """Whether predictions of an output agree more often than another choice's, beyond both intervals."""
        if self.judged is None or other.judged is None:
            return False
        return any(
            one.agreement is not None
            and two.agreement is not None
            and one.agreement.low is not None
            and two.agreement.high is not None
            and one.agreement.low > two.agreement.high
            for one, two in zip(self.judged.outputs, other.judged.outputs, strict=True)
        )


def _static(
    plain: Path, folder: Path, source: CalibrationData, asked: PruneOptions, original: onnx.ModelProto
) -> tuple[onnx.ModelProto, str]:
    """The best of several choices of ranges, then with fitted layers if they help, by held-out samples."""
    both = source.take(_SAMPLES + _HELD_OUT, asked.seed)
    share = min(_HELD_OUT, both.count // 3) / both.count
    fit, held_out = both.split(share, asked.seed) if both.count >= _FEWEST else (both, both)
    judge, feeds = UnseenSamples(original, held_out, asked.engine, asked.task), _feeds(fit, asked.seed)
    model = models.load(plain)
    base = equalized(model, feeds, asked.engine)
    extremes = _with_pairs(plain, folder, _Reader(fit))
    models.save(base, plain)
    names = [*quantized_tensors(model, extremes), *around_layers(model)]
    all_ranges, layer_ranges = least_error_ranges(base, names, feeds, asked.engine, _POWERS)
    one = fit.take(1, asked.seed)  # the quantizer needs some, though all ranges are given

    def of_layers(kept: Sequence[str], part: str) -> Int8Choice:
        int8 = _with_pairs(plain, folder, _Reader(one), _present(layer_ranges, base, kept), _LAYERS, kept)
        return Int8Choice(_judged(judge, int8), int8, base, f"ranges are those of least error, of layers alone{part},")

    whole = _with_pairs(plain, folder, _Reader(one), all_ranges)
    best = min(
        Int8Choice(_judged(judge, extremes), extremes, model, "ranges are extremes"),
        Int8Choice(_judged(judge, whole), whole, base, "ranges are those of least error"),
        key=lambda choice: choice.distance,
    )
    layers = of_layers((), "")
    if layers.distance < _WORTH_FLOAT * best.distance or layers.agrees_more(best):
        # one scale for boxes and scores would round scores to 0
        best, ends = layers, _ends(base)
        inner = of_layers(ends, " but for the first and last ones") if ends else layers
        best = inner if inner.distance < _WORTH_ENDS * best.distance else best
    balanced = ", channels balanced" if best.base is not model else ""
    fitted = with_fitted_layers(best.base, best.int8, feeds, asked.engine)
    better = fitted is not best.int8 and replace(best, judged=_judged(judge, fitted)).distance < best.distance
    done = "layers fitted" if better else "layers as they were"
    return fitted if better else best.int8, f"{best.said} on {fit.count} samples{balanced}, {done}"


def _with_pairs(
    plain: Path, folder: Path, reader: _Reader,
    ranges: Mapping[str, tuple[float, float]] | None = None, operators: list[str] | None = None,
    kept: Sequence[str] = (),
) -> onnx.ModelProto:  # fmt: skip
    """A model with QuantizeLinear and DequantizeLinear around its operators.

    Args:
        plain: The model.
        folder: Where the quantizer may write.
        reader: Samples for the ranges that are not given.
        ranges: Ranges by tensor.
        operators: Operators to quantize; None for all that can be.
        kept: Names of nodes that stay in floating point.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    given = {
        name: [{"rmin": np.float32(low), "rmax": np.float32(high)}] for name, (low, high) in (ranges or {}).items()
    }
    quantize_static(
        plain, folder / "int8.onnx", reader, quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        op_types_to_quantize=operators, nodes_to_exclude=[*kept],
        extra_options={"TensorQuantOverrides": given} if given else {},
    )  # fmt: skip
    return models.load(folder / "int8.onnx")


def _ends(model: onnx.ModelProto) -> list[str]:
    """Names of the first and the last layers of a model, in the order of its graph."""
    names = [node.name for node in model.graph.node if node.op_type in _LAYERS]
    first, last = round(_FIRST * len(names)), round(_LAST * len(names))
    return [name for name in (*names[:first], *names[len(names) - last :]) if name]


def _present(
    ranges: Mapping[str, tuple[float, float]], model: onnx.ModelProto, kept: Sequence[str]
) -> Mapping[str, tuple[float, float]]:
    """The ranges of tensors that a layer reads or makes, but for layers that are kept; all if none is."""
    if not kept:
        return ranges
    layers = [node for node in model.graph.node if node.op_type in _LAYERS and node.name not in kept]
    names = {name for node in layers for name in (*node.input, *node.output)}
    return {name: limits for name, limits in ranges.items() if name in names}


def _feeds(source: CalibrationData, seed: int) -> list[Feed]:
    """Small batches of samples that together fit into memory."""
    sample = sum(np.asarray(array).nbytes for array in next(source.batches(1)).values())
    most = max(_LARGEST // max(sample, 1), _FEWEST)
    size = min(max(_LARGEST_BATCH // max(sample, 1), 1), _BATCH)
    few = source if source.count <= most else source.take(most, seed)
    return [dict(feed) for feed in few.batches(size)]


def _judged(judge: UnseenSamples, model: onnx.ModelProto) -> Figures | None:
    """How a model differs from the one in floating point on held-out samples."""
    figures = judge.figures(model)
    log.debug("int8: divergence %s", None if figures is None else figures.divergence.value)
    return figures


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
