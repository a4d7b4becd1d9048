"""Export of a PaddlePaddle network through paddle2onnx, whose weights sit in Constant nodes.

python from_paddle.py FOLDER
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import paddle
import paddle2onnx
from paddle import nn
from paddle.nn import functional

OPSET = 13


class Block(nn.Layer):
    """Convolution, BatchNorm with non-default statistics, and optionally ReLU."""

    def __init__(self, wide: int, out: int, side: int = 3, stride: int = 1, groups: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2D(wide, out, side, stride, side // 2, groups=groups, bias_attr=False)
        self.norm = nn.BatchNorm2D(out)
        self.relu = relu
        for tensor, low, high in (
            (self.norm.weight, 0.5, 1.5),
            (self.norm.bias, -0.3, 0.3),
            (self.norm._mean, -0.3, 0.3),
            (self.norm._variance, 0.5, 1.5),
        ):
            tensor.set_value(paddle.uniform([out], min=low, max=high))

    def forward(self, x: Any) -> Any:
        """`[N, wide, H, W]` to `[N, out, H / stride, W / stride]`."""
        x = self.norm(self.conv(x))
        return functional.relu(x) if self.relu else x


class Convolutional(nn.Layer):
    """A residual block with squeeze and excitation, a depthwise branch beside a pooled one, Concat
    and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block(3, 16)
        self.residual = nn.Sequential(Block(16, 16), Block(16, 16, relu=False))
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2D(1), nn.Conv2D(16, 8, 1), nn.ReLU(), nn.Conv2D(8, 16, 1), nn.Hardsigmoid()
        )
        self.depthwise = nn.Sequential(Block(16, 24, 1), Block(24, 24, 3, 2, groups=24))
        self.pooled = nn.Sequential(nn.MaxPool2D(2), Block(16, 8, 1))
        self.fuse = Block(32, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, images: Any) -> Any:
        """`[N, 3, 16, 16]` to `[N, 10]`."""
        x = self.stem(images)
        y = self.residual(x)
        x = functional.relu(x + y * self.gate(y))
        x = self.fuse(paddle.concat([self.depthwise(x), self.pooled(x)], axis=1))
        return self.head(paddle.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


def main(folder: Path) -> None:
    """Write the export to a folder."""
    paddle.seed(0)
    network = Convolutional()
    network.eval()
    inputs = [paddle.static.InputSpec([None, 3, 16, 16], "float32", "images")]
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "network"
        paddle.jit.save(paddle.jit.to_static(network, input_spec=inputs), str(saved))
        description = next(path for path in (saved.with_suffix(end) for end in (".json", ".pdmodel")) if path.exists())
        paddle2onnx.export(
            str(description),
            str(saved.with_suffix(".pdiparams")),
            str(folder / "paddle2onnx.onnx"),
            opset_version=OPSET,
            optimize_tool="None",  # which leaves the weights in Constant nodes
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
