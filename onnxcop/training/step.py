"""One training step as one graph: forward, backward, clipping and AdamW.

All trained tensors are concatenated in a single vector, so that weights and both moments are three tensors that stay on
the device. The graph reads them and returns their new values; a step only transfers the batch.

AdamW (Loshchilov and Hutter 2019, algorithm 2), with the gradient scaled so that its norm is at most `clip`:

    m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²,
    w ← w - η (m / (1 - β₁ᵗ) / (√(v / (1 - β₂ᵗ)) + ε) + λ w)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop._base.types import Array
from onnxcop.errors import ModelError
from onnxcop.gradient import Builder, Stop, Tensor, differentiate, trainable
from onnxcop.gradient.builder import concat
from onnxcop.graph.edit import computed_weights, copied, replace_all
from onnxcop.graph.subgraphs import excerpt, rename
from onnxcop.runtime.session import EngineOptions
from onnxcop.training.losses import LOSS

WEIGHTS, FIRST, SECOND = "state/weights", "state/first", "state/second"
STATE = (WEIGHTS, FIRST, SECOND)
NEXT = {name: f"{name}/next" for name in STATE}
RATE, STEP, NORM, GRADIENT = "state/rate", "state/step", "state/norm", "state/gradient"


@dataclass(frozen=True, slots=True)
class Optimizer:
    """AdamW.

    Attributes:
        decay: λ, of tensors of two and more axes; vectors are biases and scales, which do not decay.
        clip: Largest norm of the gradient.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second.
        epsilon: Added to the root of the second.
    """

    decay: float = 0.0
    clip: float = 5.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """Positions of trained tensors in the vector.

    Attributes:
        names: Names of the tensors.
        shapes: Shape of each.
        types: Element type of each, in the model.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    types: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """Elements of each."""
        return [int(np.prod(shape, dtype=np.int64)) for shape in self.shapes]

    def vector(self, model: onnx.ModelProto) -> Array:
        """The weights of a model, float32 [elements]."""
        stored = initializers_of(model)
        return np.concatenate([numpy_helper.to_array(stored[name]).astype(np.float32).ravel() for name in self.names])

    def arrays(self, vector: Array) -> dict[str, Array]:
        """Weights by name."""
        parts = np.split(vector, np.cumsum(self.sizes)[:-1])
        return {name: part.reshape(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


def initializers_of(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Stored tensors of the top-level graph and those of its Constant nodes, by name; changing them changes it."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            tensors.update((node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value")
    return tensors


def own_weights(model: onnx.ModelProto, with_loss: onnx.ModelProto) -> list[str]:
    """Tensors of a model with a loss that can be trained, without the constants of the loss.

    Args:
        model: The model alone.
        with_loss: The same with a loss.
    """
    own = initializers_of(model)
    return [name for name in trainable(with_loss) if name in own]


def with_weights(model: onnx.ModelProto, arrays: Mapping[str, Array]) -> onnx.ModelProto:
    """A copy of a model with other weights, each in its own element type."""
    changed = copied(model)
    stored = initializers_of(changed)
    for name, array in arrays.items():
        tensor = stored[name]
        tensor.CopyFrom(computed_weights(tensor.name, array, tensor.data_type))
    return changed


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A training step.

    Attributes:
        model: Inputs are the model's, the targets', the three vectors, the rate and the number of the step; outputs are
            the new vectors, the loss and the gradient's norm.
        layout: Layout of the vectors.
        stops: Nodes at which gradients ended.
        missing: Weights that no gradient reaches.
    """

    model: onnx.ModelProto
    layout: WeightLayout
    stops: tuple[Stop, ...]
    missing: tuple[str, ...]

    def in_two(self) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        """Split the step into two graphs, for a batch that comes in parts with mean_of_parts gradients.

        Returns:
            A graph that returns the loss and the gradient [elements] of a part, and a graph that updates the three
            vectors by the gradient.
        """
        gradient = onnx.helper.make_tensor_value_info(GRADIENT, onnx.TensorProto.FLOAT, [sum(self.layout.sizes)])
        loss = [value for value in self.model.graph.output if value.name == LOSS]
        updates = [value for value in self.model.graph.output if value.name != LOSS]
        return excerpt(self.model, [*loss, gradient]), excerpt(self.model, updates, [gradient])


def build_step(
    model: onnx.ModelProto, optimizer: Optimizer, tensors: Sequence[str] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None, options: EngineOptions = EngineOptions(),
) -> StepGraph:  # fmt: skip
    """Make the training step of a model that computes `loss`.

    Args:
        model: The model.
        optimizer: The optimizer's settings.
        tensors: Tensors to train, None for all that can be.
        input_shapes: An example of the inputs' shapes.
        options: How to run the model if shapes cannot be inferred.

    Raises:
        ModelError: No gradient reaches any of the weights.
    """
    backward = differentiate(model, LOSS, tensors or trainable(model), input_shapes=input_shapes, options=options)
    if not backward.names:
        reason = (
            f": {backward.stops[0].operator} {backward.stops[0].node}: {backward.stops[0].reason}"
            if backward.stops
            else ""
        )
        raise ModelError(f"nothing can be trained, no gradient reaches a weight{reason}")
    graph = backward.model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    names = tuple(backward.names)
    layout = WeightLayout(names, tuple(tuple(stored[n].dims) for n in names), tuple(stored[n].data_type for n in names))
    build = Builder(graph, "step")
    _read_from_vector(graph, build, layout)
    gradients = [build.known(backward.names[name], kind) for name, kind in zip(names, layout.types, strict=True)]
    like = build.known(WEIGHTS, onnx.TensorProto.FLOAT)
    gradient = concat([part.cast(like).reshape([-1]) for part in gradients], 0)
    _update(build, optimizer, layout, _renamed(graph, gradient, GRADIENT))
    kept = {LOSS, NORM, *NEXT.values()}
    outputs = [value for value in graph.output if value.name in kept]
    replace_all(graph.output, outputs)
    return StepGraph(backward.model, layout, backward.stops, backward.missing)


def _read_from_vector(graph: onnx.GraphProto, build: Builder, layout: WeightLayout) -> None:
    """Replace stored tensors that are trained by slices of the vector."""
    trained = set(layout.names)
    kept = [tensor for tensor in graph.initializer if tensor.name not in trained]
    listed = [value for value in graph.input if value.name not in trained]
    del graph.initializer[:], graph.input[:]
    graph.initializer.extend(kept)
    graph.input.extend(listed)
    later = list(graph.node)
    del graph.node[:]
    vector = _input(graph, build, WEIGHTS, [sum(layout.sizes)])
    lengths = build.ints(*layout.sizes)
    parts = build.emit("Split", vector, lengths, count=len(layout.names), axis=0)
    for part, name, shape, kind in zip(parts, layout.names, layout.shapes, layout.types, strict=True):
        last = part.reshape(shape if shape else [])
        if kind != onnx.TensorProto.FLOAT:
            last = last.op("Cast", to=kind)
        graph.node[-1].output[0] = name
        del last
    graph.node.extend(later)


def _update(build: Builder, optimizer: Optimizer, layout: WeightLayout, gradient: Tensor) -> None:
    """AdamW on the whole vector."""
    graph, count = build.graph, sum(layout.sizes)
    weights = build.known(WEIGHTS, onnx.TensorProto.FLOAT)
    first, second = (_input(graph, build, name, [count]) for name in (FIRST, SECOND))
    rate, step = (_input(graph, build, name, []) for name in (RATE, STEP))
    norm = (gradient * gradient).sum([0]).op("Sqrt")
    g = gradient * (optimizer.clip / (norm + 1e-12)).op("Min", norm.number(1.0))
    m = optimizer.beta1 * first + (1 - optimizer.beta1) * g
    v = optimizer.beta2 * second + (1 - optimizer.beta2) * (g * g)
    corrected = (v / (1 - weights.number(optimizer.beta2) ** step)).op("Sqrt") + optimizer.epsilon
    move = m / (1 - weights.number(optimizer.beta1) ** step) / corrected
    if optimizer.decay:
        decayed = [np.full(size, len(shape) > 1) for size, shape in zip(layout.sizes, layout.shapes, strict=True)]
        move = move + weights * weights.number(np.concatenate(decayed) * optimizer.decay)
    for name, tensor in ((NEXT[WEIGHTS], weights - rate * move), (NEXT[FIRST], m), (NEXT[SECOND], v), (NORM, norm)):
        _renamed(graph, tensor, name)
        shape = [] if name == NORM else [count]
        graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))


def _renamed(graph: onnx.GraphProto, tensor: Tensor, name: str) -> Tensor:
    """Give a tensor that a node computes another name."""
    rename(graph, {tensor.name: name})
    return tensor.builder.known(name, tensor.elem_type, tensor.shape)


def _input(graph: onnx.GraphProto, build: Builder, name: str, shape: Sequence[int]) -> Tensor:
    graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return build.known(name, onnx.TensorProto.FLOAT)
