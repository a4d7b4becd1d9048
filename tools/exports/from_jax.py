"""Export of a Flax (NNX) network through jax2onnx.

python from_jax.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from flax import nnx
from jax import numpy as jnp
from jax2onnx import to_onnx


class Block(nnx.Module):
    """Convolution, BatchNorm with non-default statistics, and optionally ReLU."""

    def __init__(
        self, wide: int, out: int, side: int, rngs: nnx.Rngs, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        self.conv = nnx.Conv(wide, out, (side, side), stride, feature_group_count=groups, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(out, use_running_average=True, rngs=rngs)
        self.relu = relu
        one, two, three, four = jax.random.split(rngs.params(), 4)
        self.norm.scale.value = jax.random.uniform(one, (out,), minval=0.5, maxval=1.5)
        self.norm.bias.value = 0.2 * jax.random.normal(two, (out,))
        self.norm.mean.value = 0.2 * jax.random.normal(three, (out,))
        self.norm.var.value = jax.random.uniform(four, (out,), minval=0.5, maxval=1.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[N, H, W, wide]` to `[N, H / stride, W / stride, out]`."""
        x = self.norm(self.conv(x))
        return nnx.relu(x) if self.relu else x


class Convolutional(nnx.Module):
    """A residual block, a depthwise branch beside a pooled one, Concat and a linear head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = Block(3, 16, 3, rngs)
        self.first, self.second = Block(16, 16, 3, rngs), Block(16, 16, 3, rngs, relu=False)
        self.widen, self.depthwise = Block(16, 24, 1, rngs), Block(24, 24, 3, rngs, stride=2, groups=24)
        self.pooled = Block(16, 8, 1, rngs)
        self.fuse = Block(32, 24, 1, rngs)
        self.head = nnx.Linear(24, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[N, 16, 16, 3]` to `[N, 10]`."""
        x = self.stem(images)
        x = nnx.relu(x + self.second(self.first(x)))
        pooled = self.pooled(nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2)))
        x = self.fuse(jnp.concatenate([self.depthwise(self.widen(x)), pooled], axis=-1))
        return self.head(x.mean((1, 2)))


def main(folder: Path) -> None:
    """Write the export to a folder."""
    network = Convolutional(nnx.Rngs(0))
    network.eval()
    to_onnx(network, [("B", 16, 16, 3)], opset=21, return_mode="file", output_path=str(folder / "jax2onnx_flax.onnx"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
