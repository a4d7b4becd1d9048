"""A network under recovery: the original's shapes, weights that change, and units that are removed.

Recovery never edits the graph. Removed units keep their positions, so one structure serves all rounds. When the network
runs, masks replace them (see :mod:`onnxcop.reconstruction.masks`), so that it computes what the written file will. At
the end the rewriter cuts the result to size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import Array, BoolArray, FloatArray, IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.layers import Layer, layers_of
from onnxcop.graph.edit import computed_weights, copied
from onnxcop.graph.io import inlined, values_of
from onnxcop.graph.linear import Kernel, StoredLayer, kernel_of, stored_layer
from onnxcop.graph.subgraphs import Scopes
from onnxcop.reconstruction.masks import UnitMasks
from onnxcop.runtime.segments import GraphPartition


@dataclass
class MaskedNetwork:
    """A copy of an analysed model with weights that may change and units that may be removed.

    Attributes:
        analysis: The original.
        model: The copy without masks, which the rewriter cuts.
        alive: bool [units], the units that remain.
        partition: Runs the network piece by piece, with masks for the units that are removed.
    """

    analysis: Analysis
    model: onnx.ModelProto
    alive: np.ndarray[tuple[int], np.dtype[np.bool_]]
    partition: GraphPartition = field(init=False)
    masks: UnitMasks = field(init=False)
    layers: list[Layer] = field(init=False)
    scopes: Scopes = field(init=False)
    nodes: tuple[onnx.NodeProto, ...] = field(init=False)

    @classmethod
    def of(cls, analysis: Analysis) -> MaskedNetwork:
        """Copy the analysed model."""
        return cls.sharing(analysis).copy()

    @classmethod
    def sharing(cls, analysis: Analysis) -> MaskedNetwork:
        """The analysed model itself, read-only: for running and reading."""
        return cls(analysis, analysis.model, np.ones(len(analysis.structure.unit_class), dtype=np.bool_))

    def __post_init__(self) -> None:
        coupling = self.analysis.structure.coupling
        self.scopes = scopes = Scopes.of(self.model)
        self.partition = GraphPartition(
            self.model, coupling.shapes, coupling.derived, lambda numbers: self.masks.of(numbers, self.alive)
        )
        self.masks = UnitMasks(self.analysis.structure, scopes, self.partition.stored, self.partition.held)
        self.layers = layers_of(self.model, self.analysis.structure)
        self.nodes = scopes.nodes
        self._uses = Counter(name for node in self.nodes for name in node.input)
        self._uses.update(value.name for scope in scopes.all[1:] for value in scope.graph.output)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the models and the sample of the analysis, which no task reads."""
        analysis = replace(self.analysis, original=onnx.ModelProto(), model=onnx.ModelProto(), sample=None)
        return MaskedNetwork, (analysis, self.model, self.alive)

    def copy(self) -> MaskedNetwork:
        """An independent copy; of a large network the weights are in one file, and only changed ones are added."""
        light = self.partition.light()
        return MaskedNetwork(self.analysis, copied(light) if light is self.model else light, self.alive.copy())

    def masked(self, base: onnx.ModelProto | None = None) -> onnx.ModelProto:
        """The current network as a model in the original's shapes, with masks for removed units.

        Args:
            base: A copy of :attr:`model` with more nodes after its own.
        """
        return self.partition.whole(base)

    @contextmanager
    def without(self, units: IntArray) -> Iterator[None]:
        """Leave units out temporarily."""
        before = self.alive.copy()
        self.alive[units] = False
        try:
            yield
        finally:
            self.alive[:] = before

    def read(self, name: str) -> Array:
        """A stored tensor."""
        return values_of(self.partition.stored[name])

    def write(self, name: str, values: Array) -> None:
        """Replace a stored tensor, keeping its type."""
        tensor = self.partition.stored[name]
        new = computed_weights(name, values, tensor.data_type)
        if tensor.doc_string:
            new.doc_string = tensor.doc_string
        tensor.CopyFrom(self.partition.held(new))

    def put(self, tensors: Iterable[onnx.TensorProto]) -> None:
        """Replace stored tensors by others of the same names."""
        for tensor in tensors:
            self.partition.stored[tensor.name].CopyFrom(self.partition.held(tensor))

    def uses(self, name: str) -> int:
        """How often a tensor is read."""
        return self._uses[name]

    def stored_layer(self, node: int, kernel: Kernel | None = None) -> StoredLayer | None:
        """Location of a layer's weights and bias; None if the node is not a layer or they may not change.

        Layers inside bodies of control flow stay as they are, because their inputs cannot be observed.

        Args:
            node: Its number.
            kernel: Storage of its weights, if known.
        """
        if node >= self.partition.count:
            return None
        if kernel is None:
            stored = [p for p, name in enumerate(self.nodes[node].input[:2]) if name in self.partition.stored]
            rank = len(self.partition.stored[self.nodes[node].input[stored[-1]]].dims) if stored else 0
            kernel = kernel_of(self.nodes[node], stored[-1], rank) if stored else None
        return None if kernel is None else stored_layer(self.nodes, node, kernel, self.partition.stored, self.uses)

    def is_open(self, layer: Layer) -> bool:
        """Whether a layer's weights can change: stored, used once, floating point."""
        return self.stored_layer(layer.node, layer.kernel) is not None

    def weights(self, layer: Layer) -> FloatArray:
        """Outgoing weights, float64 [groups, channels, outputs, taps]."""
        return layer.read(self.read(self.nodes[layer.node].input[layer.kernel.input]))

    def set_weights(self, layer: Layer, weights: FloatArray, bias_change: FloatArray | None = None) -> None:
        """Write weights [groups, channels, outputs, taps] back, and add to the bias if there is one."""
        own = self.stored_layer(layer.node, layer.kernel)
        assert own is not None
        self.write(own.weight, layer.write(weights, self.partition.stored[own.weight].dims))
        if bias_change is not None and own.bias is not None:
            old = self.read(own.bias)
            self.write(own.bias, old.astype(np.float64) + bias_change.reshape(old.shape) / layer.kernel.bias_scale)

    def removed(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Removed units, ascending."""
        return np.flatnonzero(~self.alive)


@dataclass(frozen=True, slots=True)
class NetworkChange:
    """The difference between two networks of one analysis.

    Attributes:
        tensors: Stored tensors that differ.
        alive: bool [units], the units that remain.
    """

    tensors: tuple[onnx.TensorProto, ...]
    alive: BoolArray

    @classmethod
    def between(cls, old: MaskedNetwork, new: MaskedNetwork) -> NetworkChange:
        """What has to change in the old network."""
        before, after = old.partition.stored, new.partition.stored
        changed = [name for name, tensor in after.items() if not same_tensor(tensor, before[name])]
        return cls(tuple(copied(after[name]) for name in changed), new.alive.copy())

    def of(self, old: MaskedNetwork) -> MaskedNetwork:
        """A copy of the old network with the change."""
        network = old.copy()
        network.put(self.tensors)
        network.alive[:] = self.alive
        return network


def same_tensor(one: onnx.TensorProto, other: onnx.TensorProto) -> bool:
    """Whether two stored tensors have the same values."""
    return one is other or inlined(one).SerializeToString() == inlined(other).SerializeToString()
