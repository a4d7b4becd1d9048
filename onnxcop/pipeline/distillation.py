"""Distillation at the end of a run: the pruned model learns the original's outputs."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import onnx

from onnxcop.errors import CalibrationError
from onnxcop.pipeline.decide import Request
from onnxcop.pipeline.finish import measured_again
from onnxcop.pipeline.options import PruneOptions
from onnxcop.recovery.metric import Metric
from onnxcop.report.result import PruneResult
from onnxcop.training.distill import DistillOptions, distill
from onnxcop.training.schedule import Effort

log = logging.getLogger("onnxcop")


def check_distillation(options: PruneOptions) -> None:
    """Refuse impossible distillation, before any work is done.

    Raises:
        CalibrationError: There are no data, or the effort is not valid.
    """
    if options.distill is None:
        if options.checkpoint is not None:
            raise CalibrationError("--checkpoint keeps the state of distillation; give --distill")
        return
    Effort.of(options.distill)
    if options.data is None:
        raise CalibrationError("--distill needs representative samples; give --data")


def distilled(request: Request, result: PruneResult) -> PruneResult:
    """Distill a result as requested; return the better of both on held-out samples.

    Args:
        request: The request.
        result: The result of closed-form recovery.

    Raises:
        OnnxcopError: The samples or the model cannot be used for distillation.
    """
    asked, source = request.asked, request.source
    if asked.distill is None or source is None:
        return result
    options = DistillOptions(
        effort=Effort.of(asked.distill), seed=asked.seed, checkpoint=asked.checkpoint, engine=request.options
    )
    with request.clock.stage("distillation"):
        distillation = distill(result.model, request.analysis.original, source, options, request.progress)
    log.info("%s", distillation)
    if distillation.stops:
        log.info("gradients stop at %d nodes: %s", len(distillation.stops), "; ".join(distillation.stops[:3]))
    said = str(distillation)
    if distillation.kept:
        scores = _scores(asked.metric, result, distillation.model)
        if any(scores[name] < result.report.quality[name] for name in scores):
            said = "distillation lowers the metric: the result in closed form is kept"
        else:
            result = measured_again(result, distillation.model, request.unseen, scores)
    report = replace(result.report, choices=(*result.report.choices, said), seconds=dict(request.clock.seconds))
    plan = replace(result.plan, settings={**result.plan.settings, "distill": asked.distill})
    return replace(result, report=report, plan=plan)


def _scores(metric: Any, result: PruneResult, model: onnx.ModelProto) -> dict[str, float]:
    """The user's metric of the original and of a model, under the names of the report."""
    if metric is None:
        return {}
    quality, name = result.report.quality, Metric.known(metric, 0.0).name
    before = quality[f"{name} before"]
    return {f"{name} before": before, f"{name} after": Metric.known(metric, before)(model)}
