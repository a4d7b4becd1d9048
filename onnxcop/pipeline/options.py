"""Options of a run, and its modes once every "auto" is decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from onnxcop._base.lookup import check_known
from onnxcop._base.progress import Progress
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.limits import Limits
from onnxcop.allocation.resources import RESOURCES
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.coupling.choices import Policy
from onnxcop.coupling.ops import RuleTable
from onnxcop.criteria.base import Criterion
from onnxcop.criteria.preference import Preference
from onnxcop.criteria.registry import criterion_named, parameters_of
from onnxcop.data.options import DataOptions
from onnxcop.errors import BudgetError, CalibrationError
from onnxcop.outputs.tasks import Task
from onnxcop.recovery.methods import RecoveryMethod, recovery_named
from onnxcop.recovery.rounds import RecoverySettings
from onnxcop.runtime.session import EngineOptions

Allocate = Literal["auto", "cop", "measured"]
ALLOCATE: tuple[str, ...] = get_args(Allocate)
Quantization = Literal["static", "dynamic"]

DEFAULT_MACS = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyOptions(DataOptions):
    """Options for carrying out a decision.

    Attributes:
        rules: The operator rules; None for :data:`onnxcop.DEFAULT_RULES` and those that
            other packages register.
        options: How to run models; None for the best provider of this machine.
        task: Task of the model, one of :data:`onnxcop.outputs.tasks.TASKS`; None to decide by evidence.
        latency_seconds: How long to measure the latency of both models, in seconds; 0 to skip it.
        metadata: Whether to write the provenance into the result's metadata (see
            :func:`onnxcop.rewrite.provenance.provenance`).
        keep_initializer_inputs: Keep stored tensors that are also inputs in the list of inputs. By default they are
            removed from it, because they prevent fusion in ONNX Runtime.
        progress: True for bars (on a terminal or in a notebook), or a function called with (stage, done, total).
    """

    rules: RuleTable | None = None
    options: EngineOptions | None = None
    task: Task | None = None
    latency_seconds: float = 0.0
    metadata: bool = True
    keep_initializer_inputs: bool = False
    progress: Progress | bool | None = None

    @property
    def engine(self) -> EngineOptions:
        """How to run models."""
        return self.options or EngineOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions(ApplyOptions):
    """All options of a run; every field is a keyword argument of :func:`onnxcop.prune`.

    Attributes:
        macs: Largest fraction of multiply-accumulates to keep, `0.7` or `"70%"`; 0.7 if no budget is given.
        params: Largest fraction of parameters to keep.
        filters: Largest fraction of prunable filters to keep.
        size: Largest size of the file: in bytes, as `"5MB"`, or as a fraction such as `0.5` or `"50%"`.
        budgets: Bounds on other resources, by name (see :data:`onnxcop.allocation.resources.RESOURCES`).
        latency: Largest fraction of the time of a run, measured on this machine with the provider of
            `options`, or on the device of `latency_table`.
        divergence: Instead of a budget: the largest output divergence allowed on held-out samples.
        metric: A score, `script.py:function` or a callable that takes a ModelProto and returns a number (higher is
            better); measured before and after, and bounded by `max_drop`.
        max_drop: Instead of a budget: the largest loss of the metric allowed.
        stats: Statistics of an earlier run, for ranking (and merging) without data.
        stats_out: File for the statistics of the original; True only gathers them, for `stats` of the result.
        criterion: Name of a criterion, or a criterion object; "auto" measures, or is "cop" if nothing is run.
        allocate: How layers share the cut; "auto" is "measured" unless a criterion was named, or there are neither
            data nor recovery.
        prefer: What to save first: "faster" (multiply-accumulates), "smaller" (parameters), "balanced",
            or COP's weights (beta, gamma). Measured allocation and the COP criteria follow it.
        recover: How to compensate for removed filters: "auto", or a name of
            :data:`onnxcop.recovery.methods.RECOVERIES`, or a method of your own;
            without data, recovery works on synthetic inputs.
        distill: How long to distill the pruned model from the original at the end: `"5m"`, `"20 epochs"` or `"auto"`;
            `"none"` to skip it; None to distill only if there are 1,500 samples and `recover` is "auto", for as long as
            the run took before. Needs data, no labels.
        checkpoint: File for the state of distillation; if it exists, the run resumes from it.
        settings: How thorough recovery is; None for the default.
        limits: Limits on what may be cut; by default widths suit this machine.
        target: A device other than this one, by its name in :data:`onnxcop.runtime.staircase.TARGETS`, to choose widths
            for; None for this machine.
        latency_table: Times of another device (see :func:`onnxcop.profile`), to choose widths for; `latency` is then a
            fraction of the time there, and nothing is timed on this machine.
        input_shapes: Concrete shapes for dynamic inputs.
        policy: "finest" coupling or "coarsest" (whole heads and groups).
        classes: Numbers or names of the classes to keep, `[0, 2, 5]` or `"0,2,5"`; None for all.
            The model is reduced to them before anything else (see :mod:`onnxcop.rewrite.classes`).
        then_quantize: Also make an int8 model of the result, the `int8` of the result: "static" with the calibration
            data, or "dynamic"; see :func:`onnxcop.quantize`.
        cross_fit: Whether the figures of the report are cross-fitted: the choice is repeated on each half of the
            samples, and measured on the other half. The result then uses all samples, and the run takes about twice
            as long. None to do so if fewer than 64 samples can be set aside for the figures.
        executor: An executor of :mod:`concurrent.futures` for the independent tasks of the run; results are the same
            bytes with any, in whatever order it finishes tasks. None runs them one after the other.
    """

    macs: float | str | None = None
    params: float | str | None = None
    filters: float | str | None = None
    size: float | str | None = None
    budgets: Mapping[str, float | str] | None = None
    latency: float | str | None = None
    divergence: float | None = None
    metric: Any = None
    max_drop: float | None = None
    stats: CalibrationStats | str | Path | None = None
    stats_out: str | Path | bool | None = None
    criterion: str | Criterion = "auto"
    allocate: Allocate = "auto"
    prefer: str | tuple[float, float] | None = None
    recover: str | RecoveryMethod = "auto"
    distill: str | None = None
    checkpoint: Path | None = None
    settings: RecoverySettings | None = None
    limits: Limits | None = None
    target: str | None = None
    latency_table: str | Path | None = None
    input_shapes: Mapping[str, Sequence[int]] | None = None
    policy: Policy = "finest"
    classes: str | Sequence[int | str] | None = None
    then_quantize: Quantization | None = None
    cross_fit: bool | None = None
    executor: Executor | None = None

    @property
    def bounded(self) -> bool:
        """Whether a bound on quality replaces a budget."""
        return self.divergence is not None or self.max_drop is not None

    @property
    def gathers_stats(self) -> bool:
        """Whether statistics of the original are needed."""
        return self.stats_out is not None and self.stats_out is not False

    def budget(self) -> Budget:
        """The budget.

        Raises:
            BudgetError: A bound is not a fraction or a size.
        """
        return Budget(macs=DEFAULT_MACS) if self.unbounded else self._named()

    @property
    def unbounded(self) -> bool:
        """Whether there is neither a budget nor a bound on quality, so that the default budget applies."""
        return self._named().empty and not self.bounded

    def _named(self) -> Budget:
        given = {entry.name: getattr(self, entry.name, None) for entry in RESOURCES}
        return Budget(**given | dict(self.budgets or {}))

    def recovery(self) -> RecoverySettings:
        """How thorough recovery is."""
        return replace(self.settings or RecoverySettings(), seed=self.seed)


@dataclass(frozen=True, slots=True)
class Modes:
    """The requested modes, with every "auto" decided."""

    criterion: Criterion
    allocate: str
    recover: RecoveryMethod
    preference: Preference | None = None

    @classmethod
    def of(cls, options: PruneOptions) -> Modes:
        """Decide the open modes.

        Raises:
            BudgetError: A mode does not exist, or modes exclude each other.
            CalibrationError: A mode needs data and there are none.
        """
        allocate: str = options.allocate
        check_known(allocate, ALLOCATE, "allocation")
        recover = None if options.recover == "auto" else recovery_named(options.recover)
        criterion, has_data, has_stats = options.criterion, options.data is not None, options.stats is not None
        named = criterion != "auto"
        only_stats = has_stats and not has_data
        if allocate == "auto":  # without data on synthetic inputs, unless nothing is to be run at all
            measurable = has_data or ((recover is None or recover.writes) and not only_stats)
            allocate = "measured" if measurable and not named else "cop"
        recover = recover or recovery_named("merge" if only_stats else "full")
        if options.bounded and not has_data:
            raise CalibrationError("--divergence and --max-drop need calibration data; give --data")
        if options.bounded and allocate != "measured":
            raise BudgetError("--divergence and --max-drop go with --allocate measured")
        if options.limits is not None and options.limits.blocks is True and allocate != "measured":
            raise BudgetError("--blocks goes with --allocate measured: blocks are bought where measured curves say so")
        if options.bounded and not recover.writes:
            raise BudgetError("--divergence and --max-drop bound what recovery leaves; give --recover merge or full")
        preference = None if options.prefer is None else Preference.of(options.prefer)
        chosen = criterion_named("cop" if not named else criterion) if isinstance(criterion, str) else criterion
        if preference is not None and allocate == "cop":
            if not {"beta", "gamma"} <= {*parameters_of(chosen)}:
                raise BudgetError(f"--prefer applies to measured allocation and the cop criteria, not to {chosen.name}")
            if isinstance(criterion, str):  # a criterion of the user has parameters of its own
                chosen = criterion_named(chosen.name, beta=preference.beta, gamma=preference.gamma)
        if chosen.needs_stats and not (has_data or has_stats):
            raise CalibrationError(f"criterion {chosen.name} needs calibration data; give --data or --stats")
        return cls(chosen, allocate, recover, preference)
