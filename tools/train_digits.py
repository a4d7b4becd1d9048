"""Trains the residual network on handwritten digits that models/ ships, and exports it to ONNX.

The pictures are scikit-learn's digits: 1797 grey pictures of 8×8, part of that package. Run it
from the repository root, in an environment of its own (the package itself needs none of these):

    pip install torch==2.13.0 onnx onnxruntime scikit-learn
    python tools/train_digits.py --out models

It writes

    digits_resnet.onnx   opset 17, input "input" float32 [N, 1, 8, 8] scaled to 0..1,
                         output "logits" float32 [N, 10], BatchNorm folded into the convolutions
    digits_calib.npz     `input` float32 [512, 1, 8, 8] and `labels` int64 [512]: training pictures
    digits_test.npz      `input` float32 [360, 1, 8, 8] and `labels` int64 [360]: held out

and prints the numbers of models/README.md, measured on the files it wrote. Everything is seeded
and runs on one CPU thread; the same versions on the same kind of CPU give the same files.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

SEED = 20
WIDTHS = (12, 24, 48)
EPOCHS = 60
BATCH = 64
CALIBRATION_PICTURES = 512


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures float32 [n, 1, 8, 8] in 0..1 and their labels int64 [n]."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def save(self, path: Path) -> None:
        """Writes them as a compressed .npz with the keys `input` and `labels`."""
        np.savez_compressed(path, input=self.images, labels=self.labels)


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut: identity, or a 1×1 projection if shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H/stride, W/stride]."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """A stem, three stages of two blocks each, global average pooling, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTHS[0], 3, 1, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(WIDTHS[0])
        blocks: list[nn.Module] = []
        inputs = WIDTHS[0]
        for stage, outputs in enumerate(WIDTHS):
            blocks += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, 8, 8] to logits [N, 10]."""
        x = functional.relu(self.stem_norm(self.stem(x)))
        x = functional.adaptive_avg_pool2d(self.blocks(x), 1)
        logits: Tensor = self.head(torch.flatten(x, 1))
        return logits


def load_pictures() -> tuple[Pictures, Pictures, Pictures]:
    """Splits the digits into (training, calibration, test), stratified by label.

    Calibration pictures are a part of the training pictures; test pictures (a fifth of all) are
    never trained on.
    """
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=SEED)
    calibration, _ = train_test_split(train, train_size=CALIBRATION_PICTURES, stratify=labels[train], random_state=SEED)

    def pick(index: npt.NDArray[np.int64]) -> Pictures:
        return Pictures(images[index], labels[index])

    return pick(train), pick(calibration), pick(test)


def shift(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every image [n, 1, 8, 8] by -1, 0 or 1 pixels each way, filling with zeros."""
    padded = functional.pad(batch, (1, 1, 1, 1))
    moves = torch.randint(0, 3, (len(batch), 2), generator=generator).tolist()
    return torch.stack([picture[:, y : y + 8, x : x + 8] for picture, (y, x) in zip(padded, moves, strict=True)])


def train(pictures: Pictures) -> DigitsResNet:
    """Trains a network from scratch with SGD under a one-cycle schedule; returns it in eval mode.

    The training set only sets the weights: nothing is chosen on the test set.
    """
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(SEED)
    images, labels = torch.from_numpy(pictures.images), torch.from_numpy(pictures.labels)
    model = DigitsResNet().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = len(images) // BATCH  # the incomplete last batch is dropped
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=EPOCHS * steps)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for step in range(steps):
            index = order[step * BATCH : (step + 1) * BATCH]
            loss = functional.cross_entropy(model(shift(images[index], generator)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: training loss {total / steps:.4f}")
    return model.eval()


def export(model: DigitsResNet, path: Path) -> None:
    """Writes the network as ONNX with a dynamic batch `N`; the exporter folds BatchNorm."""
    torch.onnx.export(
        model,
        (torch.zeros(2, 1, 8, 8),),
        path,
        dynamo=False,  # the other exporter writes opset 18 and later
        opset_version=17,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
    )
    exported = onnx.load(path)
    onnx.checker.check_model(exported, full_check=True)
    if any(node.op_type == "BatchNormalization" for node in exported.graph.node):
        raise RuntimeError(f"{path}: the exporter left a BatchNormalization")


def count_parameters(path: Path) -> int:
    """The number of weights in the ONNX file."""
    return sum(math.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer)


def count_macs(path: Path) -> int:
    """Multiply-accumulates of the convolutions and the linear layer for one image."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.value_info, *model.graph.output]
    }
    macs = 0
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            positions = math.prod(shapes[node.output[0]][2:])
            macs += positions * math.prod(weights[node.input[1]])
    return macs


def accuracy(path: Path, pictures: Pictures) -> float:
    """The fraction of images that the ONNX file classifies correctly, run by ONNX Runtime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input": pictures.images})
    return float(np.mean(np.argmax(logits, axis=1) == pictures.labels))


def main() -> None:
    """Trains, exports, writes the data, and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    training, calibration, test = load_pictures()
    path = out / "digits_resnet.onnx"
    export(train(training), path)
    calibration.save(out / "digits_calib.npz")
    test.save(out / "digits_test.npz")
    print(f"parameters            {count_parameters(path):,}")
    print(f"MACs per picture      {count_macs(path):,}")
    print(f"accuracy, training    {accuracy(path, training):.4f} of {len(training.labels)}")
    print(f"accuracy, calibration {accuracy(path, calibration):.4f} of {len(calibration.labels)}")
    print(f"accuracy, test        {accuracy(path, test):.4f} of {len(test.labels)}")


if __name__ == "__main__":
    main()
