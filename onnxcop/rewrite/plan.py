"""The plan: a file that says which indices of which tensors are removed, for which model, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxcop._base.documents import DocumentKind, list_in, table_in, text_in, whole_in, wholes_in
from onnxcop._base.files import write_atomically
from onnxcop._base.types import IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.kept_classes import ClassWish, KeptClasses
from onnxcop.coupling.groups import Structure
from onnxcop.errors import PlanMismatchError
from onnxcop.rewrite.blocks import Blocks, emptied

_KIND = DocumentKind("onnxcop-plan", 1, "pruning plan", "--plan-out makes one")
POLICIES = ("finest", "coarsest")


@dataclass(frozen=True, slots=True)
class Cut:
    """Removed indices of one tensor's axis, with everything coupled to them."""

    tensor: str
    axis: int
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """A replayable decision.

    Attributes:
        model: SHA-256 of the model it was made for.
        cuts: The removed units, each named by one stored tensor.
        input_shapes: The shapes of the analysis.
        policy: The coupling policy of the analysis.
        budget: The requested budget.
        criterion: Name and parameters of the criterion.
        settings: Everything else that led to the decision (limits, seed, allocation, recovery).
    """

    model: str
    cuts: tuple[Cut, ...]
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    policy: str = "finest"
    budget: Mapping[str, Any] = field(default_factory=dict)
    criterion: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> KeptClasses | None:
        """The classes that the model was reduced to first; None if it keeps all."""
        classes = self.settings.get("classes")
        return None if classes is None else KeptClasses.from_dict(classes)

    @property
    def wish(self) -> ClassWish | None:
        """The wish that selects those classes."""
        return None if self.kept is None else self.kept.wish

    @property
    def original(self) -> str:
        """SHA-256 of the user's file: the model with all its classes."""
        return self.model if self.kept is None else self.kept.original

    def to_json(self) -> str:
        """The file's text."""
        from onnxcop._version import __version__

        document = {
            "format": _KIND.format, "version": _KIND.version, "onnxcop": __version__, "model_sha256": self.model,
            "budget": dict(self.budget), "criterion": dict(self.criterion), "settings": dict(self.settings),
            "policy": self.policy, "input_shapes": {name: list(s) for name, s in self.input_shapes.items()},
            "removed": [{"tensor": c.tensor, "axis": c.axis, "indices": list(c.indices)} for c in self.cuts],
        }  # fmt: skip
        return json.dumps(document, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan atomically."""
        write_atomically(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan.

        Raises:
            PlanMismatchError: The file is missing, not a plan, or of a newer version.
        """
        with _KIND.fields(_KIND.load(path), path) as fields:
            policy = text_in(fields.get("policy", POLICIES[0]))
            if policy not in POLICIES:
                raise ValueError(f"the policy is {policy!r}, not one of {', '.join(POLICIES)}")
            plan = cls(
                model=text_in(fields["model_sha256"]), policy=policy,
                cuts=tuple(
                    Cut(text_in(cut["tensor"]), whole_in(cut["axis"]), wholes_in(cut["indices"]))
                    for cut in list_in(fields["removed"])
                ),
                input_shapes={
                    name: wholes_in(sizes) for name, sizes in table_in(fields.get("input_shapes", {})).items()
                },
                **{name: table_in(fields.get(name, {})) for name in ("budget", "criterion", "settings")},
            )  # fmt: skip
            if plan.kept is not None and not plan.kept.kept:
                raise ValueError("it keeps no class")
            return plan


def cuts_of(analysis: Analysis, removed: IntArray) -> tuple[Cut, ...]:
    """Name the removed units by stored tensors: by their filters, if there are any."""
    structure = analysis.structure
    removal = np.zeros(len(structure.unit_class), dtype=np.bool_)
    removal[removed] = True
    cuts = []
    for tensor, axis, units in _named_axes(analysis, structure):
        hit = (units >= 0) & removal[units]
        if hit.any():
            cuts.append(Cut(tensor, axis, tuple(np.flatnonzero(hit).tolist())))
            removal[units[hit]] = False
    return tuple(cuts)


def _named_axes(analysis: Analysis, structure: Structure) -> list[tuple[str, int, IntArray]]:
    """Axes of the original's stored tensors with the unit at every position, producers first."""
    coupling = structure.coupling
    produced = set()
    for contraction in coupling.findings.contractions:
        if contraction.kernel is not None and contraction.produced is not None:
            name = analysis.nodes[contraction.node].input[contraction.kernel.input]
            produced.add((name, contraction.kernel.out_axis))
    axes = []
    for name in coupling.constants:
        if name not in analysis.vectors.copies:
            for axis, atoms in enumerate(coupling.labels[name]):
                if atoms is not None:
                    axes.append((name, axis, structure.units_on(atoms)))
    return sorted(axes, key=lambda entry: ((entry[0], entry[1]) not in produced, entry[0], entry[1]))


def units_of(analysis: Analysis, plan: PruningPlan) -> IntArray:
    """The units that a plan removes from this model, ascending.

    Raises:
        PlanMismatchError: The plan is for another model, or names units that cannot be removed.
    """
    if plan.model != analysis.sha256:
        raise PlanMismatchError(
            f"the plan was made for another model (SHA-256 {plan.model[:12]}…, {analysis.source} has "
            f"{analysis.sha256[:12]}…); make a plan for this one with --plan-out"
        )
    structure = analysis.structure
    removed = []
    for cut in plan.cuts:
        label = structure.coupling.labels.get(cut.tensor, ())
        atoms = label[cut.axis] if cut.axis < len(label) else None
        if atoms is None or any(not 0 <= i < len(atoms) for i in cut.indices):
            raise PlanMismatchError(f"the plan cuts axis {cut.axis} of tensor {cut.tensor!r}, which cannot be pruned")
        units = structure.units_on(atoms)[list(cut.indices)]
        if (units < 0).any():
            raise PlanMismatchError(f"the plan removes indices of tensor {cut.tensor!r} that may not be removed")
        removed.append(units)
    units = np.unique(np.concatenate(removed)) if removed else np.empty(0, dtype=np.int64)
    _refuse_empty_axes(analysis, units)
    return units


def _refuse_empty_axes(analysis: Analysis, units: IntArray) -> None:
    structure = analysis.structure
    left = analysis.cost.kept_counts(units)[structure.limited_axes]
    empty = structure.limited_axes[left < 1]
    if len(empty) and Blocks(analysis.model, structure).without(emptied(structure, units)) is None:
        name = next(
            name
            for name, label in structure.coupling.labels.items()
            for atoms in label
            if atoms is not None and structure.axis_id(atoms) == empty[0]
        )
        raise PlanMismatchError(f"the plan leaves nothing of tensor {name!r}; make it again")
