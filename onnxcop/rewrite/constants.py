"""The graph after whole blocks are removed: constants at their ends, and biases that absorb them.

The constant of a block is added to the bias of the layer before the sum, if nothing else reads that layer, or to the
biases of all layers behind it, through further sums. A constant of zero disappears. A gate is multiplied into the
weights behind it. If neither is possible, because an activation or a border of zeros is in between, a sum or a product
with a constant remains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop._base.types import Array
from onnxcop.errors import ModelError
from onnxcop.graph.constants import constant_tensors
from onnxcop.graph.edit import fresh_name, replace_all
from onnxcop.graph.linear import Kernel, kernel_of
from onnxcop.graph.subgraphs import FIRST_UNLISTED, captured, initializers_are_inputs
from onnxcop.graph.traits import Trait, traits
from onnxcop.rewrite.blocks import Remains
from onnxcop.runtime.session import EngineOptions, Session


def take_out(result: onnx.ModelProto, original: onnx.ModelProto, remains: Remains) -> None:
    """Remove whole blocks from a model that is already cut, in place.

    Args:
        result: The model, whose tensors have the original's names, some with axes of size 0.
        original: The model before.
        remains: The remains of the graph.

    Raises:
        ModelError: A layer that ends a block differs from the traced one.
        EngineError: A constant cannot be computed.
    """
    surgery = _BlockRemoval(result)
    source = original.graph.node
    for number in remains.ends:
        surgery.end(source[number].output[0])
    surgery.evaluate([source[number].output[0] for number in remains.constant])
    for number, places in remains.joins.items():
        surgery.narrow(source[number].output[0], {source[number].input[place] for place in places})
    hollow = {name for number in remains.dead for name in source[number].output}
    surgery.nodes = [node for node in surgery.nodes if hollow.isdisjoint(node.output)]
    surgery.settle()
    surgery.clean()


@dataclass
class _BlockRemoval:
    """A model during the removal of blocks.

    Attributes:
        model: The model.
        values: Constants that replace tensors, by name.
    """

    model: onnx.ModelProto
    values: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = list(self.model.graph.node)
        self.stored = constant_tensors(self.model)
        self.held = {v.name for v in self.model.graph.output} | {n for node in self.nodes for n in captured(node)}
        self.before = {name for node in self.nodes for name in node.input}
        self.taken = self.before | {name for node in self.nodes for name in node.output} | set(self.stored)

    def _maker(self, name: str) -> onnx.NodeProto | None:
        return next((node for node in self.nodes if name in node.output), None)

    def _made(self, name: str) -> onnx.NodeProto:
        maker = self._maker(name)
        if maker is None:
            raise ModelError(f"a block cannot be removed: no node makes {name!r} any more")
        return maker

    def _readers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if name in node.input]

    def _read(self, name: str) -> Array | None:
        if name in self.values:
            return self.values[name]
        return numpy_helper.to_array(self.stored[name]) if name in self.stored else None

    def end(self, output: str) -> None:
        """Replace a layer without inputs by its bias."""
        node = self._made(output)
        weights = self.stored[node.input[1]]
        kernel = kernel_of(node, rank=len(weights.dims))
        if kernel is None:
            raise ModelError(f"a block cannot be removed: {node.op_type} of {output!r} is no linear layer")
        groups, _, outs, _ = kernel.shape(weights.dims)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(weights.data_type)
        bias = node.input[2] if kernel.bias is not None and len(node.input) > 2 else ""
        known = self._read(bias) if bias else np.zeros(groups * outs, dtype)
        if known is None:
            raise ModelError(f"a block cannot be removed: the bias of {output!r} is computed")
        if kernel.kind in ("conv", "deconv"):
            known = known.reshape(1, -1, *[1] * (len(weights.dims) - 2))
        self.values[output] = (known * kernel.bias_scale).astype(dtype)
        self.nodes.remove(node)

    def evaluate(self, outputs: Sequence[str]) -> None:
        """Compute nodes that read constants alone, by ONNX Runtime."""
        nodes = [self._made(output) for output in outputs]
        if not nodes:
            return
        values = {name: self._read(name) for node in nodes for name in node.input if name not in outputs}
        stored = [numpy_helper.from_array(value, name) for name, value in values.items() if value is not None]
        results = [onnx.helper.make_empty_tensor_value_info(name) for name in outputs]
        model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "constants", [], results, stored))
        model.ir_version = max(self.model.ir_version, FIRST_UNLISTED)
        replace_all(model.opset_import, self.model.opset_import)
        with Session(model, EngineOptions(provider="cpu")) as session:
            self.values |= session.run({})
        for node in nodes:
            self.nodes.remove(node)

    def narrow(self, output: str, lost: set[str]) -> None:
        """Remove operands from a Concat."""
        node = self._made(output)
        left = [name for name in node.input if name not in lost]
        del node.input[:]
        node.input.extend(left)
        if len(left) == 1 and output not in self.held:
            self._bypass(node, left[0])

    def settle(self) -> None:
        """Let later layers absorb every constant that is added or multiplied."""
        for name in list(self.values):
            for node in self._readers(name):
                self._settle(node, name)

    def _settle(self, node: onnx.NodeProto, name: str) -> None:
        others = [other for other in node.input if other != name]
        value, known, output = self.values[name], traits(node), node.output[0]
        if len(node.input) == 2 and len(others) == 1 and output not in self.held:
            plain = known & Trait.ADDS or (known & Trait.SUMS and node.input[1] == name)
            if plain:
                change = value if known & Trait.ADDS else -value
                if not change.any() or self._into_bias(others[0], change) or self._onwards(output, change):
                    self._bypass(node, others[0])
                    return
            if known & Trait.MULTIPLIES and self._into_weights(output, value):
                self._bypass(node, others[0])
                return
        if name not in self.stored:
            self._store(name, value)

    def _bypass(self, node: onnx.NodeProto, source: str) -> None:
        """Connect the readers of a node to its input."""
        for reader in self.nodes:
            for place, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[place] = source
        self.nodes.remove(node)

    def _layer(self, node: onnx.NodeProto) -> Kernel | None:
        """The kernel of a layer of its own stored weights."""
        weights = self.stored.get(node.input[1]) if len(node.input) > 1 else None
        alone = weights is not None and sum(n.input[:].count(weights.name) for n in self.nodes) == 1
        kernel = None if weights is None or not alone else kernel_of(node, rank=len(weights.dims))
        return kernel if kernel is not None and kernel.changeable and 0 not in weights.dims else None  # type: ignore[union-attr]

    def _into_bias(self, made: str, change: Array) -> bool:
        """Add a constant to the bias of the layer that makes a tensor without other readers."""
        node = self._maker(made)
        if node is None or made in self.held or len(self._readers(made)) != 1 or not traits(node) & Trait.BIASED:
            return False
        kernel = self._layer(node)
        if kernel is None or not self._biased(node, kernel) or change.size != self._outputs(node, kernel):
            return False
        self._shift(node, kernel, change)
        return True

    def _outputs(self, node: onnx.NodeProto, kernel: Kernel) -> int:
        groups, _, outs, _ = kernel.shape(self.stored[node.input[1]].dims)
        return groups * outs

    def _biased(self, node: onnx.NodeProto, kernel: Kernel) -> bool:
        """Whether a layer has a bias of its own for every output, or could have one."""
        if kernel.bias != 2 or node.domain not in ("", "ai.onnx"):
            return False
        if len(node.input) < 3 or not node.input[2]:
            return True
        old = self._read(node.input[2])
        return old is not None and old.size == self._outputs(node, kernel)

    def _shift(self, node: onnx.NodeProto, kernel: Kernel, change: Array) -> None:
        """Add to a layer's bias."""
        old = self._read(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        new = change.astype(np.float64).reshape(-1) / kernel.bias_scale
        new = new if old is None else old.astype(np.float64) + new.reshape(old.shape)
        name = fresh_name(f"{node.output[0]}__shifted", self.taken)
        self._store(name, new.astype(change.dtype))
        del node.input[2:]
        node.input.append(name)

    def _onwards(self, output: str, change: Array) -> bool:
        """Add the effect of a constant on every layer behind a tensor to their biases; all of them or none."""
        readers: list[tuple[onnx.NodeProto, Kernel]] = []
        pending, seen = [output], {output}
        while pending:
            name = pending.pop()
            for node in self._readers(name):
                own, kernel = node.output[0], self._layer(node)
                if name in self.held:
                    return False
                if (
                    kernel is not None
                    and node.input[0] == name
                    and _sees_no_border(node)
                    and self._biased(node, kernel)
                ):
                    readers.append((node, kernel))
                elif traits(node) & Trait.ADDS and node.input[:].count(name) == 1 and own not in seen:
                    pending.append(own)
                    seen.add(own)
                else:
                    return False
        shifts = [(node, kernel, self._seen(node, kernel, change)) for node, kernel in readers]
        if any(shift is None for *_, shift in shifts):
            return False
        for node, kernel, shift in shifts:
            if shift is not None:
                self._shift(node, kernel, shift)
        return True

    def _seen(self, node: onnx.NodeProto, kernel: Kernel, change: Array) -> Array | None:
        """The output of a layer for a constant input."""
        weights = kernel.read(numpy_helper.to_array(self.stored[node.input[1]]))
        groups, ins, *_ = weights.shape
        if change.size != groups * ins:
            return None
        parts = change.astype(np.float64).reshape(groups, ins)
        return np.asarray(np.einsum("gi,giot->go", parts, weights).reshape(-1).astype(change.dtype))

    def _into_weights(self, output: str, factor: Array) -> bool:
        """Multiply the weights of all layers that read a tensor; all of them or none."""
        readers = self._readers(output)
        kernels = [self._layer(node) for node in readers]
        if not readers or any(
            kernel is None or node.input[0] != output or node.input[:].count(output) > 1
            for node, kernel in zip(readers, kernels, strict=True)
        ):
            return False
        changes = []
        for node, kernel in zip(readers, kernels, strict=True):
            assert kernel is not None
            old = numpy_helper.to_array(self.stored[node.input[1]])
            weights = kernel.read(old)
            if factor.size != weights.shape[0] * weights.shape[1]:
                return False
            weights = weights * factor.astype(np.float64).reshape(*weights.shape[:2], 1, 1)
            changes.append((node, kernel.write(weights, old.shape).astype(old.dtype)))
        for node, values in changes:
            node.input[1] = fresh_name(f"{node.output[0]}__gated", self.taken)
            self._store(node.input[1], values)
        return True

    def _store(self, name: str, values: Array) -> None:
        tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
        self.model.graph.initializer.append(tensor)
        self.stored[name] = tensor
        self.before.add(name)  # it is removed too if another replaces it
        if initializers_are_inputs(self.model):
            value = onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            self.model.graph.input.append(value)

    def clean(self) -> None:
        """Remove nodes and stored tensors without readers, and their descriptions."""
        graph = self.model.graph
        while True:
            used = {name for node in self.nodes for name in (*node.input, *captured(node))} | self.held
            lost = [
                node for node in self.nodes if used.isdisjoint(node.output) and self.before.intersection(node.output)
            ]
            if not lost:
                break
            self.nodes = [node for node in self.nodes if node not in lost]
        replace_all(graph.node, self.nodes)
        removed = {
            tensor.name for tensor in graph.initializer if tensor.name in self.before and tensor.name not in used
        }
        for entries in (graph.initializer, graph.input):
            replace_all(entries, [entry for entry in entries if entry.name not in removed])
        live = {name for node in self.nodes for name in (*node.input, *node.output)}
        stored = {tensor.name for tensor in graph.initializer}
        replace_all(graph.value_info, [v for v in graph.value_info if v.name in live - stored])


def _sees_no_border(node: onnx.NodeProto) -> bool:
    """Whether a layer's output is the same wherever its input is constant."""
    known = {attribute.name: attribute for attribute in node.attribute}
    if not traits(node) & Trait.SLIDES:
        return True
    if traits(node) & Trait.SPREADS:
        return False
    padded: Sequence[int] = known["pads"].ints if "pads" in known else ()
    return not any(padded) and ("auto_pad" not in known or known["auto_pad"].s in (b"NOTSET", b"VALID"))
