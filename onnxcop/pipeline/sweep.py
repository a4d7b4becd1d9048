"""The trade-off curve of a model: its quality at several budgets."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from onnxcop._base.files import Writing
from onnxcop._base.keywords import by_keywords
from onnxcop._base.progress import shown
from onnxcop._base.timing import Clock
from onnxcop.allocation.budget import Budget
from onnxcop.data.input_files import InputFiles
from onnxcop.errors import BudgetError, ModelError
from onnxcop.pipeline.decide import Request, within_memory
from onnxcop.pipeline.finish import conclude, with_hints_logged
from onnxcop.pipeline.incremental import IncrementalPruner
from onnxcop.pipeline.never_slower import prune_faster
from onnxcop.pipeline.options import PruneOptions
from onnxcop.pipeline.prune import prepare, write_stats
from onnxcop.report.curve import CurveRow, Point, original_row
from onnxcop.report.plot import check_plot, plot_curve
from onnxcop.report.result import PruneResult

log = logging.getLogger("onnxcop")


@by_keywords(PruneOptions)
def sweep(model: onnx.ModelProto | str | Path, macs: Sequence[float], options: PruneOptions) -> Iterator[Point]:
    """Prune a model to several budgets, from the loosest to the tightest.

    Statistics are gathered once. With a criterion, each point equals the result of :func:`onnxcop.prune` for its
    budget. With measurement, each point continues from the one before, so the whole curve costs little more than its
    last point. A point that is slower than the original is pruned again by itself, as :func:`onnxcop.prune` does.

    Args:
        model: A path or a model in memory (never changed).
        macs: Fractions of the multiply-accumulates to keep.
        options: The fields of :class:`onnxcop.PruneOptions`, as keyword arguments; its other budgets hold at every
            point. Figures come from samples that are set aside, never by `cross_fit`.

    Yields:
        Each point when it is finished. If a budget cannot be met, a warning is logged and the curve ends.

    Raises:
        BudgetError: No budget was given, or not even the loosest can be met.
        OnnxcopError: As :func:`onnxcop.prune`.
    """
    return sweep_with(model, macs, options)


def sweep_with(model: onnx.ModelProto | str | Path, macs: Sequence[float], options: PruneOptions) -> Iterator[Point]:
    """Prune to several budgets, as :func:`sweep`, with all options in one object."""
    budgets = sorted(set(macs), reverse=True)
    if not budgets:
        raise BudgetError("a sweep needs budgets; give --macs 0.9,0.8,0.7")
    for name in ("latency", "divergence", "max_drop"):
        if getattr(options, name) is not None:
            raise BudgetError(
                f"a sweep needs budgets of multiply-accumulates; --{name.replace('_', '-')} is for a single run"
            )
    with shown(options.progress) as progress:
        request = prepare(model, replace(options, macs=budgets[0], cross_fit=False), progress)
        course, clock = IncrementalPruner(request), request.clock
        course.warn()
        for place, fraction in enumerate(budgets):
            budget = request.budget.but(macs=fraction)
            try:
                result, course = _next_point(course, budget, clock)
            except BudgetError as error:
                if place == 0:
                    raise
                log.warning("the curve ends here: %s", error)
                return
            result = with_hints_logged(result)
            if place == 0:
                write_stats(result, options.stats_out)
            yield Point(fraction, result)
            clock = Clock()


def _next_point(course: IncrementalPruner, budget: Budget, clock: Clock) -> tuple[PruneResult, IncrementalPruner]:
    """The result for the next budget, and the course that continues from it, in smaller batches if memory is short."""

    def carried_out(request: Request) -> tuple[PruneResult, IncrementalPruner]:
        own = course if request is course.request else course.repeated(request)
        decided = replace(request, budget=budget, clock=clock)
        return prune_faster(decided, conclude(decided, own.decide(budget, clock))), own

    return within_memory(carried_out, course.request)


class Record:
    """Files of a trade-off curve, complete after every point.

    Args:
        model: The original's file, from which names of results are derived.
        table: File for the table of figures (CSV).
        plot: File for the plot, None for none.
        folder: Folder for the models, None for none; created if it does not exist.
        external_data: Write the models' weights beside them.
        inputs: Input files, which are never overwritten; by default the original alone.

    Raises:
        ModelError: A file cannot be written.
    """

    def __init__(
        self, model: Path, table: Path, plot: Path | None = None, folder: Path | None = None,
        *, external_data: bool | None = None, inputs: InputFiles | None = None,
    ) -> None:  # fmt: skip
        self.rows: list[CurveRow] = []
        self._model, self._table, self._plot, self._folder = model, table, plot, folder
        self._external_data = external_data
        self._inputs = inputs or InputFiles([model])
        self._inputs.check(table, plot)
        if plot is not None:
            check_plot(plot)
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ModelError(
                    f"{folder} cannot be created: {error.strerror or error}; choose another folder"
                ) from None

    def add(self, point: Point) -> CurveRow:
        """Write a point; if that fails, earlier points stay."""
        if self._folder is not None:
            name = f"{self._model.name.removesuffix('.onnx')}.macs-{point.macs:g}.onnx"
            point = replace(point, file=self._folder / name)
            self._inputs.refuse(self._folder / name)
            point.result.save(self._folder / name, external_data=self._external_data)
        if not self.rows:
            self.rows.append(original_row(point))
        self.rows.append(point.row())
        with Writing() as files:
            files.add(self._table, as_csv(self.rows))
            if self._plot is not None:
                files.add(self._plot, plot_curve(self.rows, self._model.name, self._plot.suffix.lower()))
        return self.rows[-1]


def as_csv(rows: Sequence[CurveRow]) -> bytes:
    """Rows as a table of comma-separated values, UTF-8; empty cells for None."""
    out = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()
