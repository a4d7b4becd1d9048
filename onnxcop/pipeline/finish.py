"""From a decision to a result: plan, rewrite, verify, time, report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx

from onnxcop._base.timing import Clock
from onnxcop._base.types import IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.census import group_name
from onnxcop.analysis.summary import frozen_reasons, totals
from onnxcop.data.open import CalibrationData
from onnxcop.graph.io import WeightFile, whole
from onnxcop.pipeline.decide import Decision, Request, calibrated_on
from onnxcop.pipeline.options import ApplyOptions
from onnxcop.pipeline.unseen import Unseen
from onnxcop.reconstruction.divergence import Figures
from onnxcop.report.document import Evidence
from onnxcop.report.figures import quality_of
from onnxcop.report.hints import hints
from onnxcop.report.result import PruneResult
from onnxcop.report.summary import Expected, Report, group_reports, slowness, undecided
from onnxcop.rewrite.apply import apply as rewrite
from onnxcop.rewrite.blocks import emptied
from onnxcop.rewrite.plan import PruningPlan, cuts_of
from onnxcop.rewrite.provenance import stamp
from onnxcop.runtime.latency import Latency, timed
from onnxcop.runtime.providers import resolve_provider
from onnxcop.runtime.session import EngineOptions
from onnxcop.verification.dequantize import rounds
from onnxcop.verification.verify import Verification, shared_file, verify

log = logging.getLogger("onnxcop")

_NAMED = 3  # blocks that a line names


def conclude(request: Request, decision: Decision) -> PruneResult:
    """Turn a decision into a plan, and carry it out."""
    asked, analysis, modes, source = request.asked, request.analysis, request.modes, request.source
    bounds = dict(request.budget.bounds) | {"divergence": asked.divergence}
    plan = PruningPlan(
        model=analysis.sha256, cuts=cuts_of(analysis, decision.removed),
        input_shapes=dict(analysis.input_shapes), policy=asked.policy,
        budget={name: value for name, value in bounds.items() if value is not None},
        criterion={"name": modes.criterion.name, **modes.criterion.parameters()},
        settings={
            "seed": asked.seed, "limits": asdict(request.limits), "allocate": modes.allocate,
            **({} if modes.preference is None else {"prefer": asdict(modes.preference)}),
            "recover": modes.recover.name, "samples": source.count if source is not None else 0,
            **({} if analysis.kept is None else {"classes": analysis.kept.to_dict()}),
            "channels": "principal" if _cut_in_principal_channels(analysis, decision) else "stored",
        },
    )  # fmt: skip
    decision = replace(
        fed(decision, source), unseen=request.unseen, choices=(*request.choices, *_turned_line(decision))
    )
    result = finish(analysis, decision, plan, asked, request.clock)
    evidence = None if result.evidence is None else replace(result.evidence, limits=request.limits)
    return replace(result, report=replace(result.report, expected=_expected(request, decision)), evidence=evidence)


def _expected(request: Request, decision: Decision) -> Expected | None:
    """The expected time of the result on its target device."""
    table, times = request.table, request.analysis.cost.times
    if table is None or times is None:
        return None
    ratio = times.fraction(request.analysis.cost.kept_counts(decision.removed))
    return Expected(device=table.device, before=table.seconds, ratio=ratio)


def _cut_in_principal_channels(analysis: Analysis, decision: Decision) -> bool:
    return bool(np.isin(analysis.structure.group_of[decision.removed], decision.rotated).any())


def _turned_line(decision: Decision) -> tuple[str, ...]:
    count = len(decision.rotated)
    return (f"{count} linear streams written in principal channels",) if count else ()


def _kept_line(analysis: Analysis) -> tuple[str, ...]:
    return () if analysis.kept is None else (analysis.kept.line(),)


def _unlisted_line(analysis: Analysis) -> tuple[str, ...]:
    if not analysis.unlisted:
        return ()
    return (
        f"{analysis.unlisted} weights were inputs as well, which prevents fusion in ONNX Runtime: they are removed "
        "from the inputs (--keep-initializer-inputs keeps them)",
    )


def _blocks_line(analysis: Analysis, removed: IntArray) -> tuple[str, ...]:
    names = [group_name(analysis, group) for group in emptied(analysis.structure, removed)]
    more = " …" if len(names) > _NAMED else ""
    return (f"blocks: {len(names)} removed whole: {', '.join(names[:_NAMED])}{more}",) if names else ()


def fed(decision: Decision, source: CalibrationData | None) -> Decision:
    """The decision with a description of the model's inputs."""
    return decision if source is None else replace(decision, inputs=source.values(), record=source.record())


def finish(
    analysis: Analysis, decision: Decision, plan: PruningPlan, options: ApplyOptions, clock: Clock
) -> PruneResult:
    """Rewrite, verify, time and report a decision."""
    removed = np.sort(decision.removed)
    file = shared_file(decision.model)
    with clock.stage("rewriting"):
        pruned = cut_to_size(analysis, decision, file)
    with clock.stage("verification"):
        if file is not None:  # the memory is needed for running both models
            pruned = file.light(pruned, inner=False)
        checked = verify(decision.model, pruned, analysis.structure, removed, options.engine.for_computing())
        pruned = whole(pruned)
    if checked.unproven:
        log.warning("the result is not proven: %s", "; ".join((checked.unproven, *checked.notes)))
    if options.metadata:
        stamp(pruned, plan)
    latency = None
    if options.latency_seconds > 0:
        with clock.stage("latency"):
            latency = beside_original(analysis, pruned, options.engine, options.latency_seconds)
    with clock.stage("measuring"):
        if decision.belief is not None:
            decision.belief.check(pruned)
        figures = None if decision.unseen is None else decision.unseen.figures(pruned, decision.judgements)
    measured = _Measured(checked, latency, figures)
    report = _report(analysis, decision, plan, pruned, clock, measured)
    evidence = Evidence(analysis, removed, decision.seen or decision.stats, decision.way)
    report = replace(
        report,
        warnings=(*report.warnings, *_notes(report, plan, analysis)),
        provider=resolve_provider(options.engine.provider)[0],
    )
    return PruneResult(model=pruned, plan=plan, report=report, stats=decision.stats, evidence=evidence)


def cut_to_size(analysis: Analysis, decision: Decision, file: WeightFile | None = None) -> onnx.ModelProto:
    """The model of a decision without its removed units, with weights in a file if one is given."""
    pruned = rewrite(decision.model, analysis.structure, np.sort(decision.removed), file)
    analysis.undo(pruned)
    return pruned


def beside_original(
    analysis: Analysis, model: onnx.ModelProto, engine: EngineOptions, seconds: float
) -> Latency | None:
    """The time of a cut model beside the original's; None if it cannot be measured."""
    return timed(analysis.original, model, analysis.timing_feed, engine, seconds)


def with_hints_logged(result: PruneResult) -> PruneResult:
    """The result, with hints in the log; only the final result is logged, not those that a run drops."""
    report = result.report
    for line in (*slowness(report.latency), *(() if report.figures is None else report.figures.warnings)):
        if line in report.warnings:
            log.warning("%s", line)
    if result.evidence is not None:
        for line in _notes(report, result.plan, result.evidence.analysis):
            log.info("hint: %s", line)
    return result


def _notes(report: Report, plan: PruningPlan, analysis: Analysis) -> tuple[str, ...]:
    samples = int(plan.settings.get("samples") or 0)
    return tuple(hints(report, plan.budget, samples=samples, quantized=rounds(analysis.original)))


def measured_again(
    result: PruneResult, model: onnx.ModelProto, unseen: Unseen | None, scores: Mapping[str, float]
) -> PruneResult:
    """A result with other figures, and perhaps with other weights in its model.

    Args:
        result: The result.
        model: Its model.
        unseen: Samples that no choice has used.
        scores: The user's metric, by name.
    """
    report, evidence = result.report, result.evidence
    stale = set(() if report.figures is None else report.figures.warnings)
    if evidence is not None:
        stale |= set(_notes(report, result.plan, evidence.analysis))
    figures = None if unseen is None else unseen.figures(model)
    measured_on = "" if unseen is None else unseen.described
    report = replace(report, figures=figures, measured_on=measured_on, quality=quality_of(figures) | dict(scores))
    fresh = () if figures is None else figures.warnings
    if evidence is not None:
        fresh = (*fresh, *_notes(report, result.plan, evidence.analysis))
    kept = tuple(line for line in report.warnings if line not in stale)
    return replace(result, model=model, report=replace(report, warnings=(*kept, *fresh)))


@dataclass(frozen=True, slots=True)
class _Measured:
    """Checks and measurements of a pruned model."""

    verification: Verification
    latency: Latency | None
    figures: Figures | None

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*slowness(self.latency), *(() if self.figures is None else self.figures.warnings))


def _report(
    analysis: Analysis,
    decision: Decision,
    plan: PruningPlan,
    pruned: onnx.ModelProto,
    clock: Clock,
    measured: _Measured,
) -> Report:
    """The figures of a finished run."""
    filters, share, frozen = frozen_reasons(analysis)
    removed = np.sort(decision.removed)
    scores = decision.scores(pruned)
    return Report(
        model=analysis.source,
        before=totals(analysis.original, float(analysis.cost.original()[0])),
        after=totals(pruned, float(analysis.cost.of_units(removed)[0])),
        groups=group_reports(analysis, removed), filters=filters, prunable=share, frozen=frozen,
        declined=tuple(str(reason) for _, reason in analysis.structure.coupling.declined),
        verification=measured.verification, criterion=str(plan.criterion.get("name", "")),
        warnings=(*decision.warnings, *measured.warnings), calibration=calibrated_on(decision),
        figures=measured.figures, measured_on="" if decision.unseen is None else decision.unseen.described,
        quality=quality_of(measured.figures) | scores, held_out=decision.held_out, seconds=dict(clock.seconds),
        latency=measured.latency, inputs=decision.inputs, data=decision.record,
        choices=(
            *_kept_line(analysis), *decision.choices, *_blocks_line(analysis, removed),
            *_unlisted_line(analysis), *undecided(measured.latency),
        ),
    )  # fmt: skip
