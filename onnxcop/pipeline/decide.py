"""Choice of units and weights: by a criterion or by measurement."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, TypeVar

import onnx

from onnxcop._base.progress import Progress
from onnxcop._base.timing import Clock, single_threaded
from onnxcop._base.types import FloatArray, IntArray
from onnxcop._base.whole_run import ROUNDS
from onnxcop.allocation.budget import Budget, default_rounds, round_budgets
from onnxcop.allocation.greedy import PruningState
from onnxcop.allocation.limits import Limits, allowed_units
from onnxcop.allocation.within_time import choose_within
from onnxcop.analysis.analyze import Analysis
from onnxcop.calibration.calibrate import gather_statistics
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.criteria.base import PruningContext
from onnxcop.criteria.filters import produced_norms
from onnxcop.data.dataset import DataRecord, FedValues
from onnxcop.data.open import CalibrationData
from onnxcop.errors import CalibrationError
from onnxcop.outputs.judgement import Judgements
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.pipeline.options import Modes, PruneOptions
from onnxcop.pipeline.unseen import UnseenSamples
from onnxcop.reconstruction.divergence import Waypoint
from onnxcop.recovery.belief import Belief
from onnxcop.recovery.metric import Metric
from onnxcop.recovery.quality_bound import Bound, cut_within
from onnxcop.recovery.rounds import Recovery, RecoverySettings
from onnxcop.recovery.setup import PreparedRecovery, recovery_on, recovery_without_data
from onnxcop.runtime.device_table import DeviceTable
from onnxcop.runtime.providers import OutOfMemory
from onnxcop.runtime.session import EngineOptions

log = logging.getLogger("onnxcop")

Done = TypeVar("Done")
Batched = TypeVar("Batched", bound="InBatches")

_CHEAP = 1e8  # multiply-accumulates of a network up to which several schedules are tried
_LONG = 1e9  # multiply-accumulates, and
_LARGE = 2e7  # parameters, of networks that take minutes to measure


class InBatches(Protocol):
    """Something that runs samples in batches of some size."""

    def in_smaller_batches(self) -> Self | None:
        """The same in batches of half the size; None if samples already run one by one."""
        ...


@dataclass(frozen=True, slots=True)
class SampleSets:
    """The samples to calibrate on, and those for the report."""

    source: CalibrationData
    unseen: UnseenSamples | None

    def in_smaller_batches(self) -> SampleSets | None:
        """The same in batches of half the size; None if samples already run one by one."""
        size = self.source.batch_size
        if size <= 1 or self.source.layout.size is not None:
            return None
        unseen = self.unseen
        if unseen is not None:
            unseen = replace(unseen, data=unseen.data.in_batches_of(size // 2))
        return SampleSets(self.source.in_batches_of(size // 2), unseen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Everything that a decision depends on.

    Attributes:
        asked: The user's options, unchanged.
        analysis: The model.
        modes: How units are chosen and compensated.
        budget: The budget.
        limits: The limits on what may be cut.
        source: The calibration data, opened.
        unseen: Samples for the report, which no choice may use.
        stats: Statistics of an earlier run.
        progress: Called with (stage, done, total).
        clock: Sums the seconds of each stage.
        choices: Choices made by measurement, in words.
        table: Times of the target device, if that is not this machine.
        crew: Carries out independent tasks.
    """

    asked: PruneOptions
    analysis: Analysis
    modes: Modes
    budget: Budget
    limits: Limits
    source: CalibrationData | None
    unseen: UnseenSamples | None
    stats: CalibrationStats | None
    progress: Progress
    clock: Clock
    choices: tuple[str, ...] = ()
    table: DeviceTable | None = None
    crew: Crew = HERE

    @property
    def cross_fit(self) -> bool:
        """Whether figures come from further decisions, each on one half of the samples, as none are set aside."""
        return self.source is not None and self.unseen is None

    @property
    def options(self) -> EngineOptions:
        """How to run models, except to time them."""
        return self.asked.engine.for_computing()

    def without_quality_bounds(self) -> Request:
        """The same without bounds on quality, for callers that check them on the result."""
        return replace(self, asked=replace(self.asked, divergence=None, max_drop=None))

    def in_smaller_batches(self) -> Request | None:
        """The same in batches of half the size; None if samples already run one by one."""
        settings = self.asked.recovery()
        if self.source is not None:
            samples = SampleSets(self.source, self.unseen).in_smaller_batches()
            return None if samples is None else replace(self, source=samples.source, unseen=samples.unseen)
        if settings.synthetic_batch <= 1:
            return None
        settings = replace(settings, synthetic_batch=settings.synthetic_batch // 2)
        return replace(self, asked=replace(self.asked, settings=settings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The units to remove, and the model (in the original's shapes) with compensated weights.

    Attributes:
        removed: int64, units.
        model: The analysed model, with recovered weights if there was recovery.
        stats: Statistics of the original, if gathered.
        warnings: Warnings for the user.
        calibration: One line on the data.
        inputs: Values of the model's inputs.
        record: Record of the calibration data.
        held_out: Quality on held-out samples, by name; choices were made on these samples.
        judgements: Kinds of the outputs.
        unseen: Samples that no choice has used.
        belief: The recovered network, to check the written file against.
        metric: The user's score.
        way: Measurements after every round.
        seen: Statistics that recovery gathered on the original.
        choices: Choices made by measurement, in words.
        rotated: Groups whose channels are principal channels.
    """

    removed: IntArray
    model: onnx.ModelProto
    stats: CalibrationStats | None = None
    warnings: tuple[str, ...] = ()
    calibration: str = ""
    held_out: dict[str, float] = field(default_factory=dict)
    judgements: Judgements | None = None
    unseen: UnseenSamples | None = None
    belief: Belief | None = None
    metric: Metric | None = None
    way: tuple[Waypoint, ...] = ()
    seen: CalibrationStats | None = None
    inputs: tuple[FedValues, ...] = ()
    record: DataRecord | None = None
    choices: tuple[str, ...] = ()
    rotated: tuple[int, ...] = ()

    def scores(self, pruned: onnx.ModelProto) -> dict[str, float]:
        """The user's metric of both models, by name."""
        if self.metric is None:
            return {}
        return {f"{self.metric.name} before": self.metric.base, f"{self.metric.name} after": self.metric(pruned)}


def within_memory(carry_out: Callable[[Batched], Done], request: Batched) -> Done:
    """Carry out a request, again in batches of half the size whenever one does not fit in memory.

    Raises:
        OutOfMemory: A single sample does not fit.
    """
    while True:
        try:
            return carry_out(request)
        except OutOfMemory as error:
            smaller = request.in_smaller_batches()
            if smaller is None:
                raise OutOfMemory(f"{error}; a single sample does not fit") from error
            request = smaller
        log.info("out of memory: the run starts again with batches of half the size")


def decide(request: Request, *, again: bool = False) -> Decision:
    """Choose units and recover; `again` if the same was requested before, so that warnings are not repeated."""
    metric = metric_of(request)
    for line in () if again else lack_of_data(request):
        log.warning("no calibration data: %s", line)
    if request.modes.allocate == "measured":
        macs, params, _ = request.analysis.cost.original()
        if macs > _LONG or params > _LARGE:
            log.info("a model of this size takes minutes to measure; --allocate cop --recover merge is quicker")
        return _by_measurement(request, metric)
    return by_criterion(request, metric)


def lack_of_data(request: Request) -> tuple[str, ...]:
    """A warning if there are no data."""
    if request.source is not None:
        return ()
    inputs = "using synthetic inputs" if request.modes.allocate == "measured" else "using the weights alone"
    return (f"{inputs}; accuracy will be lower than with representative samples; give --data",)


def metric_of(request: Request) -> Metric | None:
    """The user's metric, if there is one."""
    return None if request.asked.metric is None else Metric.of(request.asked.metric, request.analysis.original)


@single_threaded
def by_criterion(request: Request, metric: Metric | None, prepared: PreparedRecovery | None = None) -> Decision:
    """Remove the least important units by a criterion; `prepared` is shared between requests."""
    analysis, modes = request.analysis, request.modes
    stats, warnings = request.stats, lack_of_data(request)
    wants_stats = modes.criterion.needs_stats or request.asked.gathers_stats
    if stats is None and request.source is not None and wants_stats:
        stats = _statistics(request)
    with request.clock.stage("selection"):
        context = PruningContext.of(analysis.model, analysis.structure, analysis.cost, stats, request.asked.seed)
        removed = choose_within(context, modes.criterion, request.budget, request.limits)
    if not modes.recover.writes:
        return Decision(
            removed=removed, model=analysis.model, stats=stats, warnings=warnings,
            calibration=_described(request.source), metric=metric,
        )  # fmt: skip
    with request.clock.stage("recovery"):
        chosen = prepared or prepared_recovery(request)
        decision = _recovered(chosen, removed, _described(request.source, chosen.untouched))
    if request.source is None:  # divergences on synthetic inputs say little
        seen = "" if stats is not None else decision.calibration
        return Decision(
            removed=removed, model=decision.model, stats=stats, warnings=warnings, calibration=seen, metric=metric,
            belief=decision.belief,
        )  # fmt: skip
    return replace(decision, stats=stats, warnings=warnings, metric=metric)


def prepared_recovery(request: Request) -> PreparedRecovery:
    """The start of a request's recovery, on synthetic inputs if there are no data."""
    return PreparedRecovery.of(_recovery(request))


def _recovery(request: Request) -> Recovery:
    settings = request.asked.recovery().by(request.modes.recover)
    if request.source is None:
        return recovery_without_data(
            request.analysis, settings, request.options, request.progress, task=request.asked.task, crew=request.crew
        )
    return recovery_on(
        request.analysis, request.source, settings, request.options, request.progress, task=request.asked.task,
        crew=request.crew,
    )  # fmt: skip


def recover_units(
    analysis: Analysis, removed: IntArray, source: CalibrationData, settings: RecoverySettings,
    options: EngineOptions, progress: Progress, clock: Clock, *, principal: bool = False,
    task: str | None = None,
) -> Decision:  # fmt: skip
    """Cut given units (principal channels of linear streams included) and compensate with data."""
    with clock.stage("recovery"):
        recovery = recovery_on(analysis, source, settings, options, progress, task=task)
        if principal:
            recovery.change_basis(set(analysis.structure.group_of[removed].tolist()))
        prepared = PreparedRecovery.of(recovery)
        return _recovered(prepared, removed, _described(source))


def _recovered(prepared: PreparedRecovery, removed: IntArray, described: str) -> Decision:
    recovery = prepared.cut(removed)
    network = recovery.finished()
    return Decision(
        removed=removed, model=network.model, calibration=described, held_out=recovery.measured_quality(),
        judgements=recovery.reference.judgements, way=tuple(recovery.way), seen=recovery.seen,
        rotated=recovery.rotated, belief=recovery.belief(network),
    )  # fmt: skip


def _by_measurement(request: Request, metric: Metric | None) -> Decision:
    recovery, stats, fallback = measured_recovery(request)
    with request.clock.stage("selection and recovery"):
        if request.asked.divergence is not None or request.asked.max_drop is not None:
            bound = Bound(request.asked.divergence, metric, request.asked.max_drop)
            cut_within(bound, recovery, request.limits, fallback, request.modes.preference)
        else:
            recovery = _best_schedule(request, recovery, fallback, _schedules(request, recovery.settings))
        return measured_decision(request, recovery, stats, metric)


def measured_recovery(request: Request) -> tuple[Recovery, CalibrationStats | None, FloatArray]:
    """An unpruned network, statistics if the user wants them, and an order for units without statistics."""
    analysis = request.analysis
    stats = _statistics(request) if request.asked.gathers_stats else None
    with request.clock.stage("selection and recovery"):
        recovery = _recovery(request)
        if request.modes.recover.writes:
            allowed = allowed_units(analysis.model, analysis.structure, request.limits)
            recovery.change_basis({group.index for group in analysis.structure.groups if allowed[group.units].all()})
    return recovery, stats, produced_norms(PruningContext.of(analysis.model, analysis.structure, analysis.cost))


def measured_decision(
    request: Request, recovery: Recovery, stats: CalibrationStats | None, metric: Metric | None
) -> Decision:
    """The decision that a recovered network represents."""
    bounded = request.asked.divergence is not None or request.asked.max_drop is not None
    network = recovery.working if bounded else recovery.finished()  # a bound was checked on this very network
    decision = Decision(
        removed=network.removed(), model=network.model, stats=stats, warnings=lack_of_data(request),
        calibration=_described(request.source, recovery), metric=metric, rotated=recovery.rotated,
    )  # fmt: skip
    if not request.modes.recover.writes:
        return replace(decision, model=request.analysis.model, seen=recovery.seen, rotated=())
    decision = replace(decision, belief=recovery.belief(network))
    if request.source is None:  # divergences on synthetic inputs say little
        return decision
    return replace(
        decision, held_out=recovery.measured_quality(), judgements=recovery.reference.judgements,
        way=tuple(recovery.way), seen=recovery.seen,
    )  # fmt: skip


def _schedules(request: Request, settings: RecoverySettings) -> tuple[int, ...]:
    """Numbers of rounds in which to reach the budget: several are tried if the network is cheap."""
    rounds = settings.rounds or default_rounds(_in_shares(request))
    cheap = float(request.analysis.cost.original()[0]) < _CHEAP
    if request.source is None and not cheap:
        rounds = 1
    if settings.rounds is not None or not cheap or rounds == 1:
        return (rounds,)
    few = max(1, rounds // 3)
    return (few, few + 1)


def _in_shares(request: Request) -> Budget:
    context = PruningContext.of(request.analysis.model, request.analysis.structure, request.analysis.cost)
    return PruningState(context, request.limits).in_shares(request.budget)


def _best_schedule(request: Request, fresh: Recovery, fallback: FloatArray, schedules: tuple[int, ...]) -> Recovery:
    """Reach the budget in each number of rounds, and keep the closest network on the held-out samples."""

    ended = 0
    request.progress(ROUNDS, ended, sum(schedules))

    def reached(rounds: int) -> Recovery:
        nonlocal ended
        recovery = fresh.restarted()
        state = recovery.start(request.limits, request.modes.preference)
        budgets = [*round_budgets(state.in_shares(request.budget), rounds)[:-1], request.budget]
        for number, budget in enumerate(budgets, start=1):
            if not state.meets(budget):
                recovery.round(state, budget, request.limits, fallback, f"round {number} of {len(budgets)}")
            ended += 1
            request.progress(ROUNDS, ended, sum(schedules))
        return recovery

    candidates = [reached(rounds) for rounds in schedules]
    return candidates[0] if len(candidates) == 1 else min(candidates, key=lambda recovery: recovery.divergence().value)


def _statistics(request: Request) -> CalibrationStats:
    """Statistics of the original on all samples."""
    if request.source is None:
        raise CalibrationError("statistics need calibration data; give --data")
    with request.clock.stage("calibration"):
        return gather_statistics(request.analysis, request.source, request.options, request.progress, request.crew)


def calibrated_on(decision: Decision) -> str:
    """Description of the calibration data, in a line; empty if there were none."""
    if decision.calibration or decision.stats is None:
        return decision.calibration
    return f"statistics of {decision.stats.samples} samples, gathered earlier"


def _described(source: CalibrationData | None, recovery: Recovery | None = None) -> str:
    if source is not None:
        return source.description
    if recovery is None:
        return ""
    return f"{recovery.fit.count + recovery.held_out.count} synthetic inputs: no data was given"
