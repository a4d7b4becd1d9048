"""Distillation at the end of a run: the pruned model learns the original's outputs."""

from __future__ import annotations

import logging
from dataclasses import replace

from onnxcop.errors import CalibrationError
from onnxcop.pipeline.decide import Request
from onnxcop.pipeline.options import PruneOptions
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
    quality = dict(result.report.quality)
    if distillation.kept and "divergence" in quality:
        quality["divergence"] = distillation.after.value
        if distillation.after.agreement is not None and distillation.agreement_name in quality:
            quality[distillation.agreement_name] = distillation.after.agreement
    report = replace(
        result.report,
        choices=(*result.report.choices, str(distillation)),
        seconds=dict(request.clock.seconds),
        quality=quality,
    )  # fmt: skip
    plan = replace(result.plan, settings={**result.plan.settings, "distill": asked.distill})
    return replace(result, model=distillation.model, report=report, plan=plan)
