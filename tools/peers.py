"""Prunes ONNX files with other people's tools, for a side-by-side comparison.

The tools are onnxsim's structured pruning (L1, L2 and Wanda) and Torch-Pruning, which an ONNX
file reaches through onnx2torch and leaves through the TorchScript exporter. They live in an
environment of their own, since the package needs none of them:

    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0
    peers/bin/pip install onnxsim==0.8.1 onnx onnxruntime onnxscript numpy pillow
    peers/bin/pip install --no-deps onnx2torch==1.5.15 torch-pruning==1.6.1

(`--no-deps`: both want torchvision, of which onnx2torch uses two detection operators and
Torch-Pruning nothing; this script puts an empty module in its place.) Then

    peers/bin/python tools/peers.py prune --tool onnxsim-l2 MODEL.onnx -o OUT.onnx --macs 0.7
    peers/bin/python tools/peers.py accuracy OUT.onnx --kind cifar10 --against MODEL.onnx
    peers/bin/python tools/peers.py table -o peers.csv cifar_resnet20:0.7,0.5 digit_cnn:0.7

The tools take a ratio of channels, not a budget, so `prune` bisects the ratio for the largest
model whose MACs are within the budget, and prints one JSON line. A name that ends in `-global`
ranks the channels of all layers together, one in `-local` cuts the same share of every layer;
without an ending it is the tool's own default (onnxsim: local) or usual use (Torch-Pruning:
global). The pictures are looked for in the folder that ONNXCOP_ZOO names, else in
../shared/zoo beside the repository.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.machinery
import importlib.metadata
import io
import json
import math
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from peers_files import (
    BATCH,
    CALIB_DATA,
    EVAL_DATA,
    KINDS,
    REPOSITORY,
    ZOO,
    Feeds,
    accuracy,
    conv_widths,
    convs_cut,
    count_macs,
    count_params,
    example,
    fixed_shapes,
    load_failure,
    load_samples,
    one_line,
)

TOOLS = (
    "onnxsim-l2",
    "onnxsim-l1",
    "onnxsim-wanda",
    "torch-pruning",
    "onnxsim-l2-global",
    "onnxsim-l1-global",
    "onnxsim-wanda-global",
    "torch-pruning-local",
)
TRIES = 14  # bisection steps: 2**-14 is less than one channel of any network here
NEAR = 1e-3  # a budget met this closely needs no further step
COLUMNS = (
    *("tool", "model", "macs_target", "macs_kept", "params_kept", "accuracy"),
    *("base_accuracy", "agreement", "convs_cut", "convs", "seconds", "seconds_once"),
    *("error", "note"),
)


# --- the tools ---------------------------------------------------------------------------------


class Cut(NamedTuple):
    """A pruned model and anything worth telling about how the tool came by it."""

    model: onnx.ModelProto
    note: str = ""


GraphPartition = Callable[[float], Cut]


def onnxsim_cutter(model: onnx.ModelProto, criterion: str, scope: str, batches: list[Feeds]) -> GraphPartition:
    """onnxsim's apply_structured_pruning, or its calibrated form for the Wanda criterion."""
    import onnxsim

    everywhere = scope == "global"

    def cut(ratio: float) -> Cut:
        if criterion == "wanda":
            pruned = onnxsim.apply_structured_wanda_pruning(
                model,
                calibration_data=batches or None,
                sparsity=ratio,
                global_sparsity=everywhere,
                providers=["CPUExecutionProvider"],
            )
        else:
            pruned = onnxsim.apply_structured_pruning(
                model, sparsity=ratio, importance_norm=criterion, global_sparsity=everywhere
            )
        return Cut(pruned)

    return cut


def without_torchvision() -> None:
    """Stands in for torchvision, whose two operators onnx2torch imports whether used or not."""

    def absent(*_: Any, **__: Any) -> None:
        raise NotImplementedError("this operator needs torchvision")

    package, operators = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
    vars(operators).update(nms=absent, roi_align=absent, box_convert=absent)
    vars(package)["ops"] = operators
    for module in (package, operators):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules.setdefault(module.__name__, module)


def output_layers(network: Any) -> list[Any]:
    """The layers of a torch.fx module from which an output is reached through no other layer."""
    from torch import nn

    modules = dict(network.named_modules())
    waiting = list(next(n for n in network.graph.nodes if n.op == "output").all_input_nodes)
    seen, found = set(waiting), []
    while waiting:
        node = waiting.pop()
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)):
            found.append(module)
            continue
        waiting += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)
    return found


def unscorable_layers(network: Any, inputs: tuple[Any, ...], importance: Any) -> list[Any]:
    """The layers of every group at full width that Torch-Pruning's own importance fails on."""
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=inputs)
    failing: list[Any] = []
    for group in graph.get_all_groups():
        try:
            importance(group)
        except Exception:  # any failure means that this group is beyond the tool
            failing += [item.dep.target.module for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)]
    return failing


def torch_pruning_cutter(model: onnx.ModelProto, scope: str) -> GraphPartition:
    """Torch-Pruning's L2 magnitude pruner on the network that onnx2torch makes of the model.

    The layers of the outputs are left alone. When it fails otherwise, the model is simplified
    before the conversion, and groups that the tool cannot score are left alone; the note says so.
    """
    without_torchvision()
    import torch
    import torch_pruning
    from onnx2torch import convert

    source, simplified = model, ""
    try:
        convert(model)
    except Exception as error:  # whatever the converter trips over
        import onnxsim

        source, _ = onnxsim.simplify(model)
        simplified = f"simplified, since onnx2torch fails as it is ({one_line(error)})"
    feeds = example(model)
    inputs = tuple(torch.from_numpy(array) for array in feeds.values())
    importance = torch_pruning.importance.MagnitudeImportance(p=2)

    def step(ratio: float, skip: bool) -> tuple[Any, int]:
        network = convert(source).eval()
        left_out = unscorable_layers(network, inputs, importance) if skip else []
        pruner = torch_pruning.pruner.BasePruner(
            network,
            inputs,
            importance=importance,
            global_pruning=scope == "global",
            pruning_ratio=ratio,
            ignored_layers=output_layers(network) + left_out,
        )
        pruner.step()
        network(*inputs)  # a cut that does not fit fails here
        return network, len({id(m) for m in left_out if isinstance(m, torch.nn.Conv2d)})

    def cut(ratio: float) -> Cut:
        note = ""
        try:
            network, _ = step(ratio, skip=False)
        except Exception as error:  # the tool raises whatever the mismatch leads to
            network, count = step(ratio, skip=True)
            note = f"fails as it is ({one_line(error)}); done with {count} Conv layers left out"
        return Cut(export(network, inputs, model), "; ".join(filter(None, (simplified, note))))

    return cut


def export(network: Any, inputs: tuple[Any, ...], like: onnx.ModelProto) -> onnx.ModelProto:
    """The network as ONNX by the TorchScript exporter, names and dynamic axes as in `like`."""
    import torch

    feeds = fixed_shapes(like)
    ends = [value for value in like.graph.input if value.name in feeds] + list(like.graph.output)
    axes = {
        value.name: {
            axis: dim.dim_param or f"{value.name}_{axis}"
            for axis, dim in enumerate(value.type.tensor_type.shape.dim)
            if not dim.dim_value
        }
        for value in ends
    }
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            inputs,
            buffer,
            dynamo=False,
            opset_version=17,
            input_names=list(feeds),
            output_names=[value.name for value in like.graph.output],
            dynamic_axes={name: dims for name, dims in axes.items() if dims},
        )
    return onnx.load_from_string(buffer.getvalue())


def partition(tool: str, model: onnx.ModelProto, batches: list[Feeds]) -> GraphPartition:
    """The function from a ratio to a pruned model for a name in TOOLS."""
    if tool.startswith("torch-pruning"):
        return torch_pruning_cutter(model, "local" if tool.endswith("-local") else "global")
    criterion = tool.split("-")[1]
    return onnxsim_cutter(model, criterion, "global" if tool.endswith("-global") else "local", batches)


# --- commands ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """Result of one attempt; MACs and parameters as shares of the original's."""

    tool: str
    version: str
    macs_target: float
    macs_kept: float | None = None
    params_kept: float | None = None
    ratio: float | None = None
    seconds: float = 0.0
    seconds_once: float = 0.0
    convs: int = 0
    convs_cut: int | None = None
    loads: bool = False
    error: str = ""
    note: str = ""


def bisect(
    cut: GraphPartition,
    base: int,
    outcome: Outcome,
    near: float = NEAR,
    count: Callable[[onnx.ModelProto], int] = count_macs,
) -> onnx.ModelProto | None:
    """The largest model within the budget, else the smallest that the tool makes, else None.

    A ratio at which the tool fails counts as too high. Fills `outcome` in; `count` counts what is bounded.
    """

    def rank(kept: float) -> tuple[bool, float]:
        within = kept <= outcome.macs_target
        return within, kept if within else -kept

    low, high, failure = 0.0, 1.0, ""
    best: onnx.ModelProto | None = None
    best_kept = math.inf
    for _ in range(TRIES):
        ratio = (low + high) / 2
        started = time.perf_counter()
        try:
            pruned, note = cut(ratio)
            kept = count(pruned) / base
        except Exception as error:  # a tool may raise anything; the outcome tells it
            failure, high = one_line(error), ratio
            continue
        within = kept <= outcome.macs_target
        if rank(kept) > rank(best_kept):
            best, best_kept, outcome.ratio, outcome.note = pruned, kept, round(ratio, 5), note
            outcome.seconds_once = round(time.perf_counter() - started, 2)
        low, high = (low, ratio) if within else (ratio, high)
        if within and outcome.macs_target - kept < near:
            break
    if best is None:
        outcome.error = failure
    elif best_kept > outcome.macs_target:
        reason = f" ({failure})" if failure else ""
        outcome.error = f"reaches only {best_kept:.4f} of the MACs{reason}"
    return best


def calibration(path: Path | None, samples: int, model: onnx.ModelProto) -> list[Feeds]:
    """Batches of a calibration set for the model's first input; none without a path."""
    if path is None:
        return []
    images, _ = load_samples(path, samples)
    name, shape = next(iter(fixed_shapes(model).items()))
    fixed = next(v for v in model.graph.input if v.name == name).type.tensor_type.shape.dim[0]
    step = shape[0] if fixed.dim_value else BATCH
    return [{name: images[start : start + step]} for start in range(0, len(images), step)]


def prune(path: Path, out: Path, *, tool: str, macs: float, calib: Path | None, samples: int) -> Outcome:
    """Prunes the model at `path` to a share of its MACs and writes it to `out`, if anything."""
    package = "torch-pruning" if tool.startswith("torch-pruning") else "onnxsim"
    outcome = Outcome(tool, importlib.metadata.version(package), macs)
    model = onnx.load(path)
    outcome.convs = len(conv_widths(model))
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            batches = calibration(calib, samples, model) if "wanda" in tool else []
            pruned = bisect(partition(tool, model, batches), count_macs(model), outcome)
        except Exception as error:  # conversion and import failures are outcomes too
            outcome.error, pruned = one_line(error), None
    outcome.seconds = round(time.perf_counter() - started, 2)
    if pruned is not None:
        outcome.macs_kept = round(count_macs(pruned) / count_macs(model), 4)
        outcome.params_kept = round(count_params(pruned) / count_params(model), 4)
        outcome.convs_cut = convs_cut(model, pruned)
        failure = load_failure(model, pruned)
        outcome.loads = not failure
        outcome.error = "; ".join(filter(None, (outcome.error, failure)))
        onnx.save(pruned, out)
    return outcome


def run_self(*arguments: object) -> dict[str, Any]:
    """Runs this script with the arguments in a process of its own; its last line as JSON."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"error": f"exit status {done.returncode}: {last}"[:300]}


def table(cases: Sequence[str], tools: Sequence[str], out: Path, samples: int) -> None:
    """Writes a CSV of every tool on every case, a case being a zoo model and its budgets."""
    with out.open("w", newline="") as stream, tempfile.TemporaryDirectory() as folder:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for case in cases:
            name, _, budgets = case.partition(":")
            kind = KINDS[name]
            model = (REPOSITORY / "models" if kind == "digits" else ZOO / "trained") / f"{name}.onnx"
            for budget in budgets.split(","):
                for tool in tools:
                    pruned = Path(folder) / "pruned.onnx"
                    pruned.unlink(missing_ok=True)
                    options = ("--macs", budget, "--calib", CALIB_DATA[kind], "--samples", samples)
                    row = run_self("prune", "--tool", tool, model, "-o", pruned, *options)
                    row |= {"tool": tool, "model": name, "macs_target": budget}
                    if row.get("loads"):
                        row |= run_self("accuracy", pruned, "--kind", kind, "--against", model)
                    writer.writerow(row)
                    stream.flush()
                    print(json.dumps(row), flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    top = argparse.ArgumentParser(description=summary)
    commands = top.add_subparsers(dest="command", required=True)
    cut = commands.add_parser("prune", help="prune a model to a share of its MACs")
    cut.add_argument("model", type=Path)
    cut.add_argument("--tool", choices=TOOLS, required=True)
    cut.add_argument("-o", "--out", type=Path, required=True)
    cut.add_argument("--macs", type=float, required=True, help="largest share of MACs to keep")
    cut.add_argument("--calib", type=Path, help="pictures for the tools that calibrate")
    cut.add_argument("--samples", type=int, default=256, help="how many of them (default 256)")
    measure = commands.add_parser("accuracy", help="top-1 of a model")
    measure.add_argument("model", type=Path)
    measure.add_argument("--kind", choices=sorted(EVAL_DATA), required=True)
    measure.add_argument("--against", type=Path, help="the original, for the agreement with it")
    every = commands.add_parser("table", help="every tool side by side")
    every.add_argument("cases", nargs="+", metavar="MODEL:MACS[,MACS…]")
    every.add_argument("-o", "--out", type=Path, required=True)
    every.add_argument("--tool", choices=TOOLS, action="append", help="default: all")
    every.add_argument("--samples", type=int, default=256)
    return top


def main() -> None:
    """Runs the command that the arguments name."""
    given = parser().parse_args()
    if given.command == "prune":
        outcome = prune(
            given.model,
            given.out,
            tool=given.tool,
            macs=given.macs,
            calib=given.calib,
            samples=given.samples,
        )
        print(json.dumps(asdict(outcome)))
    elif given.command == "accuracy":
        print(json.dumps(accuracy(given.model, given.kind, given.against)))
    else:
        table(given.cases, given.tool or TOOLS, given.out, given.samples)


if __name__ == "__main__":
    main()
