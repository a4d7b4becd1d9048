"""The whole way: analyse, calibrate, choose, recover, rewrite, verify, report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from onnxcop._base.progress import Callback, shown
from onnxcop._base.timing import Clock
from onnxcop.allocation.budget import AUTO, Budget, Limits
from onnxcop.allocation.width_multiple import suitable_widths
from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.analysis.summary import frozen_reasons
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.coupling.ops import DEFAULT_RULES, RuleTable
from onnxcop.criteria.base import Criterion
from onnxcop.data.for_model import open_data
from onnxcop.data.input_files import InputFiles
from onnxcop.data.open import Preprocess
from onnxcop.errors import BudgetError, CalibrationError, PlanMismatchError
from onnxcop.pipeline.decide import Decision, Request, decide, recover_units
from onnxcop.pipeline.finish import conclude, fed, finish
from onnxcop.pipeline.latency_target import check_bound, prune_within
from onnxcop.pipeline.options import Modes
from onnxcop.recovery.rounds import RecoverySettings
from onnxcop.report.result import PruneResult
from onnxcop.rewrite.plan import PruningPlan, units_of
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.session import EngineOptions
from onnxcop.verification.verify import require_running

log = logging.getLogger("onnxcop")

DEFAULT_MACS = 0.7


def prune(
    model: onnx.ModelProto | str | Path,
    *,
    macs: float | None = None,
    params: float | None = None,
    filters: float | None = None,
    size: int | None = None,
    latency: float | None = None,
    divergence: float | None = None,
    metric: Any = None,
    max_drop: float | None = None,
    data: Any = None,
    preprocess: Preprocess | str | None = None,
    samples: int | None = None,
    batch_size: int = 32,
    stats: CalibrationStats | str | Path | None = None,
    stats_out: str | Path | bool | None = None,
    criterion: str | Criterion = "auto",
    allocate: str = "auto",
    recover: str = "auto",
    settings: RecoverySettings | None = None,
    limits: Limits = Limits(),
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    rules: RuleTable = DEFAULT_RULES,
    policy: str = "finest",
    options: EngineOptions = EngineOptions(),
    latency_seconds: float = 0.0,
    seed: int = 0,
    progress: Callback | bool | None = None,
) -> PruneResult:
    """Prune a model.

    Args:
        model: A path or a model in memory (never changed).
        macs: Fraction of multiply-accumulates to keep at most; 0.7 where no budget is given.
        params: Fraction of parameters.
        filters: Fraction of prunable filters.
        size: Bytes of the file.
        latency: Fraction of the time that a run takes, measured on this machine with the provider of `options`;
            widths are then chosen by measurement too, unless `limits` say otherwise.
        divergence: Instead of a size: the largest output divergence allowed on held-out samples.
        metric: A score of your own, `script.py:function` or a callable that takes a ModelProto and
            returns a number, higher is better; measured before and after, and with `max_drop` the bound.
        max_drop: Largest loss of the metric allowed, instead of a size.
        data: Calibration data (see :func:`onnxcop.data.open.open_source`); without it made-up inputs decide.
        preprocess: What is done to pictures, or its name, `imagenet` say; None to guess it.
        samples: How many samples of the data are used; None for 512, or up to 1,024 of a model that runs quickly.
        batch_size: Samples that run at once.
        stats: Statistics of an earlier run, to rank (and merge) by without data.
        stats_out: Where to write the statistics of the original in the end; True only gathers them, for
            the `stats` of the result.
        criterion: Name of a criterion or one of your own; "auto" measures, and is "cop" where nothing is run.
        allocate: "cop", "measured", or "auto": measured unless a criterion was named, or there are neither data nor
            recovery.
        recover: "none", "merge", "full" or "auto"; without data, recovery works on made-up inputs.
        settings: How hard recovery tries.
        limits: What may not be cut; with `multiple_of=onnxcop.AUTO` widths are chosen by measurement.
        input_shapes: Concrete shapes for dynamic inputs.
        rules: What every operator does to labels.
        policy: "finest" coupling or "coarsest" (whole heads and groups).
        options: How models are run.
        latency_seconds: How long to measure the latency of both models in the end; 0 for not at all.
        seed: Seed of all that is drawn.
        progress: True for bars (on a terminal or in a notebook), or a function called with
            (stage, done, total).

    Returns:
        The verified result.

    Raises:
        OnnxcopError: The model, the data, the budget or the verification; nothing is written anywhere.
    """
    if isinstance(stats_out, str | Path):
        InputFiles([model], data, metric, [stats, *options.custom_ops]).check(Path(stats_out))
    with shown(progress) as tell:
        request = prepare(
            model, macs=macs, params=params, filters=filters, size=size, latency=latency, divergence=divergence,
            metric=metric, max_drop=max_drop, data=data, preprocess=preprocess, samples=samples,
            batch_size=batch_size, stats=stats, stats_out=stats_out, criterion=criterion, allocate=allocate,
            recover=recover, settings=settings, limits=limits, input_shapes=input_shapes, rules=rules,
            policy=policy, options=options, seed=seed,
            progress=tell,
        )  # fmt: skip
        if latency is not None:
            result = prune_within(request, latency, latency_seconds)
        else:
            result = conclude(request, decide(request), latency_seconds)
    write_stats(result, stats_out)
    return result


def write_stats(result: PruneResult, stats_out: str | Path | bool | None) -> None:
    """Write the statistics of a finished run where they were asked for; only now, since a failed run writes nothing."""
    if isinstance(stats_out, str | Path) and result.stats is not None:
        result.stats.save(Path(stats_out))


def prepare(
    model: onnx.ModelProto | str | Path, *, macs: float | None = None, params: float | None = None,
    filters: float | None = None, size: int | None = None, latency: float | None = None,
    divergence: float | None = None, metric: Any = None, max_drop: float | None = None, data: Any = None,
    preprocess: Preprocess | str | None = None, samples: int | None = None, batch_size: int = 32,
    stats: CalibrationStats | str | Path | None = None, stats_out: str | Path | bool | None = None,
    criterion: str | Criterion = "auto", allocate: str = "auto", recover: str = "auto",
    settings: RecoverySettings | None = None, limits: Limits = Limits(),
    input_shapes: Mapping[str, Sequence[int]] | None = None, rules: RuleTable = DEFAULT_RULES, policy: str = "finest",
    options: EngineOptions = EngineOptions(), seed: int = 0, progress: Callback | None = None,
) -> Request:  # fmt: skip
    """Analyse a model and open its data: all that comes before the choice. Arguments are those of :func:`prune`.

    Raises:
        OnnxcopError: The model, the data or the budget cannot be used, or there is nothing to prune.
    """
    modes = Modes.of(
        criterion, allocate, recover, has_data=data is not None, has_stats=stats is not None,
        bounded=divergence is not None or max_drop is not None,
    )  # fmt: skip
    budget = Budget(macs, params, filters, size)
    if latency is not None:
        check_bound(latency)
    if budget.empty and latency is divergence is max_drop is None:
        budget = Budget(macs=DEFAULT_MACS)
    gather_stats = stats_out is not None and stats_out is not False
    if gather_stats and data is None:
        raise CalibrationError("--stats-out writes what was gathered from data; give --data")
    clock = Clock()
    with clock.stage("analysis"):
        analysis = analyze(
            model, input_shapes=input_shapes, rules=rules, policy=policy, options=options,
            biases=modes.recover != "none",
        )  # fmt: skip
    if not len(analysis.structure.unit_class):
        raise BudgetError(f"{analysis.source} has nothing to prune: {nothing_reason(analysis)}", 1.0)
    if analysis.structure.coupling.shapes.trouble:  # it was tried to run it and failed: better said now than later
        require_running(analysis.original, random_feeds(analysis.original, analysis.input_shapes, seed), options)
    source = open_data(analysis, data, preprocess, samples, batch_size, seed, input_shapes)
    choices: tuple[str, ...] = ()
    if latency is not None and limits.multiple_of == 1:
        limits = replace(limits, multiple_of=AUTO)  # decided together with the depth of the cut
    elif limits.multiple_of == AUTO and latency is None:
        with clock.stage("widths"):
            widths = suitable_widths(analysis, budget, limits, options)
        limits, choices = replace(limits, multiple_of=widths.multiple), (str(widths),)
    return Request(
        analysis, budget, limits, modes, source,
        stats=None if stats is None else CalibrationStats.of_model(stats, analysis.sha256),
        gather_stats=gather_stats, divergence=divergence, metric=metric, max_drop=max_drop,
        settings=replace(settings or RecoverySettings(), seed=seed), options=options, progress=progress,
        clock=clock, policy=policy, choices=choices, latency=latency,
    )  # fmt: skip


def apply_plan(
    model: onnx.ModelProto | str | Path, plan: PruningPlan, *, data: Any = None,
    preprocess: Preprocess | str | None = None, samples: int | None = None, batch_size: int = 32,
    options: EngineOptions = EngineOptions(), rules: RuleTable = DEFAULT_RULES,
    latency_seconds: float = 0.0, seed: int = 0, progress: Callback | bool | None = None,
) -> PruneResult:  # fmt: skip
    """Replay a plan on the model it was made for: the same cut, and with data the same kind of recovery.

    Raises:
        PlanMismatchError: The plan belongs to another model.
    """
    clock = Clock()
    with clock.stage("analysis"):
        analysis = analyze(
            model, input_shapes=plan.input_shapes, rules=rules, policy=plan.policy, options=options,
            biases=data is not None,
        )  # fmt: skip
    removed = units_of(analysis, plan)
    principal = plan.settings.get("channels") == "principal"
    if principal and data is None:
        raise PlanMismatchError(
            "the plan removes principal channels, which only data tell; give --data, the samples it was made with"
        )
    source = open_data(analysis, data, preprocess, samples, batch_size, seed, plan.input_shapes)
    done: dict[str, Any] = {"allocate": plan.settings.get("allocate"), "recover": "none" if source is None else "full"}
    done["samples"] = 0 if source is None else source.count
    plan = replace(plan, settings={**plan.settings, **done})
    if source is None:
        return finish(analysis, Decision(removed, analysis.model), plan, options, clock, latency_seconds)
    with shown(progress) as tell:
        decision = recover_units(
            analysis, removed, source, RecoverySettings(seed=seed), options, tell, clock, principal=principal
        )
    return finish(analysis, fed(decision, source), plan, options, clock, latency_seconds)


def nothing_reason(analysis: Analysis) -> str:
    """Why a model cannot be pruned at all, in a few words."""
    filters, _, frozen = frozen_reasons(analysis)
    if not filters:
        return "it has no layer with trained filters (Conv, Gemm, MatMul …)"
    top = next(iter(frozen), "every filter is frozen")
    rule = " (in Python, rules= takes one)" if top.startswith("no rule for") else ""
    return f"all of its {filters} filters are frozen, for this reason above all: {top}{rule}; see `onnxcop inspect`"


__all__ = ["DEFAULT_MACS", "PruneResult", "apply_plan", "nothing_reason", "prepare", "prune"]
