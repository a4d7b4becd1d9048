"""Analysis of a model: structure, cost and input shapes, before anything is chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx

from onnxcop._base.types import Feed
from onnxcop.analysis import cost
from onnxcop.analysis.cost import CostModel
from onnxcop.analysis.kept_classes import KeptClasses
from onnxcop.coupling import groups, tracing
from onnxcop.coupling.groups import Structure
from onnxcop.coupling.ops import RuleTable, known_rules
from onnxcop.errors import EngineError
from onnxcop.graph import io as models
from onnxcop.graph.edit import copied
from onnxcop.graph.passes.add_biases import AddedBiases
from onnxcop.graph.passes.fold_weights import fold_weights
from onnxcop.graph.passes.inline_branches import inline_settled
from onnxcop.graph.passes.lift_constants import lift_constants
from onnxcop.graph.passes.split_activations import SplitActivations
from onnxcop.graph.passes.unlist_initializers import unlist_initializers
from onnxcop.graph.passes.unshare_vectors import UnsharedVectors
from onnxcop.graph.shapes import Shape
from onnxcop.graph.subgraphs import FIRST_UNLISTED, Scopes, make_names_unique
from onnxcop.images.declared import Declared, read_declared
from onnxcop.runtime.input_shapes import settle_shapes, shapes_of
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.providers import check_operators
from onnxcop.runtime.session import EngineOptions, Session, resolve_provider

log = logging.getLogger("onnxcop")


@dataclass(frozen=True)
class Analysis:
    """A loaded and traced model.

    Attributes:
        original: The model as loaded.
        model: The working copy of all stages, with shared vectors copied.
        sha256: Identity of the original.
        input_shapes: The concrete shapes of the analysis.
        structure: Units, groups and axes.
        cost: The cost model.
        source: Source of the model, for messages.
        vectors: The pass that gave each use of a shared vector a copy.
        biases: The pass that gave layers biases.
        activations: The pass that split fused layers.
        images: Preprocessing that the model or its folder declares.
        unlisted: Number of stored tensors that are inputs of the original, but not of `model`.
        kept: The classes that are kept, if the model was reduced to some of them.
        sample: Inputs of one run, of `input_shapes`, from the user's data; None if there are none of these shapes.
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
    activations: SplitActivations
    images: Declared | None = None
    unlisted: int = 0
    kept: KeptClasses | None = None
    sample: Feed | None = None

    def timing_feed(self) -> Feed:
        """Inputs to time a run with: the user's, because time can depend on values, or random ones.

        Raises:
            ModelError: There are none from the user, and an input holds strings.
        """
        return random_feeds(self.original, self.input_shapes, seed=0) if self.sample is None else self.sample

    def undo(self, model: onnx.ModelProto) -> None:
        """Undo the preparation of `model` in a pruned model, in place."""
        self.biases.undo(model)
        self.vectors.undo(model)
        self.activations.undo(model)

    @cached_property
    def nodes(self) -> tuple[onnx.NodeProto, ...]:
        """All nodes of `model` by number, those of bodies included (see :mod:`onnxcop.graph.subgraphs`)."""
        return Scopes.of(self.model).nodes


def analyze(
    model: onnx.ModelProto | str | Path,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    rules: RuleTable | None = None,
    policy: str = "finest",
    options: EngineOptions = EngineOptions(),
    biases: bool = False,
    keep_initializer_inputs: bool = True,
    open_axis: int | None = None,
) -> Analysis:
    """Load a model and determine what can be pruned.

    Args:
        model: A path or a model in memory (never changed).
        input_shapes: Concrete shapes for dynamic inputs, by name; chosen by trial if not given.
        rules: The operator rules; None for :func:`onnxcop.coupling.ops.known_rules`.
        policy: "finest" coupling or "coarsest" (whole heads and groups).
        options: How to run the model if shapes cannot be inferred.
        biases: Prepare the weights for recovery: stored as initializers, and each layer with a bias.
        keep_initializer_inputs: Leave stored tensors that are inputs as well on the list of inputs.
        open_axis: An axis of the outputs whose indices may be removed too (see :mod:`onnxcop.rewrite.classes`).

    Raises:
        ModelError: The model cannot be read.
        EngineError: The requested provider or library of operators does not work here.
    """
    if options.provider != "auto":
        resolve_provider(options.provider)  # a provider that was named must work
    check_operators(options.custom_ops)
    source = "the model" if isinstance(model, onnx.ModelProto) else str(model)
    original = models.load(model)
    working = copied(original)
    unlisted = 0 if keep_initializer_inputs else unlist_initializers(working)
    make_names_unique(working)
    _allow_unlisted(working)
    _fold(working, options)
    if biases:
        lift_constants(working)
    activations = SplitActivations.forward(working) if biases else SplitActivations()
    vectors = UnsharedVectors.forward(working)
    added = AddedBiases.forward(working) if biases else AddedBiases()
    images = read_declared(original, None if isinstance(model, onnx.ModelProto) else Path(model))
    settled = settle_shapes(working, input_shapes, options, None if images is None else images.preprocess.size)
    shapes = shapes_of(working, settled, options)
    if inline_settled(working, shapes):
        shapes = shapes_of(working, settled, options)
    coupling = tracing.trace(working, shapes, rules or known_rules(), policy, open_axis=open_axis)
    structure = groups.structure_of(coupling)
    return Analysis(
        original=original, model=working, sha256=models.sha256(original), input_shapes=settled, structure=structure,
        cost=cost.cost_model(working, structure), source=source, vectors=vectors, biases=added,
        activations=activations, images=images, unlisted=unlisted,
    )  # fmt: skip


def _allow_unlisted(model: onnx.ModelProto) -> None:
    """Upgrade a file of an old IR version whose initializers are not all inputs, as that version requires."""
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
