"""The node test cases that the ONNX package ships, as samples."""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ops.sample import ANY, DEAF, IR_VERSION, REFUSED, Array, Sample

NEWEST = 21  # newer opsets are lowered to it where the operator has not changed since
_MOST_ELEMENTS = 4000
_SIZES_FIRST = {"ConstantOfShape", "Range"}  # their first input is no data


@dataclass(frozen=True)
class Case:
    """One case with its first data set; `inputs` and `outputs` by tensor name."""

    name: str
    model: onnx.ModelProto
    inputs: dict[str, Array]
    outputs: dict[str, Array]

    def stored_model(self) -> onnx.ModelProto:
        """The model with all inputs as initializers and no outputs, so that every axis is live."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.input[:], model.graph.output[:]
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in self.inputs.items())
        return model

    def sample(self) -> Sample | None:
        """The only node as a sample whose first input carries channels on all its axes."""
        if len(self.model.graph.node) != 1 or self.model.graph.initializer:
            return None
        node = self.model.graph.node[0]
        first = self.inputs.get(node.input[0]) if node.input else None
        if first is None or first.dtype not in (np.float32, np.bool_, np.int32, np.int64, np.uint8):
            return None
        axes = tuple(axis for axis, size in enumerate(first.shape) if size > 1)
        sizes = [a.size for a in (*self.inputs.values(), *self.outputs.values())]
        if not axes or max(sizes) > _MOST_ELEMENTS or node.op_type in _SIZES_FIRST:
            return None
        if min((a.size for a in (first, *self.outputs.values())), default=0) == 0:
            return None
        if node.op_type == "MeanVarianceNormalization":
            axes = (1,)  # nothing has no variance
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs = tuple(self.inputs[name] if name else None for name in node.input)
        skipped = tuple(p for p, name in enumerate(node.output) if not name)
        return Sample(
            node.op_type, inputs, {0: axes}, attributes, _version(self.model), len(node.output),
            units=ANY, exact=None, skip_outputs=skipped, notes=(REFUSED, DEAF, "no output is finite"),
        )  # fmt: skip


def _version(model: onnx.ModelProto) -> int:
    """The newest opset up to `NEWEST` in which the only node means the same."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    op = model.graph.node[0].op_type
    since = onnx.defs.get_schema(op, opset, "").since_version
    same = [v for v in range(since, NEWEST + 1) if onnx.defs.get_schema(op, v, "").since_version == since]
    return max(same, default=since)


@functools.cache
def cases() -> dict[str, list[Case]]:
    """All cases whose values are plain tensors, by operator; those of several nodes under ""."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases divide by zero on purpose
        from onnx.backend.test.case.node import collect_testcases

        collected = collect_testcases(None)
    found: dict[str, list[Case]] = defaultdict(list)
    for case in collected:
        graph = case.model.graph
        given, expected = case.data_sets[0]
        if not all(isinstance(value, np.ndarray | np.generic) for value in (*given, *expected)):
            continue
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        model.ir_version = min(model.ir_version, IR_VERSION)
        key = graph.node[0].op_type if len(graph.node) == 1 and not graph.node[0].domain else ""
        inputs = {v.name: np.asarray(a) for v, a in zip(graph.input, given, strict=True)}
        outputs = {v.name: np.asarray(a) for v, a in zip(graph.output, expected, strict=True)}
        found[key].append(Case(case.name, model, inputs, outputs))
    return dict(found)
