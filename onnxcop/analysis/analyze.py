"""From a model to its structure: everything that is known before anything is chosen."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx

from onnxcop._base.types import Feed, IntArray
from onnxcop.analysis import cost
from onnxcop.analysis.cost import CostModel
from onnxcop.coupling import groups, tracing
from onnxcop.coupling.atoms import Reason
from onnxcop.coupling.groups import Structure
from onnxcop.coupling.ops import RuleTable, known_rules
from onnxcop.errors import EngineError
from onnxcop.graph import io as models
from onnxcop.graph.passes.add_biases import AddedBiases
from onnxcop.graph.passes.fold_weights import fold_weights
from onnxcop.graph.passes.inline_branches import inline_settled
from onnxcop.graph.passes.lift_constants import lift_constants
from onnxcop.graph.passes.unlist_initializers import unlist_initializers
from onnxcop.graph.passes.unshare_vectors import UnsharedVectors
from onnxcop.graph.shapes import Shape
from onnxcop.graph.subgraphs import FIRST_UNLISTED, Scopes, make_names_unique
from onnxcop.images.declared import Declared, read_declared
from onnxcop.runtime.inputs import settle_shapes, shapes_of
from onnxcop.runtime.providers import check_operators
from onnxcop.runtime.session import EngineOptions, Session, resolve_provider

log = logging.getLogger("onnxcop")


@dataclass(frozen=True)
class Analysis:
    """A loaded and traced model.

    Attributes:
        original: The model as loaded.
        model: The same with shared vectors taken apart; what all stages work on.
        sha256: Identity of the original.
        input_shapes: The concrete shapes that the analysis was made with.
        structure: Units, groups and axes.
        cost: The cost model.
        source: Where the model came from, for messages.
        vectors: The pass that gave each use of a shared vector a copy.
        biases: The pass that gave layers biases.
        images: What the model or its folder says about its images.
        unlisted: How many stored tensors were inputs of the original as well, and are none in `model`.
    """

    original: onnx.ModelProto
    model: onnx.ModelProto
    sha256: str
    input_shapes: Mapping[str, Shape]
    structure: Structure
    cost: CostModel
    source: str
    vectors: UnsharedVectors
    biases: AddedBiases
    images: Declared | None = None
    unlisted: int = 0

    def undo(self, model: onnx.ModelProto) -> None:
        """Undo in a pruned model, in place, what was done to `model` for the time of pruning."""
        self.biases.undo(model)
        self.vectors.undo(model)

    @cached_property
    def nodes(self) -> tuple[onnx.NodeProto, ...]:
        """All nodes of `model` by number, those of bodies included (see :mod:`onnxcop.graph.subgraphs`)."""
        return Scopes.of(self.model).nodes


_SINGLE = Reason("makes a single channel", given=True)
_COMPUTED = Reason("has weights that the graph computes")
_WHOLE = Reason("all of the axis goes together")


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


def analyze(
    model: onnx.ModelProto | str | Path,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    rules: RuleTable | None = None,
    policy: str = "finest",
    options: EngineOptions = EngineOptions(),
    biases: bool = False,
    keep_initializer_inputs: bool = True,
) -> Analysis:
    """Load a model and find what can be pruned in it.

    Args:
        model: A path or a model in memory (never changed).
        input_shapes: Concrete shapes for dynamic inputs, by name; chosen by trial where not given.
        rules: What every operator does to labels; None for :func:`onnxcop.coupling.ops.known_rules`.
        policy: "finest" coupling or "coarsest" (whole heads and groups).
        options: How to run the model where shapes cannot be inferred.
        biases: Make the weights ready for recovery: stored as initializers, and each layer with a bias.
        keep_initializer_inputs: Leave stored tensors that are inputs as well on the list of inputs.

    Raises:
        ModelError: The model cannot be read.
        EngineError: The provider or a library of operators that was asked for does not work here.
    """
    if options.provider != "auto":
        resolve_provider(options.provider)  # asked for by name: it works, or nothing is done
    check_operators(options.custom_ops)
    source = "the model" if isinstance(model, onnx.ModelProto) else str(model)
    original = models.load(model)
    working = onnx.ModelProto()
    working.CopyFrom(original)
    unlisted = 0 if keep_initializer_inputs else unlist_initializers(working)
    make_names_unique(working)
    _allow_unlisted(working)
    _fold(working, options)
    if biases:
        lift_constants(working)
    vectors = UnsharedVectors.forward(working)
    added = AddedBiases.forward(working) if biases else AddedBiases()
    images = read_declared(original, None if isinstance(model, onnx.ModelProto) else Path(model))
    settled = settle_shapes(working, input_shapes, options, None if images is None else images.preprocess.size)
    shapes = shapes_of(working, settled, options)
    if inline_settled(working, shapes):
        shapes = shapes_of(working, settled, options)
    structure = groups.build(working, tracing.trace(working, shapes, rules or known_rules(), policy))
    return Analysis(
        original=original, model=working, sha256=models.sha256(original), input_shapes=settled, structure=structure,
        cost=cost.build(working, structure), source=source, vectors=vectors, biases=added, images=images,
        unlisted=unlisted,
    )  # fmt: skip


def _allow_unlisted(model: onnx.ModelProto) -> None:
    """Give a file of an old IR version that breaks its rule, all initializers among the inputs, one without it."""
    listed = {value.name for value in model.graph.input}
    if model.ir_version < FIRST_UNLISTED and any(tensor.name not in listed for tensor in model.graph.initializer):
        model.ir_version = FIRST_UNLISTED


def _fold(model: onnx.ModelProto, options: EngineOptions) -> None:
    """Store weights that the graph computes from constants; see :mod:`onnxcop.graph.passes.fold_weights`."""

    def run(part: onnx.ModelProto, names: Sequence[str]) -> Feed:
        with Session(part, replace(options, provider="cpu"), optimize=False) as session:
            return session.run({}, names)

    try:
        fold_weights(model, run)
    except EngineError as error:
        log.debug("weights that are computed from constants stay so: %s", error)


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
