"""Objectives of fine-tuning: cross-entropy, squared error, a loss of the user, and a teacher's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import compose

from onnxcop._base.lookup import unknown
from onnxcop._base.types import Array, Feed
from onnxcop.errors import CalibrationError, ModelError
from onnxcop.gradient.builder import FLOATS, Builder, Tensor, total
from onnxcop.gradient.prepare import raised
from onnxcop.graph.edit import copied
from onnxcop.outputs.classes import shares_along
from onnxcop.training.losses import LOSS, TARGET, cross_entropy, soft_cross_entropy, squared_error

LABELS = "labels"
_SMALL = 1e-12  # least mean square
_TEACHER = 0.5  # weight of the teacher's outputs; the labels get the rest
LOSSES = ("cross-entropy", "mse")


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss on labels.

    Attributes:
        model: The model with inputs `labels` (and `target/NAME` for a teacher's answers), and the output `loss`.
        name: "cross-entropy", "mse", or "own".
        output: Name of the trained output; empty for a loss of the user.
        taught: Names of the outputs that a teacher's answers count for.
        own: The loss of the user in the model, before the teacher's part is added.
    """

    model: onnx.ModelProto
    name: str
    output: str
    taught: tuple[str, ...] = ()
    own: onnx.ValueInfoProto | None = None

    def score(self, output: Array, labels: Array) -> float:
        """Higher is better: the share of correct classes, or minus the mean squared error."""
        if self.name == "cross-entropy":
            return float((output.argmax(axis=1) == labels).mean())
        return -float(np.mean((output.astype(np.float64) - labels) ** 2))


def objective(
    model: onnx.ModelProto, example: Mapping[str, Array], labels: Array, loss: str | onnx.ModelProto = "auto",
    teacher: Mapping[str, Array] | None = None,
) -> Objective:  # fmt: skip
    """Add a loss on labels to a model.

    Args:
        model: The model.
        example: Its outputs on some samples.
        labels: All labels.
        loss: "cross-entropy", "mse", "auto" (by the type of the labels), or a small model that computes a scalar from
            outputs of the model, which it reads by their names, and from one further input, the labels.
        teacher: Outputs of a teacher on the same samples.

    Raises:
        CalibrationError: Labels do not fit the outputs, or the teacher has other outputs.
        ModelError: The loss cannot be joined to the model.
    """
    if isinstance(loss, onnx.ModelProto):
        return _own(model, loss, example, labels, teacher)
    name = ("cross-entropy" if labels.dtype.kind == "i" else "mse") if loss == "auto" else loss
    if name not in LOSSES:
        raise unknown("loss", name, (*LOSSES, "a model.onnx"), CalibrationError)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    output = next((n for n in types if types[n] in FLOATS), None)
    if output is None:
        raise CalibrationError("the model has no floating-point output to train")
    values = example[output]
    _check(name, output, values, labels)
    _check_teacher(teacher, output, values)
    work = copied(raised(model))
    build = Builder(work.graph, "loss")
    y = _exact(build.known(output, types[output]))
    given = _input(work, build, LABELS, onnx.helper.np_dtype_to_tensor_dtype(labels.dtype), labels.ndim)
    if name == "mse":
        given = given.cast(y)
    probabilities = values.ndim == 2 and shares_along([values], 1)
    hard = cross_entropy(y, given, probabilities=probabilities) if name == "cross-entropy" else squared_error(y, given)
    parts = [hard]
    if teacher is not None:
        answers = _input(work, build, TARGET + output, types[output], values.ndim).cast(y)
        soft = (
            soft_cross_entropy(y, answers, 1, probabilities=probabilities) if name == "cross-entropy"
            else squared_error(y, answers)
        )  # fmt: skip
        parts = [hard * (1 - _TEACHER), soft * _TEACHER]
    _finish(work, build, total([part.reshape([]) for part in parts]))
    return Objective(work, name, output, taught=() if teacher is None else (output,))


def _own(
    model: onnx.ModelProto, loss: onnx.ModelProto, example: Mapping[str, Array], labels: Array,
    teacher: Mapping[str, Array] | None,
) -> Objective:  # fmt: skip
    """A loss of the user and, for a teacher, the squared error of the outputs that it reads, over their mean square."""
    work, read, own = _with_own(model, loss, labels)
    build = Builder(work.graph, "loss")
    parts = [build.known(own.name, own.type.tensor_type.elem_type).reshape([])]
    taught: list[str] = []
    if teacher is not None:
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
        taught = [name for name in read if types[name] in FLOATS]
        if not taught:
            raise CalibrationError("the loss reads no floating-point output that a teacher could count for")
        for name in taught:
            _check_teacher(teacher, name, example[name])
        soft = []
        for name in taught:
            y = _exact(build.known(name, types[name]))
            answers = _input(work, build, TARGET + name, types[name], example[name].ndim).cast(y)
            square = float(np.square(teacher[name].astype(np.float64)).mean())
            soft.append(squared_error(y, answers).cast(parts[0]) * (_TEACHER / len(taught) / max(square, _SMALL)))
        parts = [parts[0] * (1 - _TEACHER), *(part.reshape([]) for part in soft)]
    _finish(work, build, total(parts))
    return Objective(work, "own", "", taught=tuple(taught), own=own)


def _exact(y: Tensor) -> Tensor:
    """A tensor in float32 at least: sums over samples need more digits than float16 has."""
    single, double = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
    return y if y.elem_type in (single, double) else y.op("Cast", elem_type=single, to=single)


def _check_teacher(teacher: Mapping[str, Array] | None, output: str, values: Array) -> None:
    if teacher is not None and (output not in teacher or teacher[output].shape != values.shape):
        raise CalibrationError(
            f"the teacher has no output {output!r} of the shape {list(values.shape[1:])}; give one that has"
        )


def _check(name: str, output: str, values: Array, labels: Array) -> None:
    shape = list(values.shape[1:])
    if name == "mse":
        if list(labels.shape[1:]) != shape:
            raise CalibrationError(
                f"labels have the shape {list(labels.shape[1:])} for a sample, but output {output!r} has {shape}; "
                "give targets of that shape"
            )
        return
    if values.ndim != 2:
        raise CalibrationError(
            f"output {output!r} has the shape {shape} for a sample, not scores of classes; give --loss"
        )
    if labels.dtype.kind != "i" or labels.ndim != 1:
        raise CalibrationError("cross-entropy needs one whole number, the class, for each sample")
    if labels.min() < 0 or labels.max() >= shape[0]:
        raise CalibrationError(
            f"labels run from {labels.min()} to {labels.max()}, but output {output!r} has {shape[0]} classes, 0 to "
            f"{shape[0] - 1}; give labels that fit"
        )


def _input(work: onnx.ModelProto, build: Builder, name: str, kind: int, rank: int) -> Tensor:
    if any(value.name == name for value in work.graph.input):
        raise ModelError(f"the model has an input {name!r} already; rename it")
    work.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * rank))
    return build.known(name, kind)


def _finish(work: onnx.ModelProto, build: Builder, loss: Tensor) -> None:
    build.op("Identity", loss)
    work.graph.node[-1].output[0] = LOSS
    work.graph.output.append(onnx.helper.make_tensor_value_info(LOSS, loss.elem_type, []))


def _with_own(
    model: onnx.ModelProto, loss: onnx.ModelProto, labels: Array
) -> tuple[onnx.ModelProto, list[str], onnx.ValueInfoProto]:
    """Join a loss model: its inputs named like outputs of the model read these, the other one is the labels.

    Returns:
        The joined model, the outputs that the loss reads, and the loss in it.
    """
    outputs = {value.name for value in model.graph.output}
    stored = {tensor.name for tensor in loss.graph.initializer}
    inputs = [value for value in loss.graph.input if value.name not in stored]
    others = [value for value in inputs if value.name not in outputs]
    if len(others) != 1 or len(loss.graph.output) != 1 or len(others) == len(inputs):
        raise ModelError(
            f"the loss must read outputs of the model ({', '.join(sorted(outputs))}), one further input, the labels, "
            "and return one number"
        )
    work, added = onnx.ModelProto(), compose.add_prefix(raised(loss), "own/")
    work.CopyFrom(raised(model))
    opsets = [{e.domain: e.version for e in m.opset_import}.get("", 0) for m in (work, added)]
    if opsets[0] != opsets[1]:
        raise ModelError(f"the loss has opset {opsets[1]} and the model {opsets[0]}; export the loss with that opset")
    names = {f"own/{value.name}": value.name for value in inputs if value.name in outputs}
    names[f"own/{others[0].name}"] = LABELS
    for node in added.graph.node:
        for places in (node.input, node.output):
            for place, name in enumerate(places):
                places[place] = names.get(name, name)
    work.graph.node.extend(added.graph.node)
    work.graph.initializer.extend(added.graph.initializer)
    given = work.graph.input.add()
    given.CopyFrom(others[0])
    given.name = LABELS
    kind = onnx.helper.tensor_dtype_to_np_dtype(given.type.tensor_type.elem_type)
    if kind != labels.dtype:
        raise CalibrationError(f"labels are {labels.dtype}, but the loss reads {kind}; give labels of that type")
    found = onnx.shape_inference.infer_shapes(loss).graph.output[0]
    dims = found.type.tensor_type.shape.dim
    sizes = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims]
    if found.type.tensor_type.elem_type not in FLOATS or any(size != 1 for size in sizes):
        raise ModelError(f"the loss has the shape {sizes}; reduce it to one floating-point number")
    own = onnx.ValueInfoProto()
    own.CopyFrom(found)
    own.name = f"own/{found.name}"
    return work, [value.name for value in inputs if value.name in outputs], own


__all__ = ["LABELS", "LOSSES", "Feed", "Objective", "objective"]
