"""Exports by PyTorch: both exporters, and the TorchScript one at old opsets.

python from_torch.py FOLDER
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

# BatchNorm stays a node of its own by this mode, and is folded into the convolutions by the other.
APART, FOLDED = torch.onnx.TrainingMode.PRESERVE, torch.onnx.TrainingMode.EVAL
OLD = (
    *(("convolutional", 7, APART), ("convolutional", 9, FOLDED), ("convolutional", 12, APART)),
    *(("decoder", 7, APART), ("decoder", 9, APART), ("decoder", 10, FOLDED), ("decoder", 11, FOLDED)),
    *(("attention", 8, FOLDED), ("attention", 11, FOLDED)),
)


class Block(nn.Sequential):
    """Convolution, BatchNorm with non-default statistics, and optionally ReLU."""

    def __init__(self, wide: int, out: int, side: int = 3, stride: int = 1, groups: int = 1, relu: bool = True) -> None:
        conv = nn.Conv2d(wide, out, side, stride, side // 2, groups=groups, bias=False)
        norm = nn.BatchNorm2d(out)
        super().__init__(conv, norm, *[nn.ReLU()] * relu)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)


class Convolutional(nn.Module):
    """A residual block, a depthwise branch beside a pooled one, Concat and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block(3, 16)
        self.residual = nn.Sequential(Block(16, 16), Block(16, 16, relu=False))
        self.depthwise = nn.Sequential(Block(16, 24, 1), Block(24, 24, 3, 2, groups=24))
        self.pooled = nn.Sequential(nn.MaxPool2d(2), Block(16, 8, 1))
        self.fuse = Block(32, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, 3, 16, 16]` to `[N, 10]`."""
        x = self.stem(images)
        x = functional.relu(x + self.residual(x))
        x = self.fuse(torch.cat([self.depthwise(x), self.pooled(x)], 1))
        return self.head(x.mean((2, 3)))


class Decoder(nn.Module):
    """Operators that changed their form between opsets: Split, Pad, Slice, Upsample, Clip, Squeeze and Unsqueeze."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = Block(3, 16, stride=2), Block(8, 12, stride=2)
        self.skip = Block(8, 6, 1, relu=False)
        self.up = nn.ConvTranspose2d(18, 8, 2, 2)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, 3, 16, 16]` to a map `[N, 16, 16]`."""
        value, gate = self.stem(images).chunk(2, 1)
        x = value * torch.sigmoid(gate)
        deep = self.down(functional.pad(x, (0, 1, 1, 0)))[:, :, :4, :4]
        deep = functional.interpolate(deep, size=(8, 8), mode="nearest")
        weight = torch.softmax(deep.mean((2, 3)), 0).unsqueeze(2).unsqueeze(3)
        x = torch.cat([deep * weight, self.skip(x)], 1)
        return self.last(functional.relu6(self.up(x))).squeeze(1)


class Attention(nn.Module):
    """Self-attention with one layer for query, key and value."""

    def __init__(self, width: int, heads: int, written_out: bool) -> None:
        super().__init__()
        self.heads, self.written_out = heads, written_out
        self.fused, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, tokens, width]` to the same."""
        batch, tokens, width = x.shape
        query, key, value = (
            self.fused(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        if self.written_out:
            scores = query @ key.transpose(2, 3) / (width // self.heads) ** 0.5
            mixed = torch.softmax(scores, -1) @ value
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Transformer(nn.Module):
    """Patches as tokens, one pre-norm block, and a linear head on their mean."""

    def __init__(self, width: int = 24, heads: int = 3, written_out: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, written_out))
        self.hidden = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU("tanh" if written_out else "none"),
            nn.Linear(2 * width, width),
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """`[N, 3, 16, 16]` to `[N, 10]`."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = x + self.attention(x)
        x = x + self.hidden(x)
        return self.head(x.mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": Convolutional,
    "decoder": Decoder,
    "transformer": Transformer,
    "attention": partial(Transformer, written_out=True),  # for opsets before the fused operator could be exported
}


def network(name: str) -> nn.Module:
    """The network of a name, with seeded weights, ready for inference."""
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the stack traces of its export, which name files of the machine that made it."""
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key != "pkg.torch.onnx.stack_trace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    return model


def main(folder: Path) -> None:
    """Write every export to a folder."""
    warnings.simplefilter("ignore")
    images = torch.randn(2, 3, 16, 16)
    names = {"input_names": ["images"], "output_names": ["scores"]}
    old = names | {"dynamo": False, "dynamic_axes": {"images": {0: "batch"}, "scores": {0: "batch"}}}
    for name in ("convolutional", "transformer"):
        file = str(folder / f"torchscript_{name}.onnx")
        torch.onnx.export(network(name), (images,), file, opset_version=17, **old)
        batch = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(network(name), (images,), dynamo=True, dynamic_shapes=batch, verbose=False, **names)
        onnx.save(without_traces(program.model_proto), folder / f"torchexport_{name}.onnx")
    for name, opset, mode in OLD:
        fixed = {"dynamic_axes": None} if name == "decoder" else {}  # Upsample is exported for known sizes only
        torch.onnx.export(
            network(name),
            (images,),
            str(folder / f"opset{opset:02}_{name}.onnx"),
            opset_version=opset,
            keep_initializers_as_inputs=True,
            training=mode,
            **(old | fixed),
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
