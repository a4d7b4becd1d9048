"""Widths that groups may take: the steps at which a machine computes, as far apart as each group can afford.

Kernels compute channels in blocks. A width between two multiples of the block costs the time of the upper one, and some
widths miss the fast kernels altogether (see :mod:`onnxcop.runtime.staircase`). A wide group loses nothing by whole
blocks. A narrow one would have only two or three widths left, so it uses finer steps, down to the finest of the fast
kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnxcop._base.types import BoolArray, IntArray
from onnxcop.coupling.groups import DependencyGroup, Structure
from onnxcop.runtime.staircase import Staircase

_STEPS = 6  # fewest widths that a group should have to choose from


@dataclass(frozen=True, slots=True)
class Channels:
    """Positions of a group's units among the channels of the layers that compute them.

    Attributes:
        times: Channels that a unit represents.
        others: Other channels on the same axis, which always stay.
        joint: Whether other groups share an axis of channels with them, e.g. behind a Concat, so that a layer there
            reads the sum of several widths.
    """

    times: int
    others: int
    joint: bool = False


@dataclass(frozen=True, slots=True)
class Ladder:
    """The widths that every group may be cut to.

    Attributes:
        rungs: By group int64, numbers of kept units, ascending; the last one is the group's own width.
    """

    rungs: tuple[IntArray, ...]
    _finer: tuple[Ladder, ...] = field(default=(), repr=False)

    @classmethod
    def multiples(cls, structure: Structure, multiple: int) -> Ladder:
        """Widths that are multiples of a number, and no others."""
        return cls(tuple(_rungs(group, Channels(1, 0), multiple, 0) for group in structure.groups))

    @classmethod
    def automatic(cls, structure: Structure, staircase: Staircase) -> Ladder:
        """Widths that suit a machine; if a budget cannot be met with them, :meth:`finer` has more."""
        places = channels_of(structure)
        grains = [_grain(group, place, staircase) for group, place in zip(structure.groups, places, strict=True)]
        ladder: tuple[Ladder, ...] = ()
        most = max(grains, default=1)
        for halvings in reversed(range(most.bit_length())):
            floor = min(staircase.fine, most >> halvings)  # no group leaves the fast kernels before all have fine steps
            rungs = tuple(
                _rungs(group, place, max(min(grain, floor), grain >> halvings), 0 if halvings else staircase.block)
                for group, place, grain in zip(structure.groups, places, grains, strict=True)
            )
            ladder = (cls(rungs, ladder),)
        return ladder[0] if ladder else cls(())

    @property
    def finer(self) -> Ladder | None:
        """The same with half the step; None if every width is allowed already or no finer steps exist."""
        return self._finer[0] if self._finer else None

    def at_most(self, group: int, kept: int) -> int:
        """The largest width up to a number of kept units; 0 if there is none."""
        rungs = self.rungs[group]
        place = int(np.searchsorted(rungs, kept, side="right"))
        return int(rungs[place - 1]) if place else 0

    def above(self, group: int, kept: int) -> int:
        """The next width above a number of kept units; at the top, the group's own width."""
        rungs = self.rungs[group]
        return int(rungs[min(int(np.searchsorted(rungs, kept, side="right")), len(rungs) - 1)])


def _grain(group: DependencyGroup, place: Channels, staircase: Staircase) -> int:
    """The step between a group's widths."""
    channels = place.times * group.width + place.others
    grain = staircase.grain(channels, _STEPS)
    while place.joint and grain < staircase.block and channels % (2 * grain) == 0 and channels >= 4 * grain:
        grain *= 2  # a Concat of other widths leaves the blocked layout
    return grain


def _rungs(group: DependencyGroup, place: Channels, grain: int, block: int) -> IntArray:
    """The widths at a step; a step below a block leaves the blocked layout, except half a block."""
    kept = np.arange(1, group.width + 1, dtype=np.int64)
    channels = place.times * kept + place.others
    even: BoolArray = channels % grain == 0
    if 2 * channels[-1] > block:
        even &= (channels >= block) | (2 * channels == block)
    even[-1] = True
    return np.asarray(kept[even])


def channels_of(structure: Structure) -> tuple[Channels, ...]:
    """Positions of the units of every group among the channels of their layers."""
    of_units = np.array([group.width for group in structure.groups], dtype=np.int64)
    rows = [_row(structure, group) for group in structure.groups]
    prunable = np.zeros(len(structure.axes), dtype=np.int64)
    for (axes, times), width in zip(rows, of_units.tolist(), strict=True):
        prunable[axes] += times * width
    layers = _layer_axes(structure)
    channels = []
    for group, (axes, times) in zip(structure.groups, rows, strict=True):
        places = [
            (int(prunable[axis] - count * group.width), count, int(structure.axis_sizes[axis] - prunable[axis]))
            for axis, count in zip(axes.tolist(), times.tolist(), strict=True)
            if axis in layers[group.index]
        ]
        _, count, others = min(places, default=(0, 1, 0))
        channels.append(Channels(count, others, any(joint for joint, *_ in places)))
    return tuple(channels)


def _row(structure: Structure, group: DependencyGroup) -> tuple[IntArray, IntArray]:
    incidence = structure.incidence
    row = slice(incidence.indptr[group.units[0]], incidence.indptr[group.units[0] + 1])
    return incidence.indices[row].astype(np.int64), incidence.data[row].astype(np.int64)


def _layer_axes(structure: Structure) -> list[set[int]]:
    """The channel axes that layers produce or sum over, by group."""
    axes: list[set[int]] = [set() for _ in structure.groups]
    for contraction in structure.coupling.findings.contractions:
        if contraction.kernel is None:
            continue
        atoms = [operand.atoms for operand in contraction.operands[:1]]
        atoms += [] if contraction.produced is None else [contraction.produced]
        for one in atoms:
            units = structure.units_on(one)
            for group in np.unique(structure.group_of[units[units >= 0]]).tolist():
                axes[group].add(structure.axis_id(one))
    return axes
