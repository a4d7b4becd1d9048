"""How tensors pass into and out of the bodies of If, Loop and Scan.

The description depends on a node alone. Shape inference and label tracing use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx

KINDS = ("If", "Loop", "Scan")


class UnusualForm(Exception):
    """A node of control flow that cannot be described; the message says why."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A tensor that crosses the border of a body under two names.

    Attributes:
        outer: Its name outside.
        inner: Its name inside.
        axis: The axis that only the outer one has, along which the body is repeated; None if there is none.
    """

    outer: str
    inner: str
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class Body:
    """One body of a node.

    Attributes:
        attribute: Name of the attribute.
        graph: The body.
        enters: Tensors passed in.
        carried: Inputs of the body with the outputs that replace them in the next step.
        leaves: Tensors returned.
        rigid: Outputs of the body that control it, such as the loop condition.
    """

    attribute: str
    graph: onnx.GraphProto
    enters: tuple[Passage, ...] = ()
    carried: tuple[tuple[str, str], ...] = ()
    leaves: tuple[Passage, ...] = ()
    rigid: tuple[str, ...] = field(default=())


def bodies_of(node: onnx.NodeProto, opset: int) -> tuple[Body, ...]:
    """Describe the bodies of an If, Loop or Scan.

    Raises:
        UnusualForm: It is none of these, or its body has the wrong inputs or outputs.
    """
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.domain not in ("", "ai.onnx") or node.op_type not in KINDS:
        raise UnusualForm(f"{node.op_type} holds a graph of its own")
    try:
        if node.op_type == "If":
            return tuple(_branch(node, name, attributes[name].g) for name in ("then_branch", "else_branch"))
        if node.op_type == "Loop":
            return (_loop(node, attributes["body"].g),)
        if opset < 9:
            raise UnusualForm("a Scan of opset 8, which has a batch axis")
        return (_scan(node, attributes),)
    except KeyError as error:
        raise UnusualForm(f"{node.op_type} without its body {error}") from None


def _branch(node: onnx.NodeProto, name: str, graph: onnx.GraphProto) -> Body:
    _require(node, len(node.output) == len(graph.output) and not graph.input)
    leaves = [Passage(o, v.name) for o, v in zip(node.output, graph.output, strict=True)]
    return Body(name, graph, leaves=tuple(leaves))


def _loop(node: onnx.NodeProto, graph: onnx.GraphProto) -> Body:
    states = len(node.input) - 2
    inputs, outputs = [v.name for v in graph.input], [v.name for v in graph.output]
    _require(node, states >= 0 and len(inputs) == states + 2 and len(outputs) == len(node.output) + 1)
    _require(node, len(node.output) >= states)
    return Body(
        attribute="body",
        graph=graph,
        enters=tuple(Passage(o, i) for o, i in zip(node.input[2:], inputs[2:], strict=True)),
        carried=tuple(zip(inputs[2:], outputs[1 : states + 1], strict=True)),
        leaves=tuple(
            Passage(o, i, None if place < states else 0)
            for place, (o, i) in enumerate(zip(node.output, outputs[1:], strict=True))
        ),
        rigid=(outputs[0],),
    )


def _scan(node: onnx.NodeProto, attributes: dict[str, onnx.AttributeProto]) -> Body:
    graph = attributes["body"].g
    scanned = attributes["num_scan_inputs"].i
    states = len(node.input) - scanned
    stacked = len(node.output) - states
    inputs, outputs = [v.name for v in graph.input], [v.name for v in graph.output]
    _require(node, states >= 0 and stacked >= 0)
    _require(node, len(inputs) == len(node.input) and len(outputs) == len(node.output))
    in_axes = _axes(attributes, "scan_input_axes", scanned)
    out_axes = _axes(attributes, "scan_output_axes", stacked)
    _require(node, len(in_axes) == scanned and len(out_axes) == stacked)
    return Body(
        attribute="body",
        graph=graph,
        enters=tuple(map(Passage, node.input, inputs, [None] * states + in_axes)),
        carried=tuple(zip(inputs[:states], outputs[:states], strict=True)),
        leaves=tuple(map(Passage, node.output, outputs, [None] * states + out_axes)),
    )


def _axes(attributes: dict[str, onnx.AttributeProto], name: str, count: int) -> list[int | None]:
    return list(attributes[name].ints) if name in attributes else [0] * count


def _require(node: onnx.NodeProto, holds: bool) -> None:
    if not holds:
        raise UnusualForm(f"{node.op_type} whose body has other inputs or outputs than the node")
