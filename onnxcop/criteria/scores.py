"""The importance of every filter before anything is cut, and its terms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcop._base.keywords import by_keywords
from onnxcop._base.progress import Progress, shown
from onnxcop._base.timing import single_threaded
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.census import group_name, node_name
from onnxcop.calibration.calibrate import gather_statistics
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.criteria.base import Criterion, PruningContext
from onnxcop.criteria.registry import criterion_named
from onnxcop.data.open import open_data
from onnxcop.data.options import DataOptions
from onnxcop.errors import CalibrationError
from onnxcop.runtime.session import EngineOptions


@dataclass(frozen=True, slots=True)
class UnitScore:
    """One unit: a filter with everything coupled to it.

    Attributes:
        unit: Its number.
        group: Its dependency group, named as :class:`onnxcop.analysis.inspect.GroupEntry` names it.
        layer: The first layer of the group, None if the group is only read.
        filter: Its position among that layer's filters (among the group's units if there is no layer).
        rank: 0 for the unit that is removed first, before any cut.
        importance: The lowest is removed first.
        terms: The terms of the importance by name, before weighting.
    """

    unit: int
    group: str
    layer: str | None
    filter: int
    rank: int
    importance: float
    terms: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, including the terms."""
        head = {name: getattr(self, name) for name in self.__slots__ if name != "terms"}
        return head | self.terms


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of a model's filters by one criterion.

    Attributes:
        criterion: Its name.
        parameters: Its parameters.
        terms: Names of the terms.
        units: Every unit that may be removed, the least important first.
    """

    criterion: str
    parameters: dict[str, Any]
    terms: tuple[str, ...]
    units: tuple[UnitScore, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "criterion": {"name": self.criterion, **self.parameters}, "terms": list(self.terms),
            "units": [unit.to_dict() for unit in self.units],
        }  # fmt: skip


@single_threaded
def score(analysis: Analysis, criterion: str | Criterion = "cop", stats: CalibrationStats | None = None,
          seed: int = 0) -> Scores:  # fmt: skip
    """Rank the units of an analysed model before any cut.

    Args:
        analysis: The model.
        criterion: A criterion or its name; "auto" is "cop".
        stats: Statistics of the model, for criteria that need them.
        seed: Random seed, for random criteria.

    Raises:
        BudgetError: No criterion has this name.
        CalibrationError: The criterion needs statistics and there are none.
    """
    if isinstance(criterion, str):
        criterion = criterion_named("cop" if criterion == "auto" else criterion)
    if criterion.needs_stats and stats is None:
        raise CalibrationError(f"criterion {criterion.name} needs calibration data; give --data or --stats")
    structure = analysis.structure
    context = PruningContext.of(analysis.model, structure, analysis.cost, stats, seed)
    ranking = criterion.rank(context)
    importance, terms = ranking.importance(structure.axis_sizes), ranking.terms(structure.axis_sizes)
    names = [group_name(analysis, group.index) for group in structure.groups]
    places = _places(analysis)
    units = []
    for rank, unit in enumerate(np.argsort(importance, kind="stable").tolist()):
        layer, place = places[unit]
        parts = {name: float(values[unit]) for name, values in terms.items()}
        group = names[int(structure.group_of[unit])]
        units.append(
            UnitScore(
                unit=unit,
                group=group,
                layer=layer,
                filter=place,
                rank=rank,
                importance=float(importance[unit]),
                terms=parts,
            )
        )
    return Scores(criterion.name, criterion.parameters(), tuple(terms), tuple(units))


def _places(analysis: Analysis) -> list[tuple[str | None, int]]:
    """The first layer that produces each unit, and the position of the unit among its filters."""
    structure = analysis.structure
    places: list[tuple[str | None, int]] = [(None, 0)] * len(structure.unit_class)
    produced = {c.node: c.produced for c in structure.coupling.findings.contractions if c.produced is not None}
    for group in structure.groups:
        layer = group.producers[0] if group.producers else None
        atoms = None if layer is None else produced.get(layer)
        on_axis = group.units if atoms is None else structure.units_on(atoms)
        position = {unit: place for place, unit in reversed(list(enumerate(on_axis.tolist())))}
        name = None if layer is None else node_name(analysis, layer)
        for unit in group.units.tolist():
            if unit in position:
                places[unit] = (name, position[unit])
    return places


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsOptions(DataOptions):
    """Options of statistics.

    Attributes:
        stats: A file of statistics, which takes precedence over the data.
        stats_out: File to write gathered statistics to.
        options: How to run the model; None for the best provider of this machine.
        progress: True for bars (on a terminal or in a notebook), or a function called with (stage, done, total).
    """

    stats: str | Path | None = None
    stats_out: str | Path | None = None
    options: EngineOptions | None = None
    progress: Progress | bool | None = None


@by_keywords(StatisticsOptions)
def statistics(analysis: Analysis, options: StatisticsOptions) -> CalibrationStats | None:
    """Statistics of an analysed model: loaded from a file, else gathered from data, else None.

    Args:
        analysis: The model.
        options: The fields of :class:`StatisticsOptions`, as keyword arguments.

    Raises:
        CalibrationError: The data or the file cannot be used.
        PlanMismatchError: The statistics belong to another model.
    """
    if options.stats is not None:
        return CalibrationStats.of_model(options.stats, analysis.sha256)
    source = open_data(analysis, options, analysis.input_shapes)
    if source is None:
        return None
    with shown(options.progress) as progress:
        stats = gather_statistics(analysis, source, options.options or EngineOptions(), progress)
    if options.stats_out is not None:
        stats.save(Path(options.stats_out))
    return stats
