"""Losses as nodes: a model with targets among its inputs and a scalar among its outputs.

The loss of self-distillation is the divergence used in the rest of the package (see
:mod:`onnxcop.reconstruction.divergence`), in a differentiable form. For class scores it is the Kullback–Leibler
divergence at a temperature, for other outputs the squared error over the energy of each of their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx

from onnxcop._base.types import Array
from onnxcop.errors import ModelError
from onnxcop.gradient.builder import FLOATS, Builder, Tensor, total
from onnxcop.gradient.prepare import raised
from onnxcop.graph.edit import copied
from onnxcop.outputs.classes import ClassMeasure, class_axis, shares_along
from onnxcop.outputs.judgement import Judgement, Judgements
from onnxcop.outputs.kind import MeasureSettings
from onnxcop.outputs.values import ErrorMeasure

LOSS = "loss"
TARGET = "target/"  # prefix of the names of targets
_TEMPERATURE = 4.0
_FEATURE = 20.0  # weight of the relative error of a feature, better on held-out samples than 0, 5 and 60
_SMALL = 1e-12

LossTerm = Callable[[Tensor, Tensor], Tensor]  # from an output and its target to a scalar


def with_loss(
    model: onnx.ModelProto, terms: Mapping[str, LossTerm], targets: Mapping[str, tuple[int, int]]
) -> onnx.ModelProto:
    """Add a loss that is the sum of one term for each of some outputs.

    Args:
        model: The model, not changed.
        terms: By the name of the output.
        targets: Element type and number of axes of every target, by the name of the output.

    Returns:
        The model with an input `target/NAME` for every output that has a term, and the output `loss`.
    """
    work = copied(raised(model))
    build = Builder(work.graph, "loss")
    outputs = {value.name: value for value in work.graph.output}
    losses = []
    for name, term in terms.items():
        value = outputs[name]
        elem_type = value.type.tensor_type.elem_type
        kind, rank = targets[name]
        target = onnx.helper.make_tensor_value_info(TARGET + name, kind, [None] * rank)
        work.graph.input.append(target)
        output = build.known(name, elem_type)
        losses.append(term(output, build.known(target.name, kind)))
    build.op("Identity", total([part.reshape([]) for part in losses]))
    work.graph.node[-1].output[0] = LOSS
    work.graph.output.append(onnx.helper.make_tensor_value_info(LOSS, losses[0].elem_type, []))
    return work


def divergence_loss(
    model: onnx.ModelProto, judgements: Judgements, reference: Sequence[Mapping[str, Array]],
    features: Mapping[str, Array] = MappingProxyType({}),
) -> onnx.ModelProto:  # fmt: skip
    """Add the divergence from a teacher's outputs as the loss.

    Args:
        model: The student.
        judgements: Kinds of the outputs.
        reference: The teacher's outputs, batch by batch, which give the magnitude of their parts.
        features: Inner tensors that the student returns too and that are compared as well, by the output's name: the
            teacher's values on some samples.

    Raises:
        ModelError: None of the outputs can be compared.
    """
    terms: dict[str, LossTerm] = {}
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    for judgement in judgements.entries:
        for name in judgement.outputs:
            if name in types and types[name] in FLOATS:
                terms[name] = _term(judgement, [batch[name] for batch in reference])
    if not terms:
        raise ModelError("the model has no floating-point output to be trained by; nothing can be distilled")
    ranks = {name: reference[0][name].ndim for name in terms}
    for name, values in features.items():
        terms[name], ranks[name] = _feature_term(values), values.ndim
    return with_loss(model, terms, {name: (types[name], rank) for name, rank in ranks.items()})


def _feature_term(values: Array) -> LossTerm:
    scale = _FEATURE / max(float(np.mean(np.square(values, dtype=np.float64))), _SMALL)
    return lambda y, t: squared_error(y, t) * scale


def _term(judgement: Judgement, batches: Sequence[Array]) -> LossTerm:
    if isinstance(judgement.kind.measure, type) and issubclass(judgement.kind.measure, ClassMeasure):
        axis = class_axis(batches)
        return lambda y, t: soft_cross_entropy(y, t, axis, probabilities=shares_along(batches, axis))
    return lambda y, t: relative_error(y, t, batches)


def soft_cross_entropy(y: Tensor, target: Tensor, axis: int, *, probabilities: bool) -> Tensor:
    """KL(softmax(t / T) ‖ softmax(y / T)) · T², the mean over samples and positions (Hinton et al. 2015).

    Args:
        y: Scores.
        target: Scores of the same shape.
        axis: Of the classes.
        probabilities: Whether scores are probabilities already (then their logarithms are softened).
    """
    logits, targets = (_logits(x, probabilities) * (1 / _TEMPERATURE) for x in (y, target))
    ours, theirs = logits.op("LogSoftmax", axis=axis), targets.op("LogSoftmax", axis=axis)
    gap = (theirs.op("Exp") * (theirs - ours)).sum([axis])
    return gap.op("ReduceMean", keepdims=0) * (_TEMPERATURE**2)


def _logits(scores: Tensor, probabilities: bool) -> Tensor:
    if not probabilities:
        return scores
    return scores.op("Max", scores.number(_SMALL)).op("Log")


def relative_error(y: Tensor, target: Tensor, batches: Sequence[Array]) -> Tensor:
    """Squared errors over the teacher's mean square, separately for parts of very different magnitude."""
    measure = ErrorMeasure([batches], MeasureSettings())
    gap = (y - target) * (y - target)
    axis = measure.uneven_axis
    squares = [np.nan_to_num(batch.astype(np.float64)) ** 2 for batch in batches]
    if axis is None:
        mean = float(np.mean([square.mean() for square in squares]))
        return gap.op("ReduceMean", keepdims=0) * (1 / max(mean, _SMALL))
    rest = tuple(a for a in range(batches[0].ndim) if a != axis)
    means = np.mean([square.mean(axis=rest) for square in squares], axis=0)
    weights = np.where(means > _SMALL, 1 / np.maximum(means, _SMALL), 0.0)
    return (gap.mean(rest, keepdims=False) * y.number(weights)).op("ReduceMean", keepdims=0)


def cross_entropy(y: Tensor, labels: Tensor, *, probabilities: bool) -> Tensor:
    """-log of the probability of the correct class, mean_of_parts over samples; labels int64 [samples]."""
    logs = _logits(y, True) if probabilities else y.op("LogSoftmax", axis=1)
    return -logs.op("GatherElements", labels.unsqueeze([1]), axis=1).op("ReduceMean", keepdims=0)


def squared_error(y: Tensor, target: Tensor) -> Tensor:
    """The mean of squared errors."""
    return ((y - target) * (y - target)).op("ReduceMean", keepdims=0)
