"""What the user asks for, and how units are chosen and compensated once every "auto" is decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

DEFAULT_MACS = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyOptions(DataOptions):
    """How a decision is carried out.

    Attributes:
        rules: What every operator does to labels; None for :data:`onnxcop.DEFAULT_RULES` and those that
            other packages register.
        options: How models are run; None for what this machine has.
        task: What the model is for, one of :data:`onnxcop.outputs.tasks.TASKS`; None to decide by evidence.
        latency_seconds: How long to measure the latency of both models in the end; 0 to skip it.
        metadata: Whether the result says in its metadata where it comes from (see
            :func:`onnxcop.rewrite.provenance.provenance`).
        keep_initializer_inputs: Leave stored tensors that are inputs as well on the list of inputs. By default they
            leave it, since they keep ONNX Runtime from fusing.
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
        """How models are run."""
        return self.options or EngineOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions(ApplyOptions):
    """All that can be asked of a run; every field is a keyword argument of :func:`onnxcop.prune`.

    Attributes:
        macs: Fraction of multiply-accumulates to keep at most, `0.7` or `"70%"`; 0.7 if no budget is given.
        params: Fraction of parameters to keep at most.
        filters: Fraction of prunable filters to keep at most.
        size: Size of the file at most, in bytes, as `"5MB"`, or as a fraction such as `0.5` or `"50%"`.
        budgets: Bounds on other resources, by name (see :data:`onnxcop.allocation.resources.RESOURCES`).
        latency: Fraction of the time of a run to keep at most, measured on this machine with the provider of
            `options`, or on the device of `latency_table`.
        divergence: Instead of a budget: the largest output divergence allowed on held-out samples.
        metric: A score of your own, `script.py:function` or a callable that takes a ModelProto and returns a number,
            higher is better; measured before and after, and with `max_drop` the bound.
        max_drop: Instead of a budget: the largest loss of the metric allowed.
        stats: Statistics of an earlier run, to rank (and merge) by without data.
        stats_out: Where to write the statistics of the original in the end; True only gathers them, for the `stats`
            of the result.
        criterion: Name of a criterion or one of your own; "auto" measures, and is "cop" where nothing is run.
        allocate: How layers share the cut; "auto" is "measured" unless a criterion was named, or there are neither
            data nor recovery.
        prefer: What to save rather than the rest: "faster" (multiply-accumulates), "smaller" (parameters), "balanced",
            or COP's weights (beta, gamma). Measured allocation and the COP criteria follow it.
        recover: How to compensate for removed filters: "auto", or a name of
            :data:`onnxcop.recovery.methods.RECOVERIES`, or a method of your own;
            without data, recovery works on synthetic inputs.
        distill: How long to distill the pruned model from the original at the end: `"5m"`, `"20 epochs"` or `"auto"`;
            None for not at all. Needs data, no labels.
        checkpoint: File that keeps the state of distillation; a run that finds it resumes from there.
        settings: How much effort recovery makes; None for the usual.
        limits: What may not be cut; widths suit this machine, unless they say otherwise.
        target: A device other than this one, by its name in :data:`onnxcop.runtime.staircase.TARGETS`, whose widths are
            taken; None for what this machine computes well.
        latency_table: Times of another device (see :func:`onnxcop.profile`), whose widths are taken and of which
            `latency` is a fraction; nothing is timed on this machine then.
        input_shapes: Concrete shapes for dynamic inputs.
        policy: "finest" coupling or "coarsest" (whole heads and groups).
        classes: Numbers or names of the classes that the result gives out, `[0, 2, 5]` or `"0,2,5"`; None for all.
            The model is cut down to them before anything else (see :mod:`onnxcop.rewrite.classes`).
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

    @property
    def bounded(self) -> bool:
        """Whether a bound on quality takes the place of a budget."""
        return self.divergence is not None or self.max_drop is not None

    @property
    def gathers_stats(self) -> bool:
        """Whether statistics of the original are wanted."""
        return self.stats_out is not None and self.stats_out is not False

    def budget(self) -> Budget:
        """What to keep at most.

        Raises:
            BudgetError: A bound is no fraction or no size.
        """
        return Budget(macs=DEFAULT_MACS) if self.unbounded else self._named()

    @property
    def unbounded(self) -> bool:
        """Whether neither a budget nor a bound on quality is asked for, so that the default is in force."""
        return self._named().empty and not self.bounded

    def _named(self) -> Budget:
        given = {entry.name: getattr(self, entry.name, None) for entry in RESOURCES}
        return Budget(**given | dict(self.budgets or {}))

    def recovery(self) -> RecoverySettings:
        """How much effort recovery makes."""
        return replace(self.settings or RecoverySettings(), seed=self.seed)


@dataclass(frozen=True, slots=True)
class Modes:
    """What was asked for, with every "auto" decided."""

    criterion: Criterion
    allocate: str
    recover: RecoveryMethod
    preference: Preference | None = None

    @classmethod
    def of(cls, options: PruneOptions) -> Modes:
        """Decide what is left open.

        Raises:
            BudgetError: A mode that does not exist, or modes that exclude each other.
            CalibrationError: A mode that needs data, without any.
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
        if options.bounded and not recover.writes:
            raise BudgetError("--divergence and --max-drop bound what recovery leaves; give --recover merge or full")
        preference = None if options.prefer is None else Preference.of(options.prefer)
        found = criterion_named("cop" if not named else criterion) if isinstance(criterion, str) else criterion
        if preference is not None and allocate == "cop":
            if not {"beta", "gamma"} <= {*parameters_of(found)}:
                raise BudgetError(f"--prefer applies to measured allocation and the cop criteria, not to {found.name}")
            if isinstance(criterion, str):  # a criterion of the user's own has numbers of its own
                found = criterion_named(found.name, beta=preference.beta, gamma=preference.gamma)
        if found.needs_stats and not (has_data or has_stats):
            raise CalibrationError(f"criterion {found.name} needs calibration data; give --data or --stats")
        return cls(found, allocate, recover, preference)
