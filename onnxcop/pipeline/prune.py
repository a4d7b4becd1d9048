"""A whole run: analyse, calibrate, choose, recover, rewrite, verify, report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from onnxcop._base.keywords import by_keywords
from onnxcop._base.memory import Need
from onnxcop._base.progress import Progress, shown, silent
from onnxcop._base.timing import Clock
from onnxcop._base.types import IntArray
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import check_reachable
from onnxcop.allocation.limits import Limits
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.kept_classes import ClassWish
from onnxcop.analysis.summary import frozen_reasons
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.coupling.tracing import REWRITTEN
from onnxcop.criteria.base import PruningContext
from onnxcop.data.input_files import InputFiles, bytes_of_model
from onnxcop.data.open import CalibrationData, Preprocess, open_data
from onnxcop.data.options import DataOptions
from onnxcop.errors import BudgetError, CalibrationError, PlanMismatchError
from onnxcop.graph.io import whole
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.parallel.workers import crew_for
from onnxcop.pipeline.decide import Decision, Request, SampleSets, decide, recover_units, within_memory
from onnxcop.pipeline.distillation import OFF, check_distillation, check_trainable, distilled
from onnxcop.pipeline.finish import cut_to_size, fed, finish, measured_again, with_hints_logged
from onnxcop.pipeline.latency_target import prune_by_table, prune_within
from onnxcop.pipeline.never_slower import prune_faster
from onnxcop.pipeline.options import ApplyOptions, Modes, PruneOptions
from onnxcop.pipeline.profile import times_from
from onnxcop.pipeline.quantize import check_quantization, with_int8
from onnxcop.pipeline.unseen import (
    FEWEST_IN_HALF,
    CrossFitted,
    UnseenSamples,
    better_halved,
    can_be_halved,
    set_aside,
)
from onnxcop.pipeline.widths import for_device, suited, with_blocks_decided
from onnxcop.recovery.rounds import RecoverySettings
from onnxcop.recovery.setup import affordable_batch
from onnxcop.report.document import Evidence
from onnxcop.report.result import PruneResult
from onnxcop.rewrite.plan import PruningPlan, units_of
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.latency import on_quicker_provider
from onnxcop.runtime.session import EngineOptions
from onnxcop.verification.kept_classes import analyze_kept
from onnxcop.verification.verify import require_running

log = logging.getLogger("onnxcop")

_ROUNDING = 1e-9  # share that a repeated sum may differ by


@by_keywords(PruneOptions)
def prune(model: onnx.ModelProto | str | Path, options: PruneOptions) -> PruneResult:
    """Prune a model.

    Args:
        model: A path or a model in memory (never changed).
        options: The fields of :class:`onnxcop.PruneOptions`, as keyword arguments.

    Returns:
        The verified result.

    Raises:
        OnnxcopError: The model, the data, the budget or the verification; nothing is written anywhere.
    """
    return prune_with(model, options)


def prune_with(model: onnx.ModelProto | str | Path, options: PruneOptions) -> PruneResult:
    """Prune a model, as :func:`prune`, with all options in one object."""
    if isinstance(options.stats_out, str | Path):
        inputs = [options.stats, options.latency_table, *options.engine.custom_ops]
        InputFiles([model], options.data, options.metric, inputs).check(Path(options.stats_out))
    with shown(options.progress) as progress:
        request = prepare(model, options, progress)
        result = within_memory(_carried_out, request)
        result = with_int8(request, with_hints_logged(distilled(request, result)))
    write_stats(result, options.stats_out)
    return result


def _carried_out(request: Request) -> PruneResult:
    if request.budget.latency is None:
        result = prune_faster(request)
    elif request.table is not None:
        result = prune_by_table(request, request.budget.latency)
    else:
        result = prune_within(request, request.budget.latency)
    result = _with_figures(request, result)
    return replace(result, report=replace(result.report, seconds=dict(request.clock.seconds)))


def write_stats(result: PruneResult, stats_out: str | Path | bool | None) -> None:
    """Write the statistics of a finished run to the requested file, because a failed run must write nothing."""
    if isinstance(stats_out, str | Path) and result.stats is not None:
        result.stats.save(Path(stats_out))


def prepare(model: onnx.ModelProto | str | Path, options: PruneOptions, progress: Progress = silent) -> Request:
    """Analyse a model and open its data: everything before the choice.

    Args:
        model: A path or a model in memory.
        options: The options of the run.
        progress: Called with (stage, done, total).

    Raises:
        OnnxcopError: The model, the data or the budget cannot be used, or there is nothing to prune.
    """
    check_distillation(options)
    check_quantization(options.then_quantize, options.data)
    options, table = for_device(options)
    options = _that_fits(model, options)
    modes, budget = Modes.of(options), options.budget()
    if options.gathers_stats and options.data is None:
        raise CalibrationError("--stats-out writes statistics of calibration data; give --data")
    if options.cross_fit and options.data is None:
        raise CalibrationError("--cross-fit halves calibration data; give --data")
    _say_what_does_not_fit(model, recovers=modes.recover.writes or modes.allocate == "measured")
    clock = Clock()
    with clock.stage("analysis"):
        wish = None if options.classes is None else ClassWish.of(options.classes)
        analysis = analyze_kept(
            model, wish, input_shapes=options.input_shapes, rules=options.rules, policy=options.policy,
            options=options.engine, biases=modes.recover.writes,
            keep_initializer_inputs=options.keep_initializer_inputs,
        )  # fmt: skip
    if not len(analysis.structure.unit_class):
        raise BudgetError(f"{analysis.source} has nothing to prune: {nothing_reason(analysis)}", 1.0)
    check_trainable(analysis.original, options)
    macs = float(analysis.cost.original()[0])
    limits = with_blocks_decided(options.limits or Limits(), modes, budget, macs)
    if analysis.structure.coupling.shapes.trouble:  # running it was tried and failed: say so now
        feeds = random_feeds(analysis.original, analysis.input_shapes, options.seed)
        require_running(analysis.original, feeds, options.engine)
    if table is not None:
        times = times_from(table, analysis, options.policy)
        analysis = replace(analysis, cost=replace(analysis.cost, times=times))
    engine = on_quicker_provider(analysis.original, analysis.input_shapes, options.engine)
    options = replace(options, options=engine)
    untimed = budget.but(latency=None)  # the lowest reachable time is known only after operators are timed
    check_reachable(PruningContext.of(analysis.model, analysis.structure, analysis.cost), untimed, limits)
    source, crew = opened_data(analysis, options, options.input_shapes), crew_for(options.executor)
    analysis = with_sample(analysis, source)
    unseen = None
    if source is not None and cross_fits(options, source):
        options = replace(options, distill=OFF)
    elif source is not None:
        source, unseen = with_samples_set_aside(analysis, options, source, crew)
    limits, choices = suited(limits, options, table, clock)
    stats = None if options.stats is None else CalibrationStats.of_model(options.stats, analysis.sha256)
    return Request(
        asked=options, analysis=analysis, modes=modes, budget=budget, limits=limits, source=source,
        unseen=unseen, stats=stats, progress=progress, clock=clock, choices=choices,
        table=table, crew=crew,
    )  # fmt: skip


def _with_figures(request: Request, result: PruneResult) -> PruneResult:
    """The result with cross-fitted figures, if no samples were set aside for them."""
    source, evidence = request.source, result.evidence
    if not request.cross_fit or source is None or evidence is None:
        return result
    log.info(
        "the run is repeated on each half of the %d samples, to measure on the other half (--no-cross-fit sets a "
        "quarter of them aside instead)", source.count,
    )  # fmt: skip
    again = replace(
        request.without_quality_bounds(), analysis=evidence.analysis, limits=evidence.limits or request.limits,
        budget=_as_large(request, evidence), clock=Clock(),
    )  # fmt: skip
    again = replace(again, asked=replace(again.asked, metric=None, stats_out=None))

    def made_from(half: CalibrationData) -> onnx.ModelProto:
        if not evidence.removed.size:
            return result.model
        log.info("once more, on %d of the samples:", half.count)
        return whole(cut_to_size(evidence.analysis, decide(replace(again, source=half), again=True)))

    def measured_on(samples: CalibrationData, *, seen: bool = False) -> UnseenSamples:
        original, options = evidence.analysis.original, request.options
        return UnseenSamples(original, samples, options, request.asked.task, seen=seen, crew=request.crew)

    first, second = source.split(0.5, request.asked.seed)
    scores = result.report.quality
    with request.clock.stage("cross-fitting"):
        try:
            unseen = CrossFitted((measured_on(first), measured_on(second)), made_from)
            result = measured_again(result, result.model, unseen, scores)
        except (BudgetError, CalibrationError) as reason:
            log.warning("half of the samples are too few to repeat the run: %s", reason)
            result = measured_again(result, result.model, measured_on(source, seen=True), scores)
    return result


def _as_large(request: Request, evidence: Evidence) -> Budget:
    """A budget that allows as much as a result has kept of what was bounded."""
    cost, budget = evidence.analysis.cost, request.budget
    if budget.latency is not None and cost.times is not None:
        budget = budget.but(latency=min(1.0, cost.times.fraction(cost.kept_counts(evidence.removed)) + _ROUNDING))
    if budget.empty or "macs" in budget.bounds:
        share = float(cost.of_units(evidence.removed)[0] / max(cost.original()[0], 1.0))
        budget = budget.but(macs=min(1.0, share + _ROUNDING))
    return budget


@by_keywords(ApplyOptions)
def apply_plan(model: onnx.ModelProto | str | Path, plan: PruningPlan, options: ApplyOptions) -> PruneResult:
    """Replay a plan on its model: the same cut, and with data the same kind of recovery.

    Args:
        model: A path or a model in memory (never changed).
        plan: What to remove.
        options: The fields of :class:`onnxcop.pipeline.options.ApplyOptions`, as keyword arguments.

    Raises:
        PlanMismatchError: The plan belongs to another model.
    """
    return apply_with(model, plan, options)


def apply_with(model: onnx.ModelProto | str | Path, plan: PruningPlan, options: ApplyOptions) -> PruneResult:
    """Replay a plan, as :func:`apply_plan`, with all options in one object."""
    _say_what_does_not_fit(model, recovers=options.data is not None)
    clock = Clock()
    with clock.stage("analysis"):
        analysis = analyze_kept(
            model, plan.wish, input_shapes=plan.input_shapes, rules=options.rules, policy=plan.policy,
            options=options.engine, biases=options.data is not None,
            keep_initializer_inputs=options.keep_initializer_inputs,
        )  # fmt: skip
    removed = units_of(analysis, plan)
    principal = plan.settings.get("channels") == "principal"
    if principal and options.data is None:
        raise PlanMismatchError(
            "the plan removes principal channels, which are computed from data; "
            "give --data, the samples it was made with"
        )
    source, unseen = data_of(analysis, options, plan.input_shapes)
    analysis = with_sample(analysis, source)
    done: dict[str, Any] = {"allocate": plan.settings.get("allocate"), "recover": "none" if source is None else "full"}
    done["samples"] = 0 if source is None else source.count
    plan = replace(plan, settings={**plan.settings, **done})
    if source is None:
        decision = Decision(removed=removed, model=analysis.model)
        return with_hints_logged(finish(analysis, decision, plan, options, clock))
    settings, engine = RecoverySettings(seed=options.seed), options.engine.for_computing()

    def carried_out(samples: SampleSets) -> PruneResult:
        recovered = recover_units(
            analysis, removed, samples.source, settings, engine, progress, clock, principal=principal, task=options.task
        )
        decision = replace(fed(recovered, samples.source), unseen=samples.unseen)
        return finish(analysis, decision, plan, options, clock)

    with shown(options.progress) as progress:
        result = within_memory(carried_out, SampleSets(source, unseen))
    return with_hints_logged(result)


def data_of(
    analysis: Analysis, options: ApplyOptions, input_shapes: Mapping[str, Sequence[int]] | None
) -> tuple[CalibrationData | None, UnseenSamples | None]:
    """The samples to calibrate on, and those for the report; None if there are no data."""
    source = opened_data(analysis, options, input_shapes)
    return (None, None) if source is None else with_samples_set_aside(analysis, options, source)


def opened_data(
    analysis: Analysis, options: ApplyOptions, input_shapes: Mapping[str, Sequence[int]] | None
) -> CalibrationData | None:
    """All samples, in batches that fit in memory; None if there are no data."""
    source = open_data(analysis, options, input_shapes)
    return None if source is None else source.in_batches_of(affordable_batch(analysis, source, options.engine))


def with_sample(analysis: Analysis, source: CalibrationData | None) -> Analysis:
    """The analysis with inputs from the data to time runs with, if there are data of its shapes."""
    return analysis if source is None else replace(analysis, sample=source.first(analysis.input_shapes))


def with_samples_set_aside(
    analysis: Analysis, options: ApplyOptions, source: CalibrationData, crew: Crew = HERE
) -> tuple[CalibrationData, UnseenSamples]:
    """The samples to calibrate on, and those for the report; the same if there are too few."""
    rest, aside = set_aside(source, options.seed)
    engine = options.engine.for_computing()
    return rest, UnseenSamples(analysis.original, aside or rest, engine, options.task, seen=aside is None, crew=crew)


def cross_fits(options: PruneOptions, source: CalibrationData) -> bool:
    """Whether figures are cross-fitted: on request, or if there are few samples and nothing else needs some of them.

    Raises:
        CalibrationError: It is requested and impossible.
    """
    others = {"--stats": options.stats, "--then-quantize": options.then_quantize}
    others["--distill"] = None if options.distill == OFF else options.distill
    conflict = next((flag for flag, value in others.items() if value is not None), None)
    if options.cross_fit is None:
        return conflict is None and better_halved(source)
    if options.cross_fit and conflict is not None:
        raise CalibrationError(f"--cross-fit does not go with {conflict}; leave one of them out")
    if options.cross_fit and not can_be_halved(source):
        raise CalibrationError(
            f"--cross-fit needs two halves of at least {FEWEST_IN_HALF} samples and a batch; there are {source.count}"
        )
    return options.cross_fit


def _that_fits(model: onnx.ModelProto | str | Path, options: PruneOptions) -> PruneOptions:
    """The request without recovery if nobody asked for it, there are only synthetic inputs, and memory is short."""
    requested = options.recover != "auto" or options.data is not None or options.stats is not None
    if requested or options.criterion == "auto" or options.allocate == "measured":
        return options
    need = Need(bytes_of_model(model), recovers=True)
    if not need.shortage():
        return options
    log.warning(
        "weights are not compensated: on synthetic inputs that needs about %.1f GB of memory, more than is available; "
        "give --recover full to try, better with --data", need.bytes / 1e9,
    )  # fmt: skip
    return replace(options, recover="none")


def _say_what_does_not_fit(model: onnx.ModelProto | str | Path, *, recovers: bool) -> None:
    shortage = Need(bytes_of_model(model), recovers).shortage()
    if shortage:
        log.warning("%s", shortage)


def nothing_reason(analysis: Analysis) -> str:
    """Explain in a few words why a model cannot be pruned at all."""
    filters, _, frozen = frozen_reasons(analysis)
    if any(reason.text == REWRITTEN for _, reason in analysis.structure.coupling.declined):
        return REWRITTEN
    if not filters:
        return "it has no layer with trained filters (Conv, Gemm, MatMul …)"
    top = next(iter(frozen), "every filter is frozen")
    rule = " (in Python, rules= takes one)" if top.startswith("no rule for") else ""
    return f"all of its {filters} filters are frozen, mostly for this reason: {top}{rule}; see `onnxcop inspect`"


__all__ = ["PruneResult", "apply_plan", "apply_with", "nothing_reason", "prepare", "prune", "prune_with"]


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
    progress: Progress | bool | None = None,
) -> onnx.ModelProto:
    """Compensate for removed units with those that stay, in closed form.

    Args:
        analysis: The model, analysed with `biases=True` so that every layer has a bias to correct.
        removed: int64, the units to remove.
        data: Calibration data (see :func:`onnxcop.data.open.open_source`).
        preprocess: Preprocessing of images, or its name, e.g. `imagenet`; None to guess it.
        samples: Number of samples to use; None for 512, or up to 1,024 for a fast model.
        batch_size: Samples that run at once.
        settings: How thorough recovery is.
        options: How to run models.
        seed: Random seed of the choice of samples.
        progress: True for bars, or a function called with (stage, done, total).

    Returns:
        The analysed model, in the shapes of the original, with other weights, for :func:`onnxcop.apply` to cut to size.

    Raises:
        CalibrationError: There are no data, or they do not fit.
    """
    data_options = DataOptions(data=data, preprocess=preprocess, samples=samples, batch_size=batch_size, seed=seed)
    source = open_data(analysis, data_options, analysis.input_shapes)
    if source is None:
        raise CalibrationError("recovery needs calibration data; pass data=")
    source = source.in_batches_of(affordable_batch(analysis, source, options))
    chosen = replace(settings or RecoverySettings(), seed=seed)
    with shown(progress) as report:
        return whole(recover_units(analysis, removed, source, chosen, options, report, Clock()).model)
