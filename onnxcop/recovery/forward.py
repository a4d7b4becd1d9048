"""Tensors of a model whose weights change from its first layer to its last, each computed once.

What the nodes behind a layer need of the nodes before it is kept, batch by batch, and the next piece runs from there.
Quantized tensors are kept as whole numbers: their DequantizeLinear runs again in every piece that reads them, so that
ONNX Runtime finds the same operators to join as in the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
import onnx
from onnx import helper

from onnxcop._base.types import Array, Feed
from onnxcop.graph.subgraphs import captured, excerpt
from onnxcop.runtime.session import EngineOptions, KeptSession
from onnxcop.runtime.states import LiveTensors


class ForwardRun:
    """A run of a model that stops before one node after another.

    Args:
        model: The model; weights may change in place behind the node before which the run stands.
        feeds: Batches of inputs.
        options: How to run it.
    """

    def __init__(self, model: onnx.ModelProto, feeds: Sequence[Feed], options: EngineOptions) -> None:
        graph = model.graph
        self._model, self._options = model, options
        self._states, self._cuts = LiveTensors(feeds), [0] * len(feeds)
        self._inputs = {value.name for value in graph.input}
        self._reads = [{name for name in node.input if name} | captured(node) for node in graph.node]
        self._makers = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
        stored = {tensor.name for tensor in graph.initializer}
        self._last_use = {value.name: len(graph.node) for value in graph.output}
        self._varying, self._sources = self._inputs - stored, dict[str, str]()
        for place, (node, names) in enumerate(zip(graph.node, self._reads, strict=True)):
            self._last_use |= {name: max(place, self._last_use.get(name, 0)) for name in names}
            if names & self._varying:
                self._varying.update(node.output)
            if node.op_type == "DequantizeLinear" and stored.issuperset(node.input[1:]):
                self._sources[node.output[0]] = node.input[0]

    def before(self, node: int, tensor: str, count: int) -> Iterator[Array]:
        """A tensor that is made before a node, for the first batches; the run then stands before this node.

        Args:
            node: Position of the node, not before those of earlier calls.
            tensor: Name of the tensor.
            count: How many batches; others stay where they are, and follow in one step when they are needed.
        """
        for _, places in groupby(range(count), lambda place: self._cuts[place]):
            yield from self._piece(node, tensor, list(places))

    def _crossing(self, node: int) -> set[str]:
        """Tensors to keep before a node."""
        names = {name for name in self._varying if self._makers.get(name, -1) < node <= self._last_use.get(name, -1)}
        return {self._sources.get(name, name) for name in names}

    def _piece(self, stop: int, tensor: str, places: Sequence[int]) -> Iterator[Array]:
        crossing, first = self._crossing(stop), self._states[places[0]]
        wanted = [name for name in sorted({tensor, *crossing}) if name not in first]
        piece = excerpt(
            self._model,
            [onnx.ValueInfoProto(name=name) for name in wanted],
            [_value(name, array) for name, array in first.items() if name not in self._inputs],
        )
        with contextlib.closing(KeptSession(piece, self._options, passing=True)) as kept:
            for place in places:
                found: Mapping[str, Array] = self._states[place]
                if wanted:
                    found = {**found, **kept.session.run({spec.name: found[spec.name] for spec in kept.session.inputs})}
                yield found[tensor]
                if all(isinstance(found[name], np.ndarray) for name in crossing):  # no sequences
                    self._states.replace(place, {name: found[name] for name in crossing})
                    self._cuts[place] = stop


def _value(name: str, array: Array) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
