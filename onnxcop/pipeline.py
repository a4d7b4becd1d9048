"""The whole way: analyse, calibrate, rank, choose, rewrite, verify, recover, report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcop import model as models
from onnxcop.allocate import choose
from onnxcop.analysis import Analysis, analyze
from onnxcop.atoms import IntArray
from onnxcop.budget import Budget, Limits
from onnxcop.catalogue import criterion_named
from onnxcop.criteria import Criterion, Subject
from onnxcop.engine import EngineOptions
from onnxcop.errors import BudgetError
from onnxcop.ops import DEFAULT_RULES, RuleTable
from onnxcop.plan import PruningPlan, cuts_of, units_of
from onnxcop.report import Report, frozen_reasons, group_reports, totals
from onnxcop.rewrite import apply as rewrite
from onnxcop.sharing import reshare
from onnxcop.verify import Verification, verify

DEFAULT_MACS = 0.7


@dataclass(frozen=True)
class PruneResult:
    """A pruned model with how it came about.

    Attributes:
        model: The pruned model.
        plan: The decision, replayable.
        report: The numbers.
    """

    model: onnx.ModelProto
    plan: PruningPlan
    report: Report

    def save(self, path: str | Path, *, external_data: bool | None = None) -> None:
        """Write the model; see :func:`onnxcop.model.save`."""
        models.save(self.model, Path(path), external_data=external_data)


class Clock:
    """Adds up the seconds of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def prune(
    model: onnx.ModelProto | str | Path,
    *,
    macs: float | None = None,
    params: float | None = None,
    filters: float | None = None,
    size: int | None = None,
    criterion: str | Criterion = "cop",
    limits: Limits = Limits(),
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    rules: RuleTable = DEFAULT_RULES,
    policy: str = "finest",
    options: EngineOptions = EngineOptions(),
    seed: int = 0,
) -> PruneResult:
    """Prune a model.

    Args:
        model: A path or a model in memory (never changed).
        macs: Fraction of multiply-accumulates to keep at most; 0.7 where no budget is given.
        params: Fraction of parameters.
        filters: Fraction of prunable filters.
        size: Bytes of the file.
        criterion: Name of a criterion, or one of your own.
        limits: What may not be cut.
        input_shapes: Concrete shapes for dynamic inputs.
        rules: What every operator does to labels.
        policy: "finest" coupling or "coarsest" (whole heads and groups).
        options: How models are run.
        seed: Seed of all that is drawn.

    Returns:
        The verified result.

    Raises:
        OnnxcopError: The model, the budget or the verification; nothing is written anywhere.
    """
    budget = Budget(macs, params, filters, size)
    if budget.empty:
        budget = Budget(macs=DEFAULT_MACS)
    clock = Clock()
    with clock.stage("analysis"):
        analysis = analyze(model, input_shapes=input_shapes, rules=rules, policy=policy, options=options)
    ranked = criterion_named(criterion) if isinstance(criterion, str) else criterion
    subject = Subject.of(analysis.model, analysis.structure, analysis.cost, None, seed)
    if not len(analysis.structure.unit_class):
        raise BudgetError(f"{analysis.source} has nothing to prune: {nothing_reason(analysis)}", 1.0)
    with clock.stage("selection"):
        selection = choose(subject, ranked.rank(subject), budget, limits)
    plan = PruningPlan(
        analysis.sha256, cuts_of(analysis, selection.removed), dict(analysis.input_shapes), policy,
        {name: value for name, value in asdict(budget).items() if value is not None},
        {"name": ranked.name, **ranked.parameters()},
        {"seed": seed, "limits": asdict(limits)},
    )  # fmt: skip
    return finish(analysis, selection.removed, plan, options, clock)


def apply_plan(
    model: onnx.ModelProto | str | Path, plan: PruningPlan, *, options: EngineOptions = EngineOptions(),
    rules: RuleTable = DEFAULT_RULES,
) -> PruneResult:  # fmt: skip
    """Replay a plan on the model it was made for.

    Raises:
        PlanMismatchError: The plan belongs to another model.
    """
    clock = Clock()
    with clock.stage("analysis"):
        analysis = analyze(model, input_shapes=plan.input_shapes, rules=rules, policy=plan.policy, options=options)
    return finish(analysis, units_of(analysis, plan), plan, options, clock)


def finish(
    analysis: Analysis, removed: IntArray, plan: PruningPlan, options: EngineOptions, clock: Clock
) -> PruneResult:
    """Rewrite, verify and report a selection."""
    with clock.stage("rewriting"):
        pruned = rewrite(analysis.model, analysis.structure, np.sort(removed))
    with clock.stage("verification"):
        checked = verify(analysis.model, pruned, analysis.structure, np.sort(removed), options)
    reshare(pruned, analysis.copies)
    return PruneResult(pruned, plan, build_report(analysis, removed, pruned, plan, checked, clock))


def build_report(
    analysis: Analysis, removed: IntArray, pruned: onnx.ModelProto, plan: PruningPlan,
    checked: Verification | None, clock: Clock, **extra: Any,
) -> Report:  # fmt: skip
    """Gather the numbers of a finished run."""
    filters, share, frozen = frozen_reasons(analysis)
    return Report(
        analysis.source,
        totals(analysis.original, float(analysis.cost.original()[0])),
        totals(pruned, float(analysis.cost.of_units(removed)[0])),
        group_reports(analysis, removed), filters, share, frozen,
        tuple(str(reason) for _, reason in analysis.structure.coupling.declined),
        checked, str(plan.criterion.get("name", "")), seconds=dict(clock.seconds), **extra,
    )  # fmt: skip


def nothing_reason(analysis: Analysis) -> str:
    """Why a model cannot be pruned at all, in a few words."""
    filters, _, frozen = frozen_reasons(analysis)
    if not filters:
        return "it has no layer with trained filters (Conv, Gemm, MatMul …) at its top level"
    top = next(iter(frozen), "every filter is frozen")
    return f"all of its {filters} filters are frozen, most of them because the layer {top}"
