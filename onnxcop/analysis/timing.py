"""The time model of a model: the widths to time, and the model made from their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.operators import Operator, in_one, operators_of, reference
from onnxcop.analysis.time_model import CopiedOperator, TimedOperator, TimeModel
from onnxcop.runtime.session import EngineOptions
from onnxcop.runtime.staircase import Staircase
from onnxcop.runtime.time_table import TimeTable

_SHARES = (1 / 3, 2 / 3, 1.0)  # shares of a width to time
_MOST_AXES = 2  # shares of a width to time, for operators on a grid


@dataclass(frozen=True, slots=True)
class TimingPlan:
    """An operator with the widths to time it at.

    Attributes:
        operator: The operator.
        levels: Widths of each axis, ascending; equally many for all axes of an operator with many.
        points: int64 [axes], kept indices, for every combination; the last axis varies fastest.
        keys: Keys of the points in a table.
    """

    operator: Operator
    levels: tuple[IntArray, ...]
    points: tuple[IntArray, ...]
    keys: tuple[str, ...]


def timing_plans(analysis: Analysis, staircase: Staircase) -> list[TimingPlan]:
    """All operators of a model to time."""
    sizes = analysis.structure.axis_sizes
    known: dict[tuple[str, tuple[int, ...]], str] = {}
    plans = []
    for operator in operators_of(analysis):
        grid = len(operator.axes) <= _MOST_AXES
        levels = tuple(_levels(int(sizes[axis]), staircase) for axis in operator.axes)
        combined = product(*levels) if grid else _together(levels)
        points = [_with(sizes, operator.axes, widths) for widths in combined]
        keys = []
        for point in points:
            name = (operator.signature, tuple(point[list(operator.axes)].tolist()))
            known.setdefault(name, operator.key(point) if name not in known else "")
            keys.append(known[name])
        plans.append(TimingPlan(operator, levels, tuple(points), tuple(keys)))
    return plans


def time_model(
    analysis: Analysis, table: TimeTable, staircase: Staircase, options: EngineOptions, progress: Progress = silent
) -> TimeModel:
    """The time model of an analysed model.

    Args:
        analysis: The model.
        table: Known times; missing ones are measured.
        staircase: The widths that the machine computes well.
        options: How to run operators.
        progress: Called with (stage, done, total).
    """
    plans = timing_plans(analysis, staircase)
    points = points_of(plans)

    def bundle(keys: Sequence[str]) -> bytes:
        return bundled([points[key] for key in keys])

    table.complete(list(points), bundle, options, progress)
    return modelled(analysis, plans, table.seconds, staircase.block)


def modelled(
    analysis: Analysis, plans: Sequence[TimingPlan], seconds: Mapping[str, float | None], block: int
) -> TimeModel:
    """The time model of an analysed model from times by key; `block` channels are computed at once."""
    operators = [_timed(one, seconds, block) for one in plans]
    return TimeModel(tuple(one for one in operators if one is not None), analysis.structure.axis_sizes.copy())


def points_of(plans: Sequence[TimingPlan]) -> dict[str, tuple[Operator, IntArray]]:
    """Operators with the widths to time them at, by their keys in a table."""
    return {key: (one.operator, point) for one in plans for key, point in zip(one.keys, one.points, strict=True)}


def bundled(operators: Sequence[tuple[Operator, IntArray]]) -> bytes:
    """Operators at widths as one serialized model, with a reference operator if there are several."""
    graphs = [operator.small_model(point, place) for place, (operator, point) in enumerate(operators)]
    if len(graphs) > 1:
        graphs.append(reference())
    return bytes(in_one(graphs, operators[0][0].opset).SerializeToString())


def _levels(size: int, staircase: Staircase) -> IntArray:
    grain = staircase.block if size >= 2 * staircase.block else min(staircase.fine, size)
    widths = {size} | {min(size, -(-int(np.ceil(share * size)) // grain) * grain) for share in _SHARES}
    if staircase.block // 2 < min(widths) <= 2 * staircase.block:  # less than a block takes hardly less time than one
        widths.add(staircase.block // 2)
    return np.array(sorted(widths), dtype=np.int64)


def _together(levels: Sequence[IntArray]) -> list[tuple[int, ...]]:
    """All axes at their narrowest, and all at full width."""
    return [tuple(int(one[0]) for one in levels), tuple(int(one[-1]) for one in levels)]


def _with(sizes: IntArray, axes: Sequence[int], widths: Sequence[int]) -> IntArray:
    kept = sizes.copy()
    kept[list(axes)] = widths
    return kept


def _timed(one: TimingPlan, times: Mapping[str, float | None], computed: int) -> TimedOperator | CopiedOperator | None:
    """An operator with its times; None if it could not be timed."""
    seconds = [times.get(key) for key in one.keys]
    known = [value for value in seconds if value is not None]
    if len(known) < len(seconds):
        return None
    axes, values = one.operator.axes, np.array(known)
    if len(axes) <= _MOST_AXES:
        block = computed if one.operator.blocked else 1
        return TimedOperator(axes, one.levels, values.reshape([len(levels) for levels in one.levels]), block)
    parts = one.operator.parts
    line = CopiedOperator(axes, parts, 0.0, 1.0)
    narrow, wide = (line.at(point[list(axes)].tolist()) for point in one.points)
    each = float((values[1] - values[0]) / (wide - narrow)) if wide > narrow else 0.0
    return CopiedOperator(axes, parts, float(values[1] - each * wide), each)
