"""The filters of every layer: how many there are, how many can be removed, and why the others cannot."""

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
    """Number of filters of a layer, and how many of them can be removed.

    Attributes:
        node: Index of the layer's node.
        name: The node's name (or type and output).
        filters: Number of filters.
        prunable: Number of filters that can be removed.
        reasons: Reasons for the others, with the number of filters for each.
        given: Number of the others that the model's purpose fixes: they feed an output or a softmax, or there is only
            one.
    """

    node: int
    name: str
    filters: int
    prunable: int
    reasons: Mapping[Reason, int]
    given: int = 0


def census(analysis: Analysis) -> list[FilterCensus]:
    """Count the filters of every layer that produces channels, how many can be removed, and why the others cannot."""
    structure, entries = analysis.structure, []
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
            entries.append(
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
        entries.append(FilterCensus(contraction.node, _name(node), len(atoms), *_why(structure, atoms)))
    return entries


def _is_depthwise(analysis: Analysis, node: int, weight_input: int) -> bool:
    name = analysis.nodes[node].input[weight_input]
    shape = analysis.structure.coupling.shapes[name].shape or ()
    return len(shape) > 1 and shape[1] == 1


def _why(structure: Structure, atoms: IntArray) -> tuple[int, dict[Reason, int], int]:
    """Count the filters that can be removed, the reasons for the others, and those fixed by the model's purpose."""
    classes = structure.coupling.classes
    units = structure.units_on(atoms)
    reasons: Counter[Reason] = Counter()
    given = 0
    for index in classes.of[atoms[units < 0]].tolist():
        listed = classes.reasons.get(index)
        reasons[listed[0] if listed else _WHOLE] += 1
        given += any(reason.given for reason in listed or ())
    return int((units >= 0).sum()), dict(reasons.most_common()), given


def _name(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type} → {node.output[0]}"


def node_name(analysis: Analysis, index: int) -> str:
    """A readable name of a node."""
    return _name(analysis.nodes[index])


def group_name(analysis: Analysis, index: int) -> str:
    """A readable name of a dependency group: its first producer, and the number of others."""
    group = analysis.structure.groups[index]
    nodes = group.producers or group.consumers
    if not nodes:
        return f"group {index}"
    name = node_name(analysis, nodes[0])
    prefix = "" if group.producers else "into "
    return f"{prefix}{name}" + (f" (+{len(nodes) - 1})" if len(nodes) > 1 else "")


def prunable_share(filters: Sequence[FilterCensus]) -> float:
    """Fraction of all filters that can be removed."""
    total = sum(entry.filters for entry in filters)
    return sum(entry.prunable for entry in filters) / total if total else 0.0


def inner_share(filters: Sequence[FilterCensus]) -> float | None:
    """The same among the filters that the model's purpose does not fix; None if it fixes all."""
    total = sum(entry.filters - entry.given for entry in filters)
    return sum(entry.prunable for entry in filters) / total if total else None
