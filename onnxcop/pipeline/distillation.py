"""Distillation at the end of a run: the pruned model learns the original's outputs."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import onnx

from onnxcop.errors import CalibrationError, OnnxcopError
from onnxcop.gradient.prepare import raised
from onnxcop.pipeline.decide import Request
from onnxcop.pipeline.finish import measured_again
from onnxcop.pipeline.options import PruneOptions
from onnxcop.recovery.metric import Metric
from onnxcop.report.result import PruneResult
from onnxcop.training.distill import DistillOptions, distill
from onnxcop.training.features import Feature, last_feature
from onnxcop.training.schedule import AUTO, Effort

log = logging.getLogger("onnxcop")

OFF = "none"
_ENOUGH = 1500  # samples with which the result is distilled unasked; the default number is smaller


def check_distillation(options: PruneOptions) -> None:
    """Refuse impossible distillation, before any work is done.

    Raises:
        CalibrationError: There are no data, or the effort is not valid.
    """
    if options.distill in (None, OFF):
        if options.checkpoint is not None:
            raise CalibrationError("--checkpoint keeps the state of distillation; give --distill")
        return
    Effort.of(options.distill)
    if options.data is None:
        raise CalibrationError("--distill needs representative samples; give --data")


def check_trainable(model: onnx.ModelProto, options: PruneOptions) -> None:
    """Refuse a model that is to be distilled and cannot be raised to the opset of gradients, before any work is done.

    Raises:
        ModelError: ONNX cannot convert it.
    """
    if options.distill not in (None, OFF):
        raised(model)


def distilled(request: Request, result: PruneResult) -> PruneResult:
    """Distill a result as requested; return the better of both on held-out samples.

    Unless the user chooses a length or a method of recovery, the result is distilled if there are `_ENOUGH` samples,
    for as long as the run took so far and at most as long as `auto`. Obstacles to that are no errors.

    Args:
        request: The request.
        result: The result of closed-form recovery.

    Raises:
        OnnxcopError: The samples or the model cannot be used for distillation.
    """
    asked, source = request.asked, request.source
    unasked = asked.distill is None and asked.recover == "auto" and request.modes.recover.writes
    if source is None or asked.distill == OFF or not (asked.distill or (unasked and source.count >= _ENOUGH)):
        return result
    effort = Effort.of(asked.distill) if asked.distill else replace(AUTO, seconds=sum(request.clock.seconds.values()))
    options = DistillOptions(effort=effort, seed=asked.seed, checkpoint=asked.checkpoint, engine=request.options)
    original, progress = request.analysis.original, request.progress
    try:
        with request.clock.stage("distillation"):
            distillation = distill(result.model, original, source, options, progress, _feature(result), request.crew)
    except OnnxcopError as reason:
        if asked.distill:
            raise
        log.info("no distillation: %s", reason)
        return result
    except KeyboardInterrupt as stop:
        if type(stop) is not KeyboardInterrupt:  # the process must end at once
            raise
        line = "distillation was stopped before its first step: the result in closed form is kept"
        log.warning("%s", line)
        return replace(result, report=replace(result.report, choices=(*result.report.choices, line)))
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
    plan = replace(result.plan, settings={**result.plan.settings, "distill": asked.distill or "auto"})
    return replace(result, report=report, plan=plan)


def _feature(result: PruneResult) -> Feature | None:
    """The inner tensor to match."""
    evidence = result.evidence
    return None if evidence is None else last_feature(evidence.analysis, evidence.removed, result.model)


def _scores(metric: Any, result: PruneResult, model: onnx.ModelProto) -> dict[str, float]:
    """The user's metric of the original and of a model, under the names of the report."""
    if metric is None:
        return {}
    quality, name = result.report.quality, Metric.known(metric, 0.0).name
    before = quality[f"{name} before"]
    return {f"{name} before": before, f"{name} after": Metric.known(metric, before)(model)}
