"""The arguments of a gradient rule: values, and the node itself for rules that need more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from onnxcop._base.types import Array
from onnxcop.gradient.builder import Builder, Tensor

# A rule for one input: from the gradient of the output, the output and the inputs, to the gradient of that input.
Vjp = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Node:
    """The node, for rules that need more than values.

    Attributes:
        builder: Where nodes are emitted.
        proto: The node in the forward graph.
        grads: Gradients of all its outputs, None where there is none.
        outputs: All its outputs, None where they have no name.
        values: Values of tensors that depend on constants alone, by name.
    """

    builder: Builder
    proto: onnx.NodeProto
    grads: Sequence[Tensor | None]
    outputs: Sequence[Tensor | None]
    values: Callable[[str], Array | None]

    def extra(self, index: int, elem_type: int) -> Tensor:
        """An optional output, which the node now computes."""
        while len(self.proto.output) <= index:
            self.proto.output.append("")
        if not self.proto.output[index]:
            self.proto.output[index] = self.builder.name(f"{self.proto.op_type}_output{index}")
        return self.builder.known(self.proto.output[index], elem_type)

    def value(self, tensor: Tensor | None) -> list[int] | None:
        """The elements of a vector of integers, None if they are known only at run time."""
        array = None if tensor is None else self.values(tensor.name)
        return None if array is None else [int(value) for value in array.reshape(-1)]


def onnx_value(attribute: onnx.AttributeProto) -> Any:
    """The value of an attribute, text as str."""
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def attributes_of(node: onnx.NodeProto) -> Mapping[str, Any]:
    """Values of a node's attributes by name."""
    return {attribute.name: onnx_value(attribute) for attribute in node.attribute}
