"""From a decision to a result: plan, rewrite, verify, time, report."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace

import numpy as np
import onnx

from onnxcop._base.timing import Clock
from onnxcop._base.types import IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.summary import frozen_reasons, totals
from onnxcop.data.open import CalibrationData
from onnxcop.graph.passes.add_biases import drop_idle, move_into_normalization
from onnxcop.graph.passes.unshare_vectors import reshare
from onnxcop.pipeline.decide import Decision, Request, calibrated_on
from onnxcop.report.document import Evidence
from onnxcop.report.hints import hints
from onnxcop.report.result import PruneResult
from onnxcop.report.summary import Report, group_reports, slowness
from onnxcop.rewrite.apply import apply as rewrite
from onnxcop.rewrite.plan import PruningPlan, cuts_of
from onnxcop.runtime.latency import Latency, timed
from onnxcop.runtime.session import EngineOptions
from onnxcop.verification.dequantize import rounds
from onnxcop.verification.verify import Verification, verify

log = logging.getLogger("onnxcop")


def conclude(request: Request, decision: Decision, latency_seconds: float = 0.0) -> PruneResult:
    """Make a decision a plan, and carry it out."""
    analysis, modes, source = request.analysis, request.modes, request.source
    bounds = asdict(request.budget) | {"divergence": request.divergence, "latency": request.latency}
    plan = PruningPlan(
        analysis.sha256, cuts_of(analysis, decision.removed), dict(analysis.input_shapes), request.policy,
        {name: value for name, value in bounds.items() if value is not None},
        {"name": modes.criterion.name, **modes.criterion.parameters()},
        {
            "seed": request.settings.seed, "limits": asdict(request.limits), "allocate": modes.allocate,
            "recover": modes.recover, "samples": source.count if source is not None else 0,
            "channels": "principal" if _cut_in_principal_channels(analysis, decision) else "stored",
        },
    )  # fmt: skip
    decision = replace(fed(decision, source), choices=(*request.choices, *_turned_line(decision)))
    return finish(analysis, decision, plan, request.options, request.clock, latency_seconds)


def _cut_in_principal_channels(analysis: Analysis, decision: Decision) -> bool:
    return bool(np.isin(analysis.structure.group_of[decision.removed], decision.rotated).any())


def _turned_line(decision: Decision) -> tuple[str, ...]:
    count = len(decision.rotated)
    return (f"{count} linear streams written in principal channels",) if count else ()


def fed(decision: Decision, source: CalibrationData | None) -> Decision:
    """The decision, with what the network was fed with."""
    return decision if source is None else replace(decision, inputs=source.values())


def finish(
    analysis: Analysis, decision: Decision, plan: PruningPlan, options: EngineOptions, clock: Clock,
    latency_seconds: float = 0.0,
) -> PruneResult:  # fmt: skip
    """Rewrite, verify, time and report a decision."""
    removed = np.sort(decision.removed)
    with clock.stage("rewriting"):
        pruned = rewrite(decision.model, analysis.structure, removed)
        move_into_normalization(pruned, analysis.added_biases)
        drop_idle(pruned, analysis.added_biases)
        reshare(pruned, analysis.copies)
    with clock.stage("verification"):
        checked = verify(decision.model, pruned, analysis.structure, removed, options)
    latency = None
    if latency_seconds > 0:
        with clock.stage("latency"):
            latency = timed(analysis.original, pruned, analysis.input_shapes, options, latency_seconds)
        for line in slowness(latency):
            log.warning("%s", line)
    report = build_report(analysis, removed, pruned, plan, checked, clock, decision, latency=latency)
    evidence = Evidence(analysis, removed, decision.seen or decision.stats, decision.way)
    samples = int(plan.settings.get("samples") or 0)
    notes = tuple(hints(report, plan.budget, samples=samples, quantized=rounds(analysis.original)))
    for line in notes:
        log.info("hint: %s", line)
    report = replace(report, warnings=(*report.warnings, *notes))
    return PruneResult(pruned, plan, report, decision.stats, evidence)


def build_report(
    analysis: Analysis, removed: IntArray, pruned: onnx.ModelProto, plan: PruningPlan,
    checked: Verification | None, clock: Clock, decision: Decision,
    *, latency: Latency | None = None,
) -> Report:  # fmt: skip
    """Gather the numbers of a finished run."""
    filters, share, frozen = frozen_reasons(analysis)
    return Report(
        analysis.source,
        totals(analysis.original, float(analysis.cost.original()[0])),
        totals(pruned, float(analysis.cost.of_units(removed)[0])),
        group_reports(analysis, removed), filters, share, frozen,
        tuple(str(reason) for _, reason in analysis.structure.coupling.declined),
        checked, str(plan.criterion.get("name", "")), (*decision.warnings, *slowness(latency)), calibrated_on(decision),
        decision.quality(pruned), dict(clock.seconds), latency, decision.inputs, decision.choices,
    )  # fmt: skip
