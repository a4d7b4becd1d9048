#!/usr/bin/env python3
"""Cuts modules of torchvision and timm as plans cut their exports, and compares the two on random inputs.

    python tools/try_torch_state.py --out docs/howto/pytorch.md
    python tools/try_torch_state.py torchvision:resnet18 timm:vit_tiny_patch16_224

Needs torch, torchvision and timm; weights are random, with batch statistics of their own. Each module is exported,
pruned to 70 % of its multiply-accumulates by its weights alone, cut by `onnxcop.torch_state` and
`onnxcop.resize_module`, and run beside the pruned file. The table is written between two comments of the page,
`<!-- torch_state:begin -->` and `<!-- torch_state:end -->`.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from pages import write_table

import onnxcop

MODELS = (
    "torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:mobilenet_v3_small", "torchvision:vgg11_bn",
    "torchvision:densenet121", "torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x0_5",
    "torchvision:mnasnet0_5", "torchvision:efficientnet_b0", "torchvision:regnet_y_400mf",
    "torchvision:googlenet", "torchvision:alexnet", "timm:resnet10t", "timm:regnetx_002",
    "timm:vit_tiny_patch16_224", "timm:convnext_atto", "timm:mobilenetv3_small_050", "timm:efficientnet_lite0",
    "timm:ghostnet_050", "timm:repvgg_a0", "timm:edgenext_xx_small",
)  # fmt: skip
SIZE = 224
CLOSE = 1e-3  # relative difference of outputs that count as equal; both add up in single precision


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the table.

    Attributes:
        name: Of the model.
        parameters: Before and after.
        difference: Largest difference of the outputs over their largest value; None where the module was not cut.
        why: What stood in the way.
    """

    name: str
    parameters: tuple[int, int]
    difference: float | None
    why: str

    def row(self) -> str:
        """The row, in Markdown."""
        said = self.why if self.difference is None else f"{self.difference:.0e}"
        return f"| {self.name} | {self.parameters[0] / 1e6:.2f} M | {self.parameters[1] / 1e6:.2f} M | {said} |"


def main() -> int:
    """Parse the command line and run; returns how many modules that were cut differ from their files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="LIBRARY:MODEL", help="default: a set of both libraries")
    parser.add_argument("--out", type=Path, help="page whose table is written anew")
    parser.add_argument("--dynamo", action="store_true", help="export by torch.export, not TorchScript")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    outcomes = []
    for name in options.names or MODELS:
        outcomes.append(tried(name, options.dynamo))
        print(outcomes[-1].row(), flush=True)
    if options.out is not None:
        write(options.out, outcomes)
    return sum(one.difference is not None and one.difference > CLOSE for one in outcomes)


def tried(name: str, dynamo: bool) -> Outcome:
    """Export, prune and cut one model, and compare."""
    module = made(name)
    before = sum(p.numel() for p in module.parameters())
    example = torch.randn(2, 3, SIZE, SIZE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        try:
            torch.onnx.export(module, (example,), str(path), dynamo=dynamo, input_names=["x"], verbose=False)
            result = onnxcop.prune(
                path, macs=0.7, criterion="l2", recover="none", latency_seconds=0, limits=onnxcop.Limits(multiple_of=8),
                options=onnxcop.EngineOptions("cpu", 1),
            )  # fmt: skip
            found = onnxcop.torch_state(result.plan, module.state_dict(), path, result.model)
            if found.unplaced:
                return Outcome(name, (before, before), None, f"not placed: {found.unplaced[0]}")
            onnxcop.resize_module(module, found)
            with torch.no_grad():
                mine = module(example).numpy()
        except Exception as error:
            return Outcome(
                name, (before, before), None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            )
        pruned = Path(folder, "small.onnx")
        result.save(pruned)
        (theirs,) = ort.InferenceSession(str(pruned), providers=["CPUExecutionProvider"]).run(
            None, {"x": example.numpy()}
        )
    after = sum(p.numel() for p in module.parameters())
    return Outcome(name, (before, after), float(np.abs(mine - theirs).max() / np.abs(theirs).max()), "")


def made(name: str) -> Any:
    """A model with random weights and batch statistics, in evaluation mode."""
    library, _, model = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        module = timm.create_model(model, pretrained=False)
    else:
        import torchvision

        module = torchvision.models.get_model(model, weights=None)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    for values in module.parameters():
        if values.ndim == 1:  # zeros and ones of all layers would be one tensor of the export
            values.data.add_(0.1 * torch.rand_like(values))
    return module.eval()


def write(page: Path, outcomes: Sequence[Outcome]) -> None:
    """Put the table between the comments of a page."""
    head = "| model | parameters | pruned | largest difference of outputs |\n|---|---|---|---|\n"
    table = head + "\n".join(outcome.row() for outcome in outcomes)
    write_table(page, "torch_state", table)


if __name__ == "__main__":
    raise SystemExit(main())
