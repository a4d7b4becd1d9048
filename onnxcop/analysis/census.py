"""The filters of every layer: how many there are, how many may be removed, and why not the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from onnxcop._base.types import IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.coupling.atoms import Reason
from onnxcop.coupling.groups import Structure

_SINGLE = Reason("makes a single channel", given=True)


_COMPUTED = Reason("has weights that are computed in the graph")


_WHOLE = Reason("the whole axis would have to be removed")


@dataclass(frozen=True, slots=True)
class FilterCensus:
    """How many filters a layer has, and how many of them may be removed.

    Attributes:
        node: Index of the layer's node.
        name: The node's name (or type and output).
        filters: How many it has.
        prunable: How many may be removed.
        reasons: Why the others may not, by how many of them each holds.
        given: How many of the others the model's purpose fixes: they are given out or weighed by a
            softmax, or there is only one.
    """

    node: int
    name: str
    filters: int
    prunable: int
    reasons: Mapping[Reason, int]
    given: int = 0


def census(analysis: Analysis) -> list[FilterCensus]:
    """Every layer that makes channels, with how many of its filters may be removed and why not the rest."""
    structure, found = analysis.structure, []
    coupling = structure.coupling
    for contraction in coupling.findings.contractions:
        kernel = contraction.kernel
        if kernel is None:
            continue
        node = analysis.nodes[contraction.node]
        if kernel.groups > 1 and not contraction.operands and _is_depthwise(analysis, contraction.node, kernel.input):
            continue
        atoms = contraction.produced
        if atoms is None:
            shape = coupling.shapes[node.input[kernel.input]].shape or (0,)
            size = shape[kernel.out_axis]
            why = _SINGLE if size == 1 else _COMPUTED
            found.append(
                FilterCensus(
                    node=contraction.node,
                    name=_name(node),
                    filters=size,
                    prunable=0,
                    reasons={why: size},
                    given=size * why.given,
                )
            )
            continue
        found.append(FilterCensus(contraction.node, _name(node), len(atoms), *_why(structure, atoms)))
    return found


def _is_depthwise(analysis: Analysis, node: int, weight_input: int) -> bool:
    name = analysis.nodes[node].input[weight_input]
    shape = analysis.structure.coupling.shapes[name].shape or ()
    return len(shape) > 1 and shape[1] == 1


def _why(structure: Structure, atoms: IntArray) -> tuple[int, dict[Reason, int], int]:
    """How many filters may be removed, why the others may not, and for how many it is given."""
    classes = structure.coupling.classes
    units = structure.units_on(atoms)
    reasons: Counter[Reason] = Counter()
    given = 0
    for index in classes.of[atoms[units < 0]].tolist():
        found = classes.reasons.get(index)
        reasons[found[0] if found else _WHOLE] += 1
        given += any(reason.given for reason in found or ())
    return int((units >= 0).sum()), dict(reasons.most_common()), given


def _name(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type} → {node.output[0]}"


def node_name(analysis: Analysis, index: int) -> str:
    """A node's name for people."""
    return _name(analysis.nodes[index])


def group_name(analysis: Analysis, index: int) -> str:
    """A dependency group's name for people: its first producer, and how many others."""
    group = analysis.structure.groups[index]
    nodes = group.producers or group.consumers
    if not nodes:
        return f"group {index}"
    name = node_name(analysis, nodes[0])
    prefix = "" if group.producers else "into "
    return f"{prefix}{name}" + (f" (+{len(nodes) - 1})" if len(nodes) > 1 else "")


def prunable_share(filters: Sequence[FilterCensus]) -> float:
    """Fraction of all filters that may be removed."""
    total = sum(entry.filters for entry in filters)
    return sum(entry.prunable for entry in filters) / total if total else 0.0


def inner_share(filters: Sequence[FilterCensus]) -> float | None:
    """The same among the filters that the model's purpose leaves open; None where it fixes all."""
    total = sum(entry.filters - entry.given for entry in filters)
    return sum(entry.prunable for entry in filters) / total if total else None
