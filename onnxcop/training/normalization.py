"""BatchNormalization with the statistics of the batch, as training uses it.

A node with stored statistics becomes means, variances and arithmetic, which have gradients of their own. The stored
statistics are estimated again from the trained weights: the mean over batches of each node's mean, and the variance of
all samples by the law of total variance (Wu and Johnson 2021, "Rethinking Batch in BatchNorm", section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnxcop._base.types import Array, Feed
from onnxcop.gradient.builder import Builder, Tensor
from onnxcop.gradient.prepare import raised
from onnxcop.graph.edit import copied
from onnxcop.graph.shapes import ShapeMap
from onnxcop.graph.subgraphs import excerpt
from onnxcop.runtime.input_shapes import settle_shapes, shapes_of
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.training.step import initializers_of

_DOMAINS = ("", "ai.onnx")
_EPSILON = 1e-5  # the default of the operator


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Names of a node's statistics.

    Attributes:
        stored: Names of the stored mean and variance.
        batch: Names of those of the batch, [channels] each.
        elem_type: Element type of those of the batch.
    """

    stored: tuple[str, str]
    batch: tuple[str, str]
    elem_type: int


def use_batch_statistics(
    model: onnx.ModelProto, options: EngineOptions = EngineOptions(),
) -> tuple[onnx.ModelProto, tuple[BatchStatistics, ...]]:  # fmt: skip
    """Let BatchNormalization use the statistics of the batch.

    A node stays as it is if its statistics are not stored, or are shared with another node.

    Args:
        model: The model; not changed.
        options: How to run it if shapes cannot be inferred.

    Returns:
        The model at opset 18 or later, and the nodes that changed.
    """
    work = copied(raised(model))
    stored, shapes = initializers_of(work), shapes_of(work, settle_shapes(work, None, options), options)
    readers = [name for node in work.graph.node for name in node.input]
    changed: list[BatchStatistics] = []
    build = Builder(work.graph, "batch")
    later = list(work.graph.node)
    del work.graph.node[:]
    for node in later:
        if _normalizes(node) and _own_statistics(node, stored, readers):
            changed.append(_written_out(build, node, shapes))
        else:
            work.graph.node.append(node)
    return work, tuple(changed)


def _normalizes(node: onnx.NodeProto) -> bool:
    return node.op_type == "BatchNormalization" and node.domain in _DOMAINS


def _own_statistics(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto], readers: list[str]) -> bool:
    """Whether mean and variance are stored, for this node alone."""
    trains = any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
    return not trains and all(name in stored and readers.count(name) == 1 for name in node.input[3:5])


def _written_out(build: Builder, node: onnx.NodeProto, shapes: ShapeMap) -> BatchStatistics:
    x, scale, bias = (build.known(name, shapes[name].elem_type) for name in node.input[:3])
    rank = len(shapes[node.input[0]].shape or ())
    axes = [axis for axis in range(rank) if axis != 1]
    across = [1, -1] + [1] * (rank - 2)

    def spread(vector: Tensor) -> Tensor:
        return vector.cast(x).reshape(across)

    mean = x.mean(axes)
    centred = x - mean
    variance = (centred * centred).mean(axes)
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), _EPSILON)
    normal = centred / (variance + epsilon).op("Sqrt")
    (normal * spread(scale) + spread(bias)).op("Identity")
    build.graph.node[-1].output[0] = node.output[0]
    batch = mean.reshape([-1]).name, variance.reshape([-1]).name
    return BatchStatistics((node.input[3], node.input[4]), batch, x.elem_type)


def estimated_statistics(
    model: onnx.ModelProto, nodes: Iterable[BatchStatistics], batches: Iterable[Feed],
    options: EngineOptions = EngineOptions(),
) -> dict[str, Array]:  # fmt: skip
    """Estimate the stored statistics of a model that uses those of the batch.

    Args:
        model: As :func:`use_batch_statistics` gives it, with the weights in question.
        nodes: As it gives them.
        batches: Inputs, each of the size that training uses.
        options: How to run the model.

    Returns:
        Means and variances, float64 [channels], by the names under which the original stores them.
    """
    nodes = tuple(nodes)
    names = [name for node in nodes for name in node.batch]
    outputs = [onnx.helper.make_tensor_value_info(name, n.elem_type, [None]) for n in nodes for name in n.batch]
    means: dict[str, list[Array]] = {name: [] for name in names}
    with Session(excerpt(model, outputs), options) as session:
        for feed in batches:
            for name, value in session.run({spec.name: feed[spec.name] for spec in session.inputs}, names).items():
                means[name].append(value.astype(np.float64))
    estimates: dict[str, Array] = {}
    for node in nodes:
        centres, spreads = (np.stack(means[name]) for name in node.batch)
        stored_mean, stored_variance = node.stored
        estimates[stored_mean] = centres.mean(0)
        estimates[stored_variance] = spreads.mean(0) + centres.var(0)
    return estimates
