"""The networks of the COP paper as graphs, with random weights and optionally narrower layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Weight = np.ndarray[Any, Any]

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0 is a pooling
MOBILENET = (  # output channels and stride of every depthwise separable layer
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1),
    (1024, 2), (1024, 1),
)  # fmt: skip


@dataclass
class Builder:
    """A graph that grows layer by layer; a layer's weights are called like it, with `.w` and `.b`."""

    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)

    def _stored(self, name: str, *shape: int) -> str:
        rng = np.random.default_rng([self.seed, *name.encode()])
        self.weights[name] = (rng.standard_normal(shape, np.float32) * 0.05).astype(np.float32)
        return name

    def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node whose output is called like it."""
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def conv(self, x: str, name: str, into: int, out: int, *, size: int = 3, stride: int = 1, groups: int = 1) -> str:
        """A convolution with a bias, padded to keep the size."""
        stored = [self._stored(f"{name}.w", out, into // groups, size, size), self._stored(f"{name}.b", out)]
        pads, strides = [size // 2] * 4, [stride] * 2
        return self.node("Conv", [x, *stored], name, pads=pads, strides=strides, group=groups)

    def normalized_relu(self, x: str, name: str, channels: int) -> str:
        """BatchNormalization with parameters near one and zero, and a Relu."""
        stored = [self._stored(f"{name}.{part}", channels) for part in ("scale", "shift", "mean", "variance")]
        for part in (stored[0], stored[3]):
            self.weights[part] = np.abs(1 + 4 * self.weights[part])
        return self.relu(self.node("BatchNormalization", [x, *stored], name))

    def relu(self, x: str) -> str:
        """A Relu."""
        return self.node("Relu", [x], f"{x}.relu")

    def dense(self, x: str, name: str, into: int, out: int) -> str:
        """A linear layer."""
        stored = [self._stored(f"{name}.w", out, into), self._stored(f"{name}.b", out)]
        return self.node("Gemm", [x, *stored], name, transB=1)

    def pooled(self, x: str) -> str:
        """Mean over positions, as a vector."""
        return self.node("Flatten", [self.node("GlobalAveragePool", [x], "pool")], "flat")

    def model(self, y: str, size: tuple[int, ...], classes: int) -> onnx.ModelProto:
        """The finished model, from one sample `x` to `y`."""
        graph = helper.make_graph(
            self.nodes, "paper",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *size])],
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, classes])],
            [numpy_helper.from_array(values, name) for name, values in self.weights.items()],
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def vgg16(size: int = 32, divide: int = 1, seed: int = 0) -> onnx.ModelProto:
    """VGG-16 as used on CIFAR: thirteen convolutions conv1_1 … conv5_3, a hidden linear layer, ten classes."""
    b, x, channels, block, number = Builder(seed), "x", 3, 1, 1
    for width in VGG16:
        if width:
            x = b.relu(b.conv(x, f"conv{block}_{number}", channels, width // divide))
            channels, number = width // divide, number + 1
        else:
            x = b.node("MaxPool", [x], f"pool{block}", kernel_shape=[2, 2], strides=[2, 2])
            block, number = block + 1, 1
    hidden = b.relu(b.dense(b.pooled(x), "hidden", channels, channels))
    return b.model(b.dense(hidden, "classes", channels, 10), (3, size, size), 10)


def resnet32(size: int = 32, seed: int = 0, *, shortcut_last: bool = False) -> onnx.ModelProto:
    """ResNet-32: three stages of five blocks, with a 1×1 projection at changes of width.

    Args:
        size: Of the pictures.
        seed: Of the weights.
        shortcut_last: Write a projection after the block's convolutions instead of before them.
    """
    b, channels = Builder(seed), 16
    x = b.relu(b.conv("x", "stem", 3, channels))
    for stage, width in enumerate((16, 32, 64)):
        for block in range(5):
            name, stride = f"s{stage}b{block}", 2 if stage and not block else 1
            projects, shortcut = channels != width, x
            if projects and not shortcut_last:
                shortcut = b.conv(x, f"{name}.short", channels, width, size=1, stride=stride)
            inner = b.relu(b.conv(x, f"{name}.one", channels, width, stride=stride))
            inner = b.conv(inner, f"{name}.two", width, width)
            if projects and shortcut_last:
                shortcut = b.conv(x, f"{name}.short", channels, width, size=1, stride=stride)
            x, channels = b.relu(b.node("Add", [inner, shortcut], f"{name}.sum")), width
    return b.model(b.dense(b.pooled(x), "classes", channels, 10), (3, size, size), 10)


def resnet_before_activation(widths: tuple[int, ...] = (8, 16, 32), blocks: int = 3, seed: int = 0) -> onnx.ModelProto:
    """ResNet with normalization and Relu before its convolutions, and a projection at the head of every stage."""
    b, channels = Builder(seed), widths[0]
    x = b.conv("x", "stem", 3, channels)
    for stage, width in enumerate(widths):
        for block in range(blocks):
            name, stride = f"s{stage}b{block}", 2 if stage and not block else 1
            inner = b.conv(b.normalized_relu(x, f"{name}.bn1", channels), f"{name}.one", channels, width, stride=stride)
            inner = b.conv(b.normalized_relu(inner, f"{name}.bn2", width), f"{name}.two", width, width)
            if not block:
                x = b.conv(x, f"{name}.short", channels, width, size=1, stride=stride)
            x, channels = b.node("Add", [inner, x], f"{name}.sum"), width
    pooled = b.pooled(b.normalized_relu(x, "bn", channels))
    return b.model(b.dense(pooled, "classes", channels, 10), (3, 32, 32), 10)


def mobilenet(
    size: int = 32, divide: int = 1, seed: int = 0, *, strides: tuple[int, ...] | None = None
) -> onnx.ModelProto:
    """MobileNet v1: a stem, then depthwise (`dwN`) and pointwise (`pwN`) convolutions in turn."""
    b, channels = Builder(seed), 32 // divide
    x = b.relu(b.conv("x", "stem", 3, channels))
    for number, (width, usual) in enumerate(MOBILENET):
        stride = usual if strides is None else strides[number]
        x = b.relu(b.conv(x, f"dw{number}", channels, channels, stride=stride, groups=channels))
        x = b.relu(b.conv(x, f"pw{number}", channels, width // divide, size=1))
        channels = width // divide
    return b.model(b.dense(b.pooled(x), "classes", channels, 10), (3, size, size), 10)


def dense_chain(widths: tuple[int, ...], seed: int = 0) -> onnx.ModelProto:
    """Linear layers `fc0`, `fc1`, … with Relus between; `widths` from the inputs to the classes."""
    b, x = Builder(seed), "x"
    for number, (into, out) in enumerate(pairwise(widths)):
        x = b.dense(x, f"fc{number}", into, out)
        x = b.relu(x) if number < len(widths) - 2 else x
    return b.model(x, widths[:1], widths[-1])


def changed(model: onnx.ModelProto, **weights: Weight) -> onnx.ModelProto:
    """A copy of a model with some weights replaced; a dot in a name is written as two underscores."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        values = weights.get(tensor.name.replace(".", "__"))
        if values is not None:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return copy


def weights_of(model: onnx.ModelProto) -> dict[str, Weight]:
    """All stored tensors by name, in double precision."""
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}


def reference_networks() -> dict[str, onnx.ModelProto]:
    """Three narrow networks of the paper, some of whose kernels are as small as the reference's ε, or zero."""
    strides = (1, 1, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)  # for pictures of 32 pixels
    models = {
        "vgg16": vgg16(divide=8),
        "resnet": resnet_before_activation(),
        "mobilenet": mobilenet(divide=16, strides=strides),
    }
    chosen = {"vgg16": "conv3_2", "resnet": "s1b1.one", "mobilenet": "pw5"}
    for name, layer in chosen.items():
        kernel = weights_of(models[name])[f"{layer}.w"]
        kernel[:, 1] *= 1e-3
        kernel[:, 3] *= 1e-4
        kernel[:, 5] = 0.0
        models[name] = changed(models[name], **{f"{layer}.w".replace(".", "__"): kernel})
    return models
