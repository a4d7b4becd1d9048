#!/usr/bin/env python3
"""Times training steps written as ONNX nodes against PyTorch's: the CPU time of one thread, in turns.

    python tools/bench_training.py ZOO                    # needs PyTorch
    python tools/bench_training.py ZOO --match 'vit*' --rounds 5

ZOO is the folder of the models. A step is forward, backward and AdamW, on the mean squared outputs. PyTorch runs
networks of its own with the same layers in eager mode: convolutions with biases, since the files hold no
normalization, and for the transformer its own encoder layers.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx

CASES = (
    ("cifar_resnet20", "trained/cifar_resnet20.onnx", 64, 32),
    ("mobilenet_v2", "trained/imagenet_mobilenet_v2.onnx", 16, 224),
    ("vit_tiny", "skeletons/vit_tiny_patch16_224.legacy.onnx", 16, 224),
)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--match", default="*")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| model | batch | onnxcop, CPU ms | PyTorch, CPU ms | ratio |\n|---|---|---|---|---|")
    for name, file, batch, size in CASES:
        if fnmatch.fnmatch(name, options.match):
            ours, theirs = onnx_step(options.zoo, options.zoo / file, batch, size), torch_step(name, batch, size)
            times: list[tuple[float, float]] = [(cpu_ms(ours), cpu_ms(theirs)) for _ in range(options.rounds + 1)][1:]
            a, b = (float(np.median(column)) for column in zip(*times, strict=True))
            print(f"| {name} | {batch} | {a:.0f} | {b:.0f} | {a / b:.2f} |", flush=True)
    return 0


def cpu_ms(step: Callable[[], Any]) -> float:
    """CPU milliseconds of this thread."""
    start = time.thread_time()
    step()
    return 1e3 * (time.thread_time() - start)


def onnx_step(zoo: Path, path: Path, batch: int, size: int) -> Callable[[], Any]:
    """A step of a file of the zoo."""
    from zoo import fill

    from onnxcop.runtime.session import EngineOptions
    from onnxcop.training.losses import with_loss
    from onnxcop.training.step import Optimizer, build_step
    from onnxcop.training.trainer import Trainer, TrainingState

    model = onnx.load(path)
    model = fill(zoo, model) if path.parent.name == "skeletons" else model
    output, source = model.graph.output[0].name, model.graph.input[0].name
    work = with_loss(model, {output: lambda y, t: ((y - t) * (y - t)).op("ReduceMean", keepdims=0)}, {output: (1, 2)})
    rng = np.random.default_rng(0)
    feeds = {source: rng.standard_normal((batch, 3, size, size)).astype(np.float32)}
    feeds[f"target/{output}"] = np.zeros((batch, 1000 if size > 32 else 10), np.float32)
    graph = build_step(work, Optimizer(), input_shapes={key: value.shape for key, value in feeds.items()})
    state = TrainingState.fresh(graph.layout.vector(work))
    trainer = Trainer(graph, state, EngineOptions("cpu", 1))
    return lambda: trainer.step(feeds, 1e-6)


def torch_step(name: str, batch: int, size: int) -> Callable[[], Any]:
    """A step of the same network in PyTorch."""
    import torch

    torch.set_num_threads(1)
    network = {"cifar_resnet20": resnet20, "mobilenet_v2": mobilenet_v2, "vit_tiny": vit_tiny}[name]()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
    images = torch.randn(batch, 3, size, size)

    def step() -> None:
        optimizer.zero_grad()
        (network(images) ** 2).mean().backward()
        optimizer.step()

    return step


def resnet20() -> Any:
    """ResNet-20 with shortcuts by slicing and padding (He et al. 2016)."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inside: int, outside: int, stride: int) -> None:
            super().__init__()
            self.one = nn.Conv2d(inside, outside, 3, stride, 1)
            self.two = nn.Conv2d(outside, outside, 3, 1, 1)
            self.stride, self.more = stride, outside - inside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            short = x
            if self.more:
                short = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))
            return torch.relu(self.two(torch.relu(self.one(x))) + short)

    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Block(a, b, 2 if a != b else 1) for a, b in pairwise(widths)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(64, 10))  # fmt: skip


def mobilenet_v2() -> Any:
    """MobileNetV2 without normalization, as the file holds it (Sandler et al. 2018, table 2)."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inside: int, outside: int, stride: int, expand: int) -> None:
            super().__init__()
            middle = inside * expand
            layers: list[nn.Module] = [nn.Conv2d(inside, middle, 1), nn.ReLU6()] if expand > 1 else []
            layers += [
                nn.Conv2d(middle, middle, 3, stride, 1, groups=middle),
                nn.ReLU6(),
                nn.Conv2d(middle, outside, 1),
            ]
            self.body, self.same = nn.Sequential(*layers), stride == 1 and inside == outside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.body(x) if self.same else self.body(x)

    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU6()]
    width = 32
    for expand, outside, count, stride in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
                                           (6, 160, 3, 2), (6, 320, 1, 1)):  # fmt: skip
        for number in range(count):
            layers.append(Block(width, outside, stride if number == 0 else 1, expand))
            width = outside
    return nn.Sequential(*layers, nn.Conv2d(320, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(1280, 1000))  # fmt: skip


def vit_tiny() -> Any:
    """ViT-Ti/16 (Touvron et al. 2021, table 1)."""
    import torch
    from torch import nn

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 192, 16, 16)
            self.token = nn.Parameter(torch.zeros(1, 1, 192))
            self.places = nn.Parameter(torch.zeros(1, 197, 192))
            layer = nn.TransformerEncoderLayer(192, 3, 768, 0.0, "gelu", batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, 12, nn.LayerNorm(192), enable_nested_tensor=False)
            self.head = nn.Linear(192, 1000)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.places
            return self.head(self.layers(tokens)[:, 0])

    return Vit()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
