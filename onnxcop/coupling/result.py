"""The result of tracing: which indices are removed together, and what depends on them."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcop.coupling.atoms import Classes, Reason
from onnxcop.coupling.ops import Label
from onnxcop.coupling.ops.facts import Findings
from onnxcop.graph.shapes import ShapeMap


@dataclass(frozen=True, slots=True)
class Coupling:
    """The solved coupling of a model's indices.

    Attributes:
        labels: Label of every tensor that carries atoms, by tensor name.
        constants: Names of the labelled tensors that hold weights (initializers, Constant outputs).
        derived: Names of tensors computed from constants alone.
        classes: The classes of atoms.
        findings: Contractions, costs, edits and choice points.
        declined: Nodes that could not be followed, as (node index, reason).
    """

    labels: dict[str, Label]
    constants: frozenset[str]
    derived: frozenset[str]
    classes: Classes
    findings: Findings
    declined: tuple[tuple[int, Reason], ...]
    shapes: ShapeMap
