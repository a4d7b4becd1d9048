"""A network under recovery: the original's shapes, with weights that change and units that are gone.

Recovery never touches the graph. Removed units keep their place, so that one structure serves all rounds; wherever
the network runs, masks stand for them (see :mod:`onnxcop.reconstruction.masks`), so that it computes what the
written file will. The rewriter cuts the result to size in the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop._base.types import Array, FloatArray, IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.layers import Layer, layers_of, weight_array
from onnxcop.graph.passes.add_biases import following_bias
from onnxcop.graph.subgraphs import Scopes
from onnxcop.graph.traits import Trait, traits
from onnxcop.reconstruction.masks import UnitMasks
from onnxcop.runtime.segments import GraphPartition


@dataclass
class MaskedNetwork:
    """A copy of an analysed model whose weights may change, and whose units may go.

    Attributes:
        analysis: The original.
        model: The copy, without masks: what the rewriter cuts.
        alive: bool [units], which units are still there.
        partition: Runs the network piece by piece, with masks for the units that are gone.
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
        model = onnx.ModelProto()
        model.CopyFrom(analysis.model)
        return cls(analysis, model, np.ones(len(analysis.structure.unit_class), dtype=np.bool_))

    @classmethod
    def sharing(cls, analysis: Analysis) -> MaskedNetwork:
        """The analysed model itself, which nobody may change: for what is only run and read."""
        return cls(analysis, analysis.model, np.ones(len(analysis.structure.unit_class), dtype=np.bool_))

    def __post_init__(self) -> None:
        coupling = self.analysis.structure.coupling
        self.scopes = scopes = Scopes.of(self.model)
        self.partition = GraphPartition(
            self.model, coupling.shapes, coupling.derived, lambda numbers: self.masks.of(numbers, self.alive)
        )
        self.masks = UnitMasks(self.analysis.structure, scopes, self.partition.stored)
        self.layers = layers_of(self.model, self.analysis.structure)
        self.nodes = scopes.nodes
        self._uses = Counter(name for node in self.nodes for name in node.input)
        self._uses.update(value.name for scope in scopes.all[1:] for value in scope.graph.output)

    def copy(self) -> MaskedNetwork:
        """An independent copy."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return MaskedNetwork(self.analysis, model, self.alive.copy())

    def masked(self, base: onnx.ModelProto | None = None) -> onnx.ModelProto:
        """The network as it stands as a model in the original's shapes, with masks for the units that are gone.

        Args:
            base: A copy of :attr:`model` with more nodes after its own.
        """
        return self.partition.whole(base)

    @contextmanager
    def without(self, units: IntArray) -> Iterator[None]:
        """Leave units out for a while."""
        before = self.alive.copy()
        self.alive[units] = False
        try:
            yield
        finally:
            self.alive[:] = before

    def read(self, name: str) -> Array:
        """A stored tensor."""
        return numpy_helper.to_array(self.partition.stored[name])

    def write(self, name: str, values: Array) -> None:
        """Replace a stored tensor, keeping its type."""
        tensor = self.partition.stored[name]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        new = numpy_helper.from_array(np.ascontiguousarray(values.astype(dtype)), name)
        if tensor.doc_string:
            new.doc_string = tensor.doc_string
        tensor.CopyFrom(new)

    def uses(self, name: str) -> int:
        """How often a tensor is read."""
        return self._uses[name]

    def weight_name(self, node: int, weight_input: int) -> str | None:
        """Name of a node's stored weights, None where they are shared or computed."""
        name: str = self.nodes[node].input[weight_input]
        if name in self.partition.stored and self._uses[name] == 1:
            return name
        return None

    def bias_name(self, node: int, kind: str, bias_input: int | None) -> str | None:
        """Name of a node's stored bias (of the Add after a matrix product), None where there is none."""
        proto = self.nodes[node]
        if any(a.name in ("alpha", "beta") and a.f != 1.0 for a in proto.attribute):
            return None
        if kind == "matmul" and not traits(proto) & Trait.BIASED:
            output = proto.output[0]
            if self._uses[output] != 1:
                return None
            follower = next((n for n in self.model.graph.node[node + 1 :] if output in n.input), None)
            name = None if follower is None else following_bias(follower, output, self.partition.stored)
        else:
            usable = bias_input is not None and 0 < bias_input < len(proto.input)
            name = proto.input[bias_input] if usable and bias_input is not None else None
        return name if name in self.partition.stored and self._uses[name] == 1 else None

    def is_open(self, layer: Layer) -> bool:
        """Whether a layer's weights can be changed: stored, its own, ungrouped, floating point.

        Layers inside bodies of control flow stay as they are: what flows into them cannot be watched.
        """
        kernel = layer.kernel
        if layer.node >= self.partition.count:
            return False
        if layer.groups != 1 or kernel.kind not in ("conv", "deconv", "matmul") or kernel.zero is not None:
            return False
        name = self.weight_name(layer.node, kernel.input)
        return name is not None and self.partition.stored[name].data_type in (1, 10, 11)

    def weights(self, layer: Layer) -> FloatArray:
        """Outgoing weights in normal form, float64 [channels, outputs, taps]."""
        name = self.nodes[layer.node].input[layer.kernel.input]
        return weight_array(self.read(name), layer)

    def set_weights(self, layer: Layer, weights: FloatArray, bias_change: FloatArray | None = None) -> None:
        """Write weights in normal form back, and add to the bias where there is one."""
        name = self.nodes[layer.node].input[layer.kernel.input]
        self.write(name, from_normal(weights, layer, self.read(name).shape))
        if bias_change is None:
            return
        bias = self.bias_name(layer.node, layer.kernel.kind, layer.kernel.bias)
        if bias is not None:
            old = self.read(bias)
            if old.size == bias_change.size:  # not one that is stretched over the outputs
                self.write(bias, old.astype(np.float64) + bias_change.reshape(old.shape))

    def removed(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Units that are gone, ascending."""
        return np.flatnonzero(~self.alive)


def from_normal(weights: FloatArray, layer: Layer, shape: tuple[int, ...]) -> FloatArray:
    """Inverse of :func:`onnxcop.analysis.layers.weight_array` for ungrouped layers."""
    kernel = layer.kernel
    moved = [shape[kernel.in_axis], shape[kernel.out_axis]]
    rest = [size for axis, size in enumerate(shape) if axis not in (kernel.in_axis, kernel.out_axis)]
    if layer.outer * layer.inner > 1:
        taps = int(np.prod(rest, dtype=int))
        blocks = weights.reshape(layer.channels, moved[1], layer.outer, layer.inner, taps)
        weights = blocks.transpose(2, 0, 3, 1, 4)
    return np.moveaxis(weights.reshape(*moved, *rest), (0, 1), (kernel.in_axis, kernel.out_axis))
