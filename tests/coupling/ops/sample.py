"""A sample is one node with concrete operands; from it the oracles build their models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]
IR_VERSION = 10
REFUSED = "the ONNX checker refuses the original too"
DEAF = "nothing that was compared reacts to random inputs"
ANY = -1  # number of units of a sample that may offer none


@dataclass(frozen=True)
class Sample:
    """One node.

    Attributes:
        op: The operator.
        inputs: Its operands, None where an optional one is left out.
        data: For every input that carries channels in the embedded graph, the axes that are live
            there; the other inputs are initializers.
        units: How many units the embedded graph must offer; None where at least one, `ANY` where
            the draw may leave none.
        exact: Whether all of them must be exact, or all inexact; None where some are.
        moves: Whether the operator only moves elements, so that labels can be run through it.
        skip_outputs: Outputs that are left out.
        prepare: Operator that brings the data inputs of the embedded graph into the right domain.
        notes: What verification may note, in part.
    """

    op: str
    inputs: tuple[Array | None, ...]
    data: Mapping[int, tuple[int, ...]]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 17
    outputs: int = 1
    units: int | None = None
    exact: bool | None = True
    moves: bool = False
    skip_outputs: tuple[int, ...] = ()
    prepare: str = ""
    notes: tuple[str, ...] = ()
    domain: str = ""

    @property
    def opsets(self) -> list[onnx.OperatorSetIdProto]:
        """The opset imports of a model with this node."""
        found = [helper.make_opsetid("", self.opset)]
        return found + ([helper.make_opsetid(self.domain, 1)] if self.domain else [])

    def name(self, position: int) -> str:
        """Name of an input tensor, empty if it is absent."""
        return "" if self.inputs[position] is None else f"in{position}"

    def node(self, inputs: Sequence[str] | None = None) -> onnx.NodeProto:
        """The node itself."""
        names = [self.name(p) for p in range(len(self.inputs))] if inputs is None else list(inputs)
        outputs = ["" if p in self.skip_outputs else f"out{p}" for p in range(self.outputs)]
        return helper.make_node(self.op, names, outputs, name="subject", domain=self.domain, **self.attributes)

    def output_names(self) -> list[str]:
        """Names of the outputs that are computed."""
        return [name for name in self.node().output if name]

    def is_float(self, position: int) -> bool:
        """Whether an input holds floating point numbers."""
        value = self.inputs[position]
        return value is not None and value.dtype.kind == "f"

    def stored_model(self) -> onnx.ModelProto:
        """The node with every operand as an initializer and no graph output, for tracing alone."""
        constants = [
            numpy_helper.from_array(value, self.name(position))
            for position, value in enumerate(self.inputs)
            if value is not None
        ]
        graph = helper.make_graph([self.node()], "stored", [], [], constants)
        return helper.make_model(graph, opset_imports=self.opsets, ir_version=IR_VERSION)

    def fed_model(self, fed: Sequence[int]) -> onnx.ModelProto:
        """The node with the operands `fed` as graph inputs, for running."""
        inputs, constants = [], []
        for position, value in enumerate(self.inputs):
            if value is None:
                continue
            name = self.name(position)
            if position in fed:
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                inputs.append(helper.make_tensor_value_info(name, kind, value.shape))
            else:
                constants.append(numpy_helper.from_array(value, name))
        outputs = [onnx.ValueInfoProto(name=name) for name in self.output_names()]
        graph = helper.make_graph([self.node()], "fed", inputs, outputs, constants)
        return helper.make_model(graph, opset_imports=self.opsets, ir_version=IR_VERSION)


def floats(shape: Sequence[int], seed: int = 0, dtype: Any = np.float32) -> Array:
    """Standard normal numbers."""
    return np.asarray(np.random.default_rng(seed).standard_normal(tuple(shape))).astype(dtype)


def positive(shape: Sequence[int], seed: int = 0) -> Array:
    """Numbers between 0.5 and 1.5."""
    return np.asarray(np.random.default_rng(seed).random(tuple(shape)) + 0.5).astype(np.float32)


def ints(*values: int) -> Array:
    """An int64 vector."""
    return np.array(values, dtype=np.int64)
