"""The operators of a model as small models at any width, for timing.

Every operator on removable channels is described by the sizes of its inputs, its attributes and the activation that
ONNX Runtime fuses into it. Weights are filled in when a session is created, so such a model has a few hundred bytes,
however much it computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcop._base.types import Array, IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.graph.edit import copied
from onnxcop.graph.traits import Trait, traits
from onnxcop.runtime.kernel_times import MARK, REFERENCE

_VIEWS = frozenset(
    "Reshape Squeeze Unsqueeze Flatten Identity Shape Size Constant Dropout Expand Slice If Loop Scan".split()
)
_LARGEST_VALUE = 64  # elements of a constant to store as it is

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AxisSize:
    """The size that an axis, by its number, sets."""

    axis: int


@dataclass(frozen=True, slots=True)
class OperatorInput:
    """An input of an operator.

    Attributes:
        name: The tensor, "" if the input is absent.
        elem_type: Its type.
        dims: Its sizes, or the axes that set them.
        stored: Whether the model stores it.
        value: Value of a small stored tensor that holds no weights.
    """

    name: str
    elem_type: int
    dims: tuple[int | AxisSize, ...]
    stored: bool
    value: Array | None = None

    @property
    def fixed(self) -> Sizes:
        """The sizes that no axis sets."""
        return tuple(size for size in self.dims if isinstance(size, int))

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that set the others."""
        return tuple(size.axis for size in self.dims if isinstance(size, AxisSize))

    def shape(self, kept: IntArray) -> Sizes:
        """Its sizes if axis a keeps `kept[a]` indices."""
        return tuple(int(kept[size.axis]) if isinstance(size, AxisSize) else size for size in self.dims)


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator with the activation that is fused into it.

    Attributes:
        node: The operator.
        operands: Its inputs.
        outputs: Sizes of its outputs, in the same form.
        fused: The activation, None if there is none.
        activation: Other inputs of the activation.
        opset: Imports of the model.
    """

    node: onnx.NodeProto
    operands: tuple[OperatorInput, ...]
    outputs: tuple[OperatorInput, ...]
    fused: onnx.NodeProto | None
    activation: tuple[OperatorInput, ...]
    opset: tuple[tuple[str, int], ...]

    @property
    def axes(self) -> tuple[int, ...]:
        """Numbers of the axes that it depends on, ascending."""
        every = (*self.operands, *self.outputs)
        return tuple(sorted({axis for operand in every for axis in operand.axes}))

    @property
    def parts(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Its operands as a factor and positions in :attr:`axes`; their product is the number of elements."""
        place = {axis: number for number, axis in enumerate(self.axes)}
        return tuple(
            (int(np.prod(one.fixed, dtype=np.int64)), tuple(place[axis] for axis in one.axes))
            for one in (*self.operands, *self.outputs) if one.elem_type
        )  # fmt: skip

    @property
    def signature(self) -> str:
        """Identity without widths: equal for operators that differ only in widths."""
        place = {axis: -1 - number for number, axis in enumerate(self.axes)}  # negative: no size
        every = (*self.operands, *self.activation)
        sizes = [[place[size.axis] if isinstance(size, AxisSize) else size for size in one.dims] for one in every]
        values = [None if one.value is None else one.value.tolist() for one in every]
        parts = [self.node.op_type, self.node.domain, sizes, values, [one.elem_type for one in every]]
        for node in (self.node, *(() if self.fused is None else (self.fused,))):
            parts.append([one.SerializeToString(deterministic=True) for one in node.attribute])
        return repr((parts, self.opset))

    @property
    def blocked(self) -> bool:
        """Whether it computes channels in blocks."""
        return bool(traits(self.node) & Trait.SLIDES)

    def small_model(self, kept: IntArray, number: int = 0) -> onnx.GraphProto:
        """The operator alone at given widths; its names start with a mark and a number."""
        return _Writer(self, kept, f"{MARK}{number}").graph()

    def key(self, kept: IntArray) -> str:
        """Short key of its time: equal for operators that compute the same."""
        digest = hashlib.sha256(repr(self.opset).encode())
        digest.update(self.small_model(kept).SerializeToString(deterministic=True))
        sizes = ",".join("x".join(map(str, operand.shape(kept))) for operand in self.operands)
        name = self.node.op_type + (f"+{self.fused.op_type}" if self.fused is not None else "")
        return f"{name} {sizes} {digest.hexdigest()[:12]}"


class _Writer:
    def __init__(self, operator: Operator, kept: IntArray, name: str) -> None:
        self.operator, self.kept, self.name = operator, kept, name
        self.inputs: list[onnx.ValueInfoProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.names: dict[str, str] = {}

    def graph(self) -> onnx.GraphProto:
        operator = self.operator
        node = copied(operator.node)
        node.name = self.name
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
        names = [self._operand(operand, place) for place, operand in enumerate(operator.operands)]
        if node.op_type == "Split":
            self._split(node, names)
        del node.input[:]
        node.input.extend(names)
        self._groups(node)
        fused = operator.fused
        results = [self.name if not place else f"{self.name}_{place}" for place in range(len(node.output))]
        if fused is not None:
            results[0] = f"{self.name}_linear"
            after = copied(fused)
            after.name = f"{self.name}_act"
            others = [self._operand(one, len(names) + place) for place, one in enumerate(operator.activation)]
            del after.input[:], after.output[:]
            after.input.extend([results[0], *others])
            after.output.append(self.name)
        del node.output[:]
        node.output.extend(results)
        self.nodes += [node] if fused is None else [node, after]
        ends = [self.name, *results[1:]]
        outputs = [
            helper.make_tensor_value_info(end, one.elem_type, one.shape(self.kept))
            for end, one in zip(ends, operator.outputs, strict=True)
        ]
        return helper.make_graph(self.nodes, self.name, self.inputs, outputs, self.stored)

    def _operand(self, operand: OperatorInput, place: int) -> str:
        if not operand.name:
            return ""
        if operand.name in self.names:
            return self.names[operand.name]
        name = self.names[operand.name] = f"{self.name}_in{place}"
        shape = operand.shape(self.kept)
        if not operand.stored:
            self.inputs.append(helper.make_tensor_value_info(name, operand.elem_type, shape))
        elif operand.value is not None:
            self.stored.append(numpy_helper.from_array(operand.value, name))
        else:  # filled in when the session is created
            self.stored.append(numpy_helper.from_array(np.array(shape, np.int64), f"{name}_shape"))
            value = helper.make_tensor("value", operand.elem_type, [1], [1])
            self.nodes.append(helper.make_node("ConstantOfShape", [f"{name}_shape"], [name], value=value))
        return name

    def _split(self, node: onnx.NodeProto, names: list[str]) -> None:
        """Sections as long as the outputs."""
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        sizes = [one.shape(self.kept)[axis] for one in self.operator.outputs]
        version = dict(self.operator.opset).get("", 1)
        for place in reversed(range(len(node.attribute))):
            if node.attribute[place].name in ("split", "num_outputs"):
                del node.attribute[place]
        if version < 13:
            node.attribute.append(helper.make_attribute("split", sizes))
            return
        self.stored.append(numpy_helper.from_array(np.array(sizes, np.int64), f"{self.name}_sizes"))
        names[1:] = [f"{self.name}_sizes"]

    def _groups(self, node: onnx.NodeProto) -> None:
        """The number of groups of a convolution that its remaining weights imply."""
        for attribute in node.attribute:
            if attribute.name == "group" and attribute.i > 1:
                channels, weights = (operand.shape(self.kept) for operand in self.operator.operands[:2])
                spreads = traits(node) & Trait.SPREADS
                attribute.i = channels[1] if spreads else max(1, channels[1] // weights[1])


def operators_of(analysis: Analysis) -> list[Operator]:
    """All operators of the top-level graph whose time depends on a width."""
    model, shapes = analysis.model, analysis.structure.coupling.shapes
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    given = {value.name for value in model.graph.output}
    opset = tuple((entry.domain if entry.domain != "ai.onnx" else "", entry.version) for entry in model.opset_import)
    operators, done = [], set[str]()
    for node in model.graph.node:
        if node.op_type in _VIEWS or any(name in done for name in node.output):
            continue
        if any(name and shapes[name].value is not None for name in node.output):
            continue  # a size takes no time to compute
        after = None
        if traits(node) & Trait.SLIDES and node.output[0] not in given:
            following = readers.get(node.output[0], [])
            if len(following) == 1 and traits(following[0]) & Trait.ACTIVATES:
                after = following[0]
                done.add(after.output[0])
        operator = _operator(analysis, node, after, opset)
        if operator is not None and operator.axes:
            operators.append(operator)
    return operators


def _operator(
    analysis: Analysis, node: onnx.NodeProto, fused: onnx.NodeProto | None, opset: tuple[tuple[str, int], ...]
) -> Operator | None:
    # Adding a bias takes no time, and layers get one during recovery.
    names = node.input[:2] if traits(node) & Trait.SLIDES and len(node.input) == 3 else node.input
    operands = [_operand(analysis, name) for name in names]
    outputs = [_operand(analysis, name) for name in node.output if name]
    others = [] if fused is None else [_operand(analysis, name) for name in fused.input[1:]]
    if any(one is None for one in (*operands, *outputs, *others)):
        return None
    known = [[one for one in part if one is not None] for part in (operands, outputs, others)]
    return Operator(
        node=node,
        operands=tuple(known[0]),
        outputs=tuple(known[1]),
        fused=fused,
        activation=tuple(known[2]),
        opset=opset,
    )


def _operand(analysis: Analysis, name: str) -> OperatorInput | None:
    """An input or output with its sizes; None if they are unknown."""
    if not name:
        return OperatorInput("", 0, (), stored=True)
    structure = analysis.structure
    info = structure.coupling.shapes[name]
    if info.shape is None or not info.elem_type:
        return None
    label = structure.coupling.labels.get(name, (None,) * len(info.shape))
    live = [
        None if atoms is None or not (structure.units_on(atoms) >= 0).any() else structure.axis_id(atoms)
        for atoms in label
    ]
    dims = tuple(size if axis is None else AxisSize(axis) for size, axis in zip(info.shape, live, strict=True))
    stored = name in structure.coupling.constants or name in structure.coupling.derived or info.value is not None
    small = info.value is not None and info.value.size <= _LARGEST_VALUE and dims == info.shape
    value = info.value if small else None
    return OperatorInput(name=name, elem_type=info.elem_type, dims=dims, stored=stored, value=value)


def reference() -> onnx.GraphProto:
    """An operator that does almost nothing, timed beside others to measure the overhead of timing."""
    name, one = f"{MARK}{REFERENCE}", onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(end, one, [1]) for end in (f"{name}_in0", name)]
    node = helper.make_node("Neg", [ends[0].name], [name], name)
    return helper.make_graph([node], name, ends[:1], ends[1:])


def in_one(graphs: Sequence[onnx.GraphProto], opset: Iterable[tuple[str, int]]) -> onnx.ModelProto:
    """Several small models merged into one, side by side."""
    merged = onnx.GraphProto(name="operators")
    for graph in graphs:
        merged.node.extend(graph.node)
        merged.input.extend(graph.input)
        merged.output.extend(graph.output)
        merged.initializer.extend(graph.initializer)
    imports = [helper.make_opsetid(domain, version) for domain, version in opset]
    return helper.make_model(merged, opset_imports=imports, ir_version=8)
