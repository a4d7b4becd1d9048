"""All nodes of a model under one numbering: those of the top-level graph, and those of bodies.

A node of If, Loop or Scan holds graphs of its own, its *bodies*, which read tensors of the graphs around them by name.
The number of a top-level node is its position. Nodes of bodies follow, body by body, so code that only knows the top
level is not affected. Names must be unique over all bodies (:func:`make_names_unique`), so a name identifies a tensor.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

FIRST_UNLISTED = 4  # since this IR version, initializers need not be listed among the inputs


def initializers_are_inputs(model: onnx.ModelProto) -> bool:
    """Whether every initializer must be listed among the inputs, as in files before IR version 4."""
    return bool(model.ir_version < FIRST_UNLISTED)


@dataclass(frozen=True, slots=True)
class Scope:
    """One graph of a model.

    Attributes:
        graph: The graph.
        first: Number of its first node; the others follow.
        owner: Number of the node that holds it, None for the top-level graph.
        attribute: Name of the attribute it is held in.
    """

    graph: onnx.GraphProto
    first: int
    owner: int | None = None
    attribute: str = ""


@dataclass(frozen=True, slots=True)
class Scopes:
    """The graphs of a model, each after the one that holds it.

    Attributes:
        all: The graphs; the first is the top-level one.
        nodes: All nodes by number.
    """

    all: tuple[Scope, ...]
    nodes: tuple[onnx.NodeProto, ...]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Scopes:
        """Number the nodes of a model."""
        scopes = [Scope(model.graph, 0)]
        nodes = list(model.graph.node)
        for scope in scopes:  # grows during the loop
            for number in range(scope.first, scope.first + len(scope.graph.node)):
                for attribute in nodes[number].attribute:
                    if attribute.type == onnx.AttributeProto.GRAPH:
                        scopes.append(Scope(attribute.g, len(nodes), number, attribute.name))
                        nodes += attribute.g.node
        return cls(tuple(scopes), tuple(nodes))

    @property
    def outer(self) -> int:
        """Number of nodes of the top-level graph."""
        return len(self.all[0].graph.node)

    def bodies(self) -> Mapping[tuple[int, str], Scope]:
        """The bodies by the number of their node and the name of the attribute."""
        return {(scope.owner, scope.attribute): scope for scope in self.all if scope.owner is not None}

    def order(self) -> list[int]:
        """All numbers in execution order: nodes of a body come just before the node that holds them."""
        inner: dict[int | None, list[int]] = {}
        numbers: list[int] = []
        for scope in reversed(self.all):
            numbers = []
            for number in range(scope.first, scope.first + len(scope.graph.node)):
                numbers += [*inner.get(number, ()), number]
            inner.setdefault(scope.owner, [])[:0] = numbers
        return numbers

    def place(self, number: int) -> int:
        """Position of a node in the top-level graph, or of the top-level node that holds it."""
        holder = max((scope for scope in self.all if scope.first <= number), key=lambda scope: scope.first).owner
        return number if holder is None else self.place(holder)

    def reused(self) -> set[str]:
        """Names that several graphs give to tensors of their own."""
        seen: set[str] = set()
        twice: set[str] = set()
        for scope in self.all:
            own = made(scope.graph)
            twice |= own & seen
            seen |= own
        return twice

    def names(self) -> set[str]:
        """All names of tensors."""
        names = {name for node in self.nodes for name in (*node.input, *node.output)}
        for scope in self.all:
            names |= made(scope.graph) | {value.name for value in scope.graph.output}
        return names


def given(graph: onnx.GraphProto) -> set[str]:
    """Names of the tensors that a graph defines before any of its nodes runs."""
    names = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    return names | {tensor.values.name for tensor in graph.sparse_initializer}


def made(graph: onnx.GraphProto) -> set[str]:
    """Names of the tensors that a graph itself defines."""
    return given(graph) | {name for node in graph.node for name in node.output if name}


def graphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies that a node holds directly."""
    for attribute in node.attribute:
        if attribute.type == attribute.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def captured(node: onnx.NodeProto) -> set[str]:
    """Names of outer tensors that the bodies of a node read."""
    names: set[str] = set()
    for graph in graphs_of(node):
        own = {t.name for t in graph.initializer} | {v.name for v in graph.input}
        for inner in graph.node:
            names |= ({name for name in inner.input if name} | captured(inner)) - own
            own |= set(inner.output)
        names |= {v.name for v in graph.output} - own
    return names


def nodes_for(
    nodes: Sequence[onnx.NodeProto], names: Iterable[str], given: Container[str] = ()
) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that some tensors depend on.

    Args:
        nodes: Nodes in an order in which they can run.
        names: Names of the tensors.
        given: Tensors that need no nodes, because they will be inputs.

    Returns:
        The nodes in their order, and the names of the tensors and of all that the nodes read.
    """
    needed, chosen = set(names), list[onnx.NodeProto]()
    for node in reversed(nodes):
        if any(name and name in needed and name not in given for name in node.output):
            chosen.append(node)
            needed |= {*node.input, *captured(node)}
    return chosen[::-1], needed


def excerpt(
    model: onnx.ModelProto, outputs: Sequence[onnx.ValueInfoProto], inputs: Sequence[onnx.ValueInfoProto] = ()
) -> onnx.ModelProto:
    """The part of a model that computes some tensors; it takes only the inputs that it needs.

    Args:
        model: The model; not changed.
        outputs: The tensors.
        inputs: Tensors of the model that become inputs, so that nothing before them is needed.
    """
    graph = model.graph
    nodes, needed = nodes_for(graph.node, [value.name for value in outputs], {value.name for value in inputs})
    part = onnx.ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = graph.name
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in needed)
    part.graph.sparse_initializer.extend(s for s in graph.sparse_initializer if s.values.name in needed)
    part.graph.input.extend(value for value in (*graph.input, *inputs) if value.name in needed)
    part.graph.output.extend(outputs)
    return part


def make_names_unique(model: onnx.ModelProto) -> dict[str, str]:
    """Rename tensors of bodies if their names also occur elsewhere, in place.

    Returns:
        Old names, keyed by new names.
    """
    scopes = Scopes.of(model)
    reused = scopes.reused()
    if not reused:
        return {}
    taken = scopes.names()
    renamed: dict[str, str] = {}
    met = made(model.graph)
    for scope in scopes.all[1:]:
        own = made(scope.graph)
        mapping: dict[str, str] = {}
        for name in sorted(own & met):
            number = 2
            while f"{name}_{number}" in taken:
                number += 1
            mapping[name] = f"{name}_{number}"
            taken.add(mapping[name])
            renamed[mapping[name]] = name
        met |= own
        if mapping:
            rename(scope.graph, mapping)
    return renamed


def rename(graph: onnx.GraphProto, mapping: Mapping[str, str]) -> None:
    """Rename tensors in a graph, and in its bodies where they read them."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = mapping.get(value.name, value.name)
    for tensor in graph.initializer:
        tensor.name = mapping.get(tensor.name, tensor.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = mapping.get(sparse.values.name, sparse.values.name)
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name in mapping:
                    names[place] = mapping[name]
        for inner in graphs_of(node):
            hidden = made(inner)
            rename(inner, {old: new for old, new in mapping.items() if old not in hidden})
