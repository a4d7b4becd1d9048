"""From a model and a table of times to its time model: which widths to time, and what to make of them."""

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

_SHARES = (1 / 3, 2 / 3, 1.0)  # of a width, that are timed
_MOST_AXES = 2  # of an operator that is timed on a grid


@dataclass(frozen=True, slots=True)
class Wanted:
    """An operator with the widths that it is timed at.

    Attributes:
        operator: The operator.
        levels: Of each of its axes the widths, ascending; of an operator of many axes as many for all.
        points: int64 [axes], kept indices, of every combination, the last level running fastest.
        keys: What the points are called in a table.
    """

    operator: Operator
    levels: tuple[IntArray, ...]
    points: tuple[IntArray, ...]
    keys: tuple[str, ...]


def wanted(analysis: Analysis, staircase: Staircase) -> list[Wanted]:
    """All that has to be timed of a model."""
    sizes = analysis.structure.axis_sizes
    known: dict[tuple[str, tuple[int, ...]], str] = {}
    found = []
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
        found.append(Wanted(operator, levels, tuple(points), tuple(keys)))
    return found


def time_model(
    analysis: Analysis, table: TimeTable, staircase: Staircase, options: EngineOptions, progress: Progress = silent
) -> TimeModel:
    """The time model of an analysed model.

    Args:
        analysis: The model.
        table: Times; what it lacks is timed.
        staircase: The widths that the machine computes well.
        options: How operators are run.
        progress: Called with (stage, done, total).
    """
    asked = wanted(analysis, staircase)
    points = points_of(asked)

    def bundle(keys: Sequence[str]) -> bytes:
        return bundled([points[key] for key in keys])

    table.complete(list(points), bundle, options, progress)
    return modelled(analysis, asked, table.seconds, staircase.block)


def modelled(analysis: Analysis, asked: Sequence[Wanted], seconds: Mapping[str, float | None], block: int) -> TimeModel:
    """The time model of an analysed model from times by key; `block` channels are computed at once."""
    operators = [_timed(one, seconds, block) for one in asked]
    return TimeModel(tuple(one for one in operators if one is not None), analysis.structure.axis_sizes.copy())


def points_of(asked: Sequence[Wanted]) -> dict[str, tuple[Operator, IntArray]]:
    """Operators with the widths to time them at, by their keys in a table."""
    return {key: (one.operator, point) for one in asked for key, point in zip(one.keys, one.points, strict=True)}


def bundled(operators: Sequence[tuple[Operator, IntArray]]) -> bytes:
    """Operators at widths as one serialized model, with a reference where they are several."""
    graphs = [operator.small_model(point, place) for place, (operator, point) in enumerate(operators)]
    if len(graphs) > 1:
        graphs.append(reference())
    return bytes(in_one(graphs, operators[0][0].opset).SerializeToString())


def _levels(size: int, staircase: Staircase) -> IntArray:
    grain = staircase.block if size >= 2 * staircase.block else min(staircase.fine, size)
    widths = {size} | {min(size, -(-int(np.ceil(share * size)) // grain) * grain) for share in _SHARES}
    return np.array(sorted(widths), dtype=np.int64)


def _together(levels: Sequence[IntArray]) -> list[tuple[int, ...]]:
    """All axes at their narrowest, and all as they are."""
    return [tuple(int(one[0]) for one in levels), tuple(int(one[-1]) for one in levels)]


def _with(sizes: IntArray, axes: Sequence[int], widths: Sequence[int]) -> IntArray:
    kept = sizes.copy()
    kept[list(axes)] = widths
    return kept


def _timed(one: Wanted, times: Mapping[str, float | None], computed: int) -> TimedOperator | CopiedOperator | None:
    """An operator with its times; None where it could not be timed."""
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
