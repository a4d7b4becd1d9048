"""Construction of the backward graph: from the loss to the trained tensors.

Nodes are visited from the last to the first. If the output of a node has a gradient, the node emits gradients of those
of its inputs that depend on a trained tensor. The gradients that a tensor gets from several readers are added. A node
without a rule stops the gradient; its name and the reason are recorded, and the other nodes are still visited.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import onnx

from onnxcop.errors import ModelError
from onnxcop.gradient.builder import FLOATS, Builder, NoGradient, Tensor, total
from onnxcop.gradient.node import Node, attributes_of
from onnxcop.gradient.prepare import Known, inline_functions, raised, store_constants
from onnxcop.gradient.rules import DEFAULT_GRADIENTS, STEPS, GradientRule, GradientRules
from onnxcop.gradient.rules.broadcast import unbroadcast
from onnxcop.graph.edit import copied, replace_all
from onnxcop.graph.subgraphs import captured, graphs_of, nodes_for
from onnxcop.graph.traits import Trait, traits
from onnxcop.runtime.session import EngineOptions


@dataclass(frozen=True, slots=True)
class Stop:
    """A node that no gradient passes.

    Attributes:
        node: Its name, or that of its first output.
        operator: Its operator.
        reason: Why.
    """

    node: str
    operator: str
    reason: str


@dataclass(frozen=True, slots=True)
class Gradients:
    """A model that computes gradients besides its own outputs.

    Attributes:
        model: The forward graph, raised to opset 18 where it was older, and the backward graph.
        names: The output that holds the gradient of each tensor, by the tensor's name.
        missing: Requested tensors that no gradient reaches.
        stops: Nodes at which gradients ended.
    """

    model: onnx.ModelProto
    names: Mapping[str, str]
    missing: tuple[str, ...]
    stops: tuple[Stop, ...]


def trainable(model: onnx.ModelProto, rules: GradientRules = DEFAULT_GRADIENTS) -> list[str]:
    """Stored floating-point tensors of more than one element that are not statistics, sizes, bounds or scales.

    Args:
        model: The model.
        rules: The gradient rules; tensors that only operators without a rule read are not trained.
    """
    settings: set[str] = set()
    values: set[str] = set()
    for node in model.graph.node:
        rule = rules.get((node.domain.removeprefix("ai.onnx"), node.op_type))
        for place, name in enumerate(node.input):
            passes = rule is None or rule.together is not None or rule.inputs[place : place + 1] not in ((), (None,))
            (values if passes else settings).add(name)
        values |= captured(node)
    settings -= values
    stored = [(tensor.name, tensor) for tensor in model.graph.initializer]
    stored += [
        (node.output[0], a.t) for node in model.graph.node if node.op_type == "Constant"
        for a in node.attribute if a.name == "value"
    ]  # fmt: skip
    return [
        name for name, tensor in stored
        if tensor.data_type in FLOATS and name not in settings and max(tensor.dims, default=1) > 1
    ]  # fmt: skip


def differentiate(
    model: onnx.ModelProto,
    loss: str = "loss",
    tensors: Iterable[str] | None = None,
    *,
    rules: GradientRules = DEFAULT_GRADIENTS,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    options: EngineOptions = EngineOptions(),
) -> Gradients:
    """Write the gradient of a scalar with respect to stored tensors and inputs as nodes of the model.

    Args:
        model: A model, not changed. Its weights may be in Constant nodes.
        loss: A scalar that it computes.
        tensors: Names of stored tensors, or of inputs; None for all of :func:`trainable`.
        rules: The gradient rules.
        input_shapes: An example of the inputs' shapes, to determine ranks; dynamic sizes stay dynamic.
        options: How to run the model if shapes cannot be inferred.

    Raises:
        ModelError: The loss is missing or not a floating-point scalar, or a tensor is missing.
    """
    work = copied(model)
    work = raised(work)
    store_constants(work)
    wanted = list(trainable(work, rules) if tensors is None else tensors)
    known = Known.of(work, options, input_shapes)
    while (plain := inline_functions(work, known.shapes, {*rules, *(("", name) for name in STEPS)})) is not None:
        work = plain
        store_constants(work)
        known = Known.of(work, options, input_shapes)
    _require(work, known, loss, wanted)
    walk = _Walk(work, known, rules, wanted)
    walk.run(loss)
    return walk.finished(wanted)


def _require(model: onnx.ModelProto, known: Known, loss: str, wanted: Collection[str]) -> None:
    """Check that the loss is a scalar and that all tensors exist."""
    info = known.shapes[loss]
    if loss not in {name for node in model.graph.node for name in node.output}:
        raise ModelError(f"the model computes no tensor {loss!r} to take the gradient of; name one of its outputs")
    if info.elem_type not in FLOATS or (info.shape is not None and max(info.shape, default=1) > 1):
        shape = "unknown" if info.shape is None else list(info.shape)
        raise ModelError(f"the loss {loss!r} has the shape {shape}; reduce it to one floating-point number")
    there = {tensor.name for tensor in model.graph.initializer} | {value.name for value in model.graph.input}
    for name in wanted:
        if name not in there:
            raise ModelError(f"the model has no stored tensor or input {name!r} to train; check the name")


class _Walk:
    """The state of one backward graph under construction."""

    def __init__(self, model: onnx.ModelProto, known: Known, rules: GradientRules, wanted: Collection[str]) -> None:
        self.model, self.known, self.rules = model, known, rules
        self.build = Builder(model.graph)
        self.nodes = list(model.graph.node)
        self.active = self._depending(wanted)
        self.parts: dict[str, list[Tensor]] = {}
        self.stops: list[Stop] = []

    def _depending(self, wanted: Collection[str]) -> set[str]:
        """Tensors with values that depend on the trained tensors."""
        active = set(wanted)
        for node in self.nodes:
            reads = () if traits(node) & Trait.SIZES else (*node.input, *captured(node))
            if not active.isdisjoint(reads):
                active.update(name for name in node.output if name)
        return active

    def tensor(self, name: str) -> Tensor | None:
        """A tensor of the forward graph, None for an absent input or output."""
        if not name:
            return None
        return self.build.known(name, self.known.shapes[name].elem_type, self.known.shape(name))

    def gradient(self, name: str) -> Tensor | None:
        """The sum of the gradients from a tensor's readers, None if there are none."""
        parts = self.parts.get(name)
        return replace(total(parts), shape=self.known.shape(name)) if parts else None

    def run(self, loss: str) -> None:
        """Visit all nodes from the last to the first."""
        scalar = self.tensor(loss)
        assert scalar is not None
        self.parts[loss] = [scalar.builder.constant(1.0, scalar.elem_type).expand(scalar.dims())]
        for node in reversed(self.nodes):
            grads = [self.gradient(name) if name in self.active else None for name in node.output]
            if any(grad is not None for grad in grads):
                try:
                    self._visit(node, grads)
                except NoGradient as reason:
                    self.stops.append(Stop(node.name or node.output[0], node.op_type, str(reason)))

    def _visit(self, node: onnx.NodeProto, grads: Sequence[Tensor | None]) -> None:
        reached = [place for place, name in enumerate(node.input) if name in self.active]
        if any(True for _ in graphs_of(node)):
            raise NoGradient(f"gradients do not enter the bodies of {node.op_type}")
        if node.op_type in STEPS and node.domain in ("", "ai.onnx"):
            raise NoGradient("its derivative is 0")
        rule = self.rules.get((node.domain.removeprefix("ai.onnx"), node.op_type))
        if rule is None:
            raise NoGradient("there is no rule for the operator")
        if (grads[0] is None and not rule.outputs) or (any(g is not None for g in grads[1:]) and not rule.outputs):
            raise NoGradient("a gradient comes from another output than its first")
        smooth = [place for place in reached if self.known.shapes[node.input[place]].elem_type in FLOATS]
        if not smooth:
            raise NoGradient(
                "it reads whole numbers or truth values that depend on trained tensors: its derivative is 0"
            )
        for place, grad in self._through(rule, node, grads, smooth):
            self.parts.setdefault(node.input[place], []).append(grad)

    def _through(
        self, rule: GradientRule, node: onnx.NodeProto, grads: Sequence[Tensor | None], reached: Sequence[int]
    ) -> list[tuple[int, Tensor]]:
        """Gradients of the inputs that depend on trained tensors, by position."""
        inputs, outputs = [self.tensor(name) for name in node.input], [self.tensor(name) for name in node.output]
        access = Node(builder=self.build, proto=node, grads=grads, outputs=outputs, values=self.known.value)
        given = {key: value for key, value in attributes_of(node).items()}
        unknown = given.keys() - {name for function in rule.functions for name in _keywords(function)}
        if unknown:
            raise NoGradient(f"its attribute {min(unknown)} has no meaning to the rule")
        g = next(grad for grad in grads if grad is not None)

        def called(function: Callable[..., Any]) -> Any:
            names = _keywords(function)
            settings = {key: value for key, value in given.items() if key in names}
            if "node" in names:
                settings["node"] = access
            return function(g, outputs[0], *inputs, **settings)

        if rule.together is not None:
            results = called(rule.together)
            found = [(place, results[place]) for place in reached]
        else:
            found = []
            for place in reached:
                function = rule.inputs[place] if place < len(rule.inputs) else None
                if function is None:
                    reason = f"its input {place} depends on trained tensors and has no gradient"
                    self.stops.append(Stop(node.name or node.output[0], node.op_type, reason))
                    continue
                found.append((place, called(function)))
        if not rule.broadcasts:
            return found
        sizes = outputs[0].sizes if outputs[0] is not None else ()
        return [(place, unbroadcast(grad, sizes, x)) for place, grad in found if (x := inputs[place]) is not None]

    def finished(self, wanted: Sequence[str]) -> Gradients:
        """The model with the gradients among its outputs."""
        graph = self.model.graph
        names: dict[str, str] = {}
        for name in dict.fromkeys(wanted):
            grad = self.gradient(name)
            if grad is None:
                continue
            taken = {value.name for value in graph.output} | {value.name for value in graph.input}
            if grad.name in taken or any(grad.name == tensor.name for tensor in graph.initializer):
                grad = self.build.op("Identity", grad)
            names[name] = grad.name
            shape = self.known.shape(name)
            graph.output.append(onnx.helper.make_tensor_value_info(grad.name, grad.elem_type, shape))
        _drop_unread(graph)
        missing = tuple(name for name in dict.fromkeys(wanted) if name not in names)
        return Gradients(self.model, names, missing, tuple(reversed(self.stops)))


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants that no output needs, left by rules that declined."""
    kept, read = nodes_for(graph.node, [value.name for value in graph.output])
    replace_all(graph.node, kept)
    listed = {value.name for value in graph.input}
    stored = [tensor for tensor in graph.initializer if tensor.name in read or tensor.name in listed]
    replace_all(graph.initializer, stored)
    del graph.value_info[:]


@cache
def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the keyword-only parameters of a rule."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
