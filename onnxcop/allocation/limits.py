"""Limits on selection: what every layer, or some layers, must keep."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
import onnx

from onnxcop._base.types import BoolArray, IntArray
from onnxcop.allocation.ladder import Ladder
from onnxcop.coupling.groups import Structure
from onnxcop.coupling.result import Coupling
from onnxcop.errors import BudgetError
from onnxcop.graph.subgraphs import Scopes
from onnxcop.runtime.staircase import Staircase

Auto = Literal["auto"]


AUTO: Auto = "auto"
"""Widths that suit the machine (see :mod:`onnxcop.allocation.ladder`); whole blocks where that is measured to pay."""


@dataclass(frozen=True, slots=True)
class LayerLimit:
    """Limits on the groups of some layers.

    Attributes:
        pattern: Names of nodes or tensors.
        max_cut: Largest fraction cut from each group.
        min_filters: Smallest number of units that each group keeps.
    """

    pattern: str
    max_cut: float = 1.0
    min_filters: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.max_cut <= 1 or self.min_filters < 1:
            raise BudgetError(
                f"--layer {self.pattern}: max_cut is a fraction from 0 to 1, and min_filters at least 1, not "
                f"{self.max_cut:g} and {self.min_filters}"
            )


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on selection.

    Attributes:
        min_filters: Every axis keeps at least this many indices (or all it has).
        max_cut: Largest fraction cut from one group.
        multiple_of: Kept widths of groups are multiples of it; with :data:`AUTO` they suit the machine.
        keep: Patterns of node or tensor names that are never pruned.
        only: If given, patterns of the only nodes or tensors to prune.
        exact_only: Leave out inexact groups.
        layers: Further limits on some layers; the strictest holds.
        staircase: Widths that suit the machine, for :data:`AUTO`.
        blocks: Let groups go whole, where measured curves say so (see :mod:`onnxcop.rewrite.blocks`). With :data:`AUTO`
            they may in budgets of time, if the network is small enough to try.
    """

    min_filters: int = 1
    max_cut: float = 1.0
    multiple_of: int | Auto = AUTO
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    exact_only: bool = False
    layers: tuple[LayerLimit, ...] = ()
    staircase: Staircase = field(default_factory=Staircase)
    blocks: bool | Auto = AUTO

    def __post_init__(self) -> None:
        if self.min_filters < 1 or (
            self.multiple_of != AUTO and not (isinstance(self.multiple_of, int) and self.multiple_of >= 1)
        ):
            raise BudgetError("--min-filters and --multiple-of must be at least 1")
        if not 0 <= self.max_cut <= 1:
            raise BudgetError(f"--max-cut is a fraction between 0 and 1, not {self.max_cut:g}")

    def given(self) -> list[str]:
        """The options that set a limit, by their names on the command line."""
        return [
            f"--{entry.name.replace('_', '-')}"
            for entry in fields(self)
            if entry.name not in ("staircase", "blocks") and getattr(self, entry.name) != entry.default
        ]

    def ladder(self, structure: Structure) -> Ladder:
        """The widths that groups may take."""
        if self.multiple_of == AUTO:
            return Ladder.automatic(structure, self.staircase)
        return Ladder.multiples(structure, self.multiple_of)


def allowed_units(model: onnx.ModelProto, structure: Structure, limits: Limits) -> BoolArray:
    """Units that the patterns and `exact_only` allow, bool [units].

    Raises:
        BudgetError: A pattern matches no node and no tensor.
    """
    allowed = np.ones(len(structure.unit_class), dtype=np.bool_)
    if limits.exact_only:
        exact = np.array([group.exact for group in structure.groups], dtype=np.bool_)
        allowed &= exact[structure.group_of] if len(allowed) else allowed
    for pattern in limits.keep:
        allowed[_matching(model, structure, pattern)] = False
    if limits.only:
        selected = np.zeros_like(allowed)
        for pattern in limits.only:
            selected[_matching(model, structure, pattern)] = True
        allowed &= selected
    return allowed


def group_floors(model: onnx.ModelProto, structure: Structure, limits: Limits) -> IntArray:
    """Smallest number of units that every group keeps, int64 [groups].

    Raises:
        BudgetError: A pattern matches no node and no tensor.
    """
    widths = np.array([group.width for group in structure.groups], dtype=np.int64)
    floors = widths - (limits.max_cut * widths + 1e-9).astype(np.int64)
    for layer in limits.layers:
        groups = np.unique(structure.group_of[_matching(model, structure, layer.pattern)])
        cut = widths[groups] - (layer.max_cut * widths[groups] + 1e-9).astype(np.int64)
        floors[groups] = np.maximum.reduce([floors[groups], cut, np.minimum(layer.min_filters, widths[groups])])
    return floors


def _matching(model: onnx.ModelProto, structure: Structure, pattern: str) -> IntArray:
    """Units produced by the nodes, or on the tensors, whose names match a pattern."""
    coupling = structure.coupling
    names = {name for name in (*coupling.shapes.infos, *coupling.labels) if name and fnmatch.fnmatchcase(name, pattern)}
    nodes = {
        index
        for index, node in enumerate(Scopes.of(model).nodes)
        if node.name and fnmatch.fnmatchcase(node.name, pattern)
    }
    if not names and not nodes:
        raise BudgetError(f"no node and no tensor is named {pattern!r}; see the names with `onnxcop inspect`")
    matches = [_units_of_nodes(coupling, structure, nodes)]
    for name in sorted(names):
        matches += [structure.units_on(atoms) for atoms in coupling.labels.get(name, ()) if atoms is not None]
    units = np.unique(np.concatenate(matches)) if matches else np.empty(0, np.int64)
    return units[units >= 0]


def _units_of_nodes(coupling: Coupling, structure: Structure, nodes: set[int]) -> IntArray:
    produced = [
        structure.units_on(c.produced)
        for c in coupling.findings.contractions
        if c.node in nodes and c.produced is not None
    ]
    return np.concatenate(produced) if produced else np.empty(0, np.int64)
