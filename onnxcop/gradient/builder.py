"""Nodes written as mathematics: tensors with operators, `g * y * (1 - y)`.

A :class:`Tensor` represents a tensor of the graph under construction; arithmetic on it emits a node. Equal nodes are
emitted once, so rules may repeat an expression instead of passing it around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop.graph.edit import fresh_name

Size = int | str | None  # a fixed size, a named one (equal names are equal sizes), or an unknown one
Number = int | float

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
INT64, BOOL = onnx.TensorProto.INT64, onnx.TensorProto.BOOL


class Builder:
    """Appends nodes and constants to a graph.

    Args:
        graph: The graph, changed in place.
        prefix: Prefix of the names of new tensors.
    """

    def __init__(self, graph: onnx.GraphProto, prefix: str = "grad") -> None:
        self.graph, self.prefix = graph, prefix
        self._taken = {name for node in graph.node for name in (*node.input, *node.output)}
        self._taken |= {tensor.name for tensor in graph.initializer}
        self._taken |= {value.name for value in (*graph.input, *graph.output)}
        self._made: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Tensor] = {}

    def name(self, stem: str) -> str:
        """A new, unique name."""
        return fresh_name(f"{self.prefix}/{stem}", self._taken)

    def known(self, name: str, elem_type: int, shape: tuple[Size, ...] | None = None) -> Tensor:
        """A tensor that exists in the graph."""
        return Tensor(self, name, elem_type, shape)

    def emit(
        self, kind: str, *inputs: Tensor | None, count: int = 1, elem_type: int | None = None, **attributes: Any
    ) -> tuple[Tensor, ...]:
        """Emit a node, or find the same one emitted before.

        Args:
            kind: The operator, of the standard domain.
            inputs: What it reads, None for an optional input that is left out.
            count: How many outputs it has.
            elem_type: Element type of the outputs, None for that of the first input.
            attributes: Its attributes; those that are None are left out.
        """
        given = {key: value for key, value in attributes.items() if value is not None}
        names = ["" if tensor is None else tensor.name for tensor in inputs]
        key = (kind, count, *names, *sorted((k, str(v)) for k, v in given.items()))
        if key not in self._made:
            outputs = [self.name(kind) for _ in range(count)]
            self.graph.node.append(onnx.helper.make_node(kind, names, outputs, name=outputs[0], **given))
            first = next(tensor for tensor in inputs if tensor is not None)
            self._made[key] = tuple(Tensor(self, name, elem_type or first.elem_type) for name in outputs)
        return self._made[key]

    def op(self, kind: str, *inputs: Tensor | None, elem_type: int | None = None, **attributes: Any) -> Tensor:
        """Emit a node of one output."""
        return self.emit(kind, *inputs, elem_type=elem_type, **attributes)[0]

    def constant(self, value: Any, elem_type: int) -> Tensor:
        """A stored tensor, the same one for equal values."""
        array = np.asarray(value).astype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = self.name("constant")
            self.graph.initializer.append(numpy_helper.from_array(array, name))
            self._constants[key] = Tensor(self, name, elem_type, array.shape)
        return self._constants[key]

    def ints(self, *values: int) -> Tensor:
        """A vector of integers, int64 [values]."""
        return self.constant(np.array(values, np.int64), INT64)


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor of a graph under construction.

    Attributes:
        builder: The builder that emits nodes which read it.
        name: Its name.
        elem_type: Its element type, as ONNX numbers them.
        shape: Its shape as far as known, None for tensors that rules make.
    """

    builder: Builder
    name: str
    elem_type: int
    shape: tuple[Size, ...] | None = None

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The shape of a tensor of the forward graph, whose rank is always known."""
        if self.shape is None:
            raise NoGradient(f"the rank of {self.name!r} is not known")
        return self.shape

    @property
    def rank(self) -> int:
        """Number of axes of a tensor of the forward graph."""
        return len(self.sizes)

    def op(self, kind: str, *others: Tensor | None, elem_type: int | None = None, **attributes: Any) -> Tensor:
        """Emit a node that reads this tensor first."""
        return self.builder.op(kind, self, *others, elem_type=elem_type, **attributes)

    def number(self, value: Any) -> Tensor:
        """A constant of this tensor's type."""
        return self.builder.constant(value, self.elem_type)

    def _binary(self, kind: str, other: Tensor | Number, elem_type: int | None = None) -> Tensor:
        return self.op(kind, other if isinstance(other, Tensor) else self.number(other), elem_type=elem_type)

    def __add__(self, other: Tensor | Number) -> Tensor:
        return self._binary("Add", other)

    def __sub__(self, other: Tensor | Number) -> Tensor:
        return self._binary("Sub", other)

    def __mul__(self, other: Tensor | Number) -> Tensor:
        return self._binary("Mul", other)

    def __truediv__(self, other: Tensor | Number) -> Tensor:
        return self._binary("Div", other)

    def __pow__(self, other: Tensor | Number) -> Tensor:
        return self._binary("Pow", other)

    def __radd__(self, other: Number) -> Tensor:
        return self.number(other) + self

    def __rsub__(self, other: Number) -> Tensor:
        return self.number(other) - self

    def __rmul__(self, other: Number) -> Tensor:
        return self.number(other) * self

    def __rtruediv__(self, other: Number) -> Tensor:
        return self.number(other) / self

    def __neg__(self) -> Tensor:
        return self.op("Neg")

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.op("MatMul", other)

    def __gt__(self, other: Tensor | Number) -> Tensor:
        return self._binary("Greater", other, elem_type=BOOL)

    def __ge__(self, other: Tensor | Number) -> Tensor:
        return self._binary("GreaterOrEqual", other, elem_type=BOOL)

    def __lt__(self, other: Tensor | Number) -> Tensor:
        return self._binary("Less", other, elem_type=BOOL)

    def __le__(self, other: Tensor | Number) -> Tensor:
        return self._binary("LessOrEqual", other, elem_type=BOOL)

    def __and__(self, other: Tensor) -> Tensor:
        return self.op("And", other)

    def equals(self, other: Tensor | Number) -> Tensor:
        """Where two tensors are equal, bool."""
        return self._binary("Equal", other, elem_type=BOOL)

    def cast(self, like: Tensor) -> Tensor:
        """The values in the element type of another tensor."""
        return (
            self if self.elem_type == like.elem_type else self.op("Cast", elem_type=like.elem_type, to=like.elem_type)
        )

    def dims(self) -> Tensor:
        """The shape at run time, int64 [rank]."""
        return self.op("Shape", elem_type=INT64)

    def dim(self, axis: int) -> Tensor:
        """One size at run time, int64 [1]; `axis` counts from the front."""
        return self.op("Shape", elem_type=INT64, start=axis, end=axis + 1)

    def reshape(self, shape: Tensor | Sequence[int]) -> Tensor:
        """The elements in another shape; -1 and 0 as in ONNX."""
        return self.op("Reshape", shape if isinstance(shape, Tensor) else self.builder.ints(*shape))

    def transpose(self, order: Sequence[int]) -> Tensor:
        """The axes in another order."""
        return self if list(order) == list(range(len(order))) else self.op("Transpose", perm=list(order))

    def swap(self, rank: int) -> Tensor:
        """The last two of `rank` axes exchanged."""
        return self.transpose([*range(rank - 2), rank - 1, rank - 2])

    def sum(self, axes: Tensor | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
        """Sums over axes, over all of them where none are named."""
        named = axes if axes is None or isinstance(axes, Tensor) else self.builder.ints(*axes)
        return self.op("ReduceSum", named, keepdims=int(keepdims))

    def mean(self, axes: Sequence[int], keepdims: bool = True) -> Tensor:
        """Means over axes."""
        return self.op("ReduceMean", self.builder.ints(*axes), keepdims=int(keepdims))

    def unsqueeze(self, axes: Tensor | Sequence[int]) -> Tensor:
        """New axes of size one."""
        return self.op("Unsqueeze", axes if isinstance(axes, Tensor) else self.builder.ints(*axes))

    def expand(self, shape: Tensor) -> Tensor:
        """Repeated along axes of size one."""
        return self.op("Expand", shape)

    def slice(self, start: Tensor | int, end: Tensor | int, axis: int, step: int = 1) -> Tensor:
        """A part along one axis."""
        bounds = [value if isinstance(value, Tensor) else self.builder.ints(value) for value in (start, end)]
        return self.op("Slice", *bounds, self.builder.ints(axis), self.builder.ints(step))

    def zeros(self) -> Tensor:
        """Zeros of the same shape and type."""
        return zeros(self.dims(), self)

    def where(self, condition: Tensor, other: Tensor | Number = 0) -> Tensor:
        """This tensor where a condition holds, and `other` elsewhere."""
        chosen = other if isinstance(other, Tensor) else self.number(other)
        return condition.op("Where", self, chosen, elem_type=self.elem_type)

    def masked(self, condition: Tensor) -> Tensor:
        """This tensor where a condition holds, and 0 elsewhere (an infinite element must not be masked)."""
        return self * condition.cast(self)


def zeros(shape: Tensor, like: Tensor) -> Tensor:
    """Zeros of a shape that the graph computes."""
    value = np.zeros(1, onnx.helper.tensor_dtype_to_np_dtype(like.elem_type))
    return shape.op("ConstantOfShape", elem_type=like.elem_type, value=numpy_helper.from_array(value))


def concat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors one after the other."""
    return tensors[0] if len(tensors) == 1 else tensors[0].op("Concat", *tensors[1:], axis=axis)


def padded(x: Tensor, before: Tensor, after: Tensor, axis: int, behind: int) -> Tensor:
    """Zeros around a tensor, or elements removed if their number is negative.

    All axes are written down: ONNX Runtime's optimizer moves transpositions wrongly past a Pad that names its axes.

    Args:
        x: The tensor.
        before: How many before, int64 [axes that are padded].
        after: How many behind, likewise.
        axis: The first axis that is padded.
        behind: How many axes follow the last one.
    """
    lead, rest = ([x.builder.ints(*[0] * count)] if count else [] for count in (axis, behind))
    return x.op("Pad", concat([*lead, before, *rest, *lead, after, *rest], 0))


def total(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return tensors[0] if len(tensors) == 1 else tensors[0].op("Sum", *tensors[1:])


class NoGradient(Exception):
    """A rule does not cover this form of its operator; the message says which."""
