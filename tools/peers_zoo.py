#!/usr/bin/env python3
"""Prunes every model of a zoo with onnxcop and with other tools, side by side.

    python tools/peers_zoo.py ZOO --peers PEERS/bin/python --out docs/peers   # peers.md, peers.csv

ZOO is a folder as tools/zoo.py reads it, and PEERS the environment that tools/peers.py describes.
Every tool ranks by the L2 norm, cuts equal shares of all layers that it can cut, and takes the
smallest share with which the multiply-accumulates fall within the budget; where they never do, the
model that it could make smallest counts. Every attempt is a process of its own with a time limit.

Whether a result is right does not rest on the word of any tool. The filters that it removed are
found by looking up the remaining weights in the original's; then the original with the columns of
the missing ones set to zero in all layers that read them must give the same outputs. `differs` is a
result that does not, `inexact` one of onnxcop's whose report says so (a statistic such as a
LayerNorm runs over the pruned axis) and in which all other filters were proven, `unknown` one whose
filters cannot be found, or reach a sum of activations, where this check cannot set them to zero, and
`own` the same where onnxcop, which knows what it removed, has proven it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import peers
import peers_files
from onnx import numpy_helper
from zoo import fill, model_files, nearest_selection

Array = npt.NDArray[Any]

OURS = "onnxcop"
TOOLS = (OURS, "onnxsim-l2", "torch-pruning-local")
SQUASHING = ("HardSigmoid", "Identity", "Sigmoid", "Softmax", "Tanh")
INTRODUCTION = """# Beside other tools

`tools/peers_zoo.py` writes this page. Every tool prunes real models and filled skeletons of published architectures,
with the L2 norm and equal shares of all layers that it can cut, to 70 % of the multiply-accumulates. Models with over
200 MB of weights are left out. *Results* counts models in which at least one layer lost filters. *Run* counts those
that ONNX Runtime runs with outputs of the original's shapes.

The check finds the missing filters by looking up the remaining weights in the original's. It sets these filters to
zero in the original, wherever they are read, and compares the outputs. *Equal* means that they are the same, and
*differ* that they are not. *Unknown* means that the filters cannot be found, or are summed by something other than
stored weights. onnxcop knows what it removed. *Own* are results that it has proven and this check cannot judge.
*Inexact* are results in which a statistic (LayerNorm) runs over pruned channels; the other filters are proven. Convs
cut are those of results that are not known to be wrong. Seconds include every try for the budget and, with onnxcop,
the proof. They were measured on a shared machine of two cores.

Only layers of the main graph count, so a model that lies in the branches of an If has none here;
[coverage](coverage.md) has it. Torch-Pruning had up to 480 s for a try. It works on what onnx2torch converts, which
has no converter for most operators of PyTorch's new exporter (*dynamo*). *Behind* names models that another tool cuts
more of. With onnxcop, a layer loses no filter if its share is less than one filter; others round up.
"""
SUMS = ("Einsum", "GRU", "LSTM", "RNN", "ReduceSum")
TOLERANCE = 1e-4  # of the largest absolute value of an output
NEAR = 0.01  # other tools try no further when they are this close below the budget
STEPS = 10  # of the bisection for the share that onnxcop cuts of every group


@dataclass
class Row:
    """One tool's result on one model.

    Attributes:
        model: File name without its suffix.
        tool: One of TOOLS.
        convs: Convolutions in the main graph with stored weights.
        convs_cut: How many of them lost filters.
        layers: The same with Gemm, MatMul and ConvTranspose.
        layers_cut: How many of them lost filters.
        filters_cut: Filters that all layers lost.
        macs: Fraction of the multiply-accumulates kept.
        loads: Whether ONNX Runtime runs it and gives outputs of the original's shapes.
        verdict: `equal`, `differs`, `inexact`, `own` or `unknown`; see the top of this file.
        seconds: The tool's own work: conversion, all tries for the budget, and proof where it gives one.
        error: Why there is no result, or what is wrong with it.
    """

    model: str
    tool: str
    convs: int | None = None
    convs_cut: int | None = None
    layers: int | None = None
    layers_cut: int | None = None
    filters_cut: int | None = None
    macs: float | None = None
    loads: bool = False
    verdict: str = ""
    seconds: float | None = None
    error: str = ""


# --- which filters a tool removed ---------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A node with stored weights, as `[filters, channels, taps]` with the order of axes that leads there."""

    node: int
    op: str
    weights: Array
    order: tuple[int, ...]
    shape: tuple[int, ...]


def layers(model: onnx.ModelProto) -> list[Layer]:
    """The layers of the main graph in its order."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            stored[node.output[0]] = node.attribute[0].t
        elif node.op_type in ("DequantizeLinear", "Identity") and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
    found = []
    for index, node in enumerate(model.graph.node):
        if node.op_type not in peers_files.MAC_OPS or node.input[1] not in stored:
            continue
        values = numpy_helper.to_array(stored[node.input[1]])
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        if node.op_type in ("Gemm", "MatMul") and values.ndim != 2:
            continue
        first = 0 if node.op_type == "Conv" or transposed else 1
        order = (first, 1 - first, *range(2, values.ndim))
        rotated = values.transpose(order)
        found.append(Layer(index, node.op_type, rotated.reshape(*rotated.shape[:2], -1), order, rotated.shape))
    return found


def origins(whole: Array, part: Array) -> tuple[Array, Array] | None:
    """Where the filters and channels of a cut weight were in the whole one.

    Args:
        whole: Weights of the original, [filters, channels, taps].
        part: What is left of them, fewer filters or channels.

    Returns:
        int64 [filters] and, for every filter, int64 [filters, channels] of `part`: positions in
        `whole`; None where they cannot be told.
    """
    if part.shape[2] != whole.shape[2] or part.size == 0 or not np.issubdtype(whole.dtype, np.floating):
        return None
    taps, sought = vectors(whole), vectors(part)
    values, place, count = np.unique(taps, return_index=True, return_counts=True)
    found = np.minimum(np.searchsorted(values, sought), len(values) - 1)
    if not np.array_equal(values[found], sought):
        return None
    place = np.where(count == 1, place, -1)[found].reshape(part.shape[:2])  # what occurs twice says nothing
    row, column = place // whole.shape[1], place % whole.shape[1]
    rows = np.where(place < 0, -1, row).max(axis=1)
    columns = np.where(place < 0, -1, column)
    columns = np.where(columns < 0, columns.max(axis=0), columns)
    if (rows < 0).any() or (columns < 0).any() or not np.array_equal(whole[rows[:, None], columns], part):
        return None
    return rows, columns


def vectors(weights: Array) -> Array:
    """The taps of every channel of every filter as one comparable value each."""
    flat = np.ascontiguousarray(weights + 0.0)  # one zero, not two
    if weights.shape[2] == 1:
        return flat.reshape(-1)
    return flat.reshape(-1, weights.shape[2]).view(np.dtype((np.void, flat.itemsize * weights.shape[2]))).reshape(-1)


def masked(reference: onnx.ModelProto, pruned: onnx.ModelProto) -> onnx.ModelProto | None:
    """The reference with the channels that `pruned` lacks set to zero wherever a layer reads them."""
    before, after = layers(reference), layers(pruned)
    if [layer.op for layer in before] != [layer.op for layer in after]:
        return None
    result = onnx.ModelProto()
    result.CopyFrom(reference)
    for old, new in zip(before, after, strict=True):
        if old.weights.shape == new.weights.shape and np.array_equal(old.weights, new.weights):
            continue
        found = origins(old.weights, new.weights)
        if found is None:
            return None
        rows, columns = found
        if columns.shape[1] == old.weights.shape[1]:
            continue
        values = old.weights.copy()
        for row, kept in zip(rows, columns, strict=True):
            values[row, np.setdiff1d(np.arange(values.shape[1]), kept)] = 0
        rotated = values.reshape(old.shape).transpose(np.argsort(old.order))
        name = f"masked_{old.node}"
        result.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(rotated), name))
        result.graph.node[old.node].input[1] = name
    return result


def verdict(reference: onnx.ModelProto, pruned: onnx.ModelProto) -> str:
    """Whether a result equals its masked original; see the top of this file."""
    expected = masked(reference, pruned)
    if expected is None:
        return "unknown"
    one, other = peers_files.session(unsquashed(expected)), peers_files.session(unsquashed(pruned))
    worst = 0.0
    for seed in (0, 1):
        feeds = peers_files.example(reference, seed)
        for wanted, given in zip(one.run(None, feeds), other.run(None, feeds), strict=True):
            if not np.array_equal(np.isfinite(wanted), np.isfinite(given)):
                return "differs"
            right = np.nan_to_num(wanted)
            scale = max(float(np.abs(right).max(initial=0)), 1e-30)
            worst = max(worst, float(np.abs(right - np.nan_to_num(given)).max(initial=0)) / scale)
    if worst <= TOLERANCE:
        return "equal"
    return "unknown" if sums_of_activations(reference) else "differs"


def sums_of_activations(model: onnx.ModelProto) -> bool:
    """Whether anything but stored weights sums over channels, which `masked` cannot set to zero there."""
    known = {layer.node for layer in layers(model)}
    products = [n for i, n in enumerate(model.graph.node) if n.op_type in ("Gemm", "MatMul") and i not in known]
    return bool(products) or any(node.op_type in SUMS for node in model.graph.node)


def unsquashed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with logits as outputs in place of probabilities, of whose small values the last bits are noise."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    for index, value in enumerate(model.graph.output):
        name = value.name
        while name in makers and makers[name].op_type in SQUASHING:
            name = makers[name].input[0]
        if name != value.name:
            result.graph.output[index].CopyFrom(onnx.ValueInfoProto(name=name))
    return result


def tally(row: Row, reference: onnx.ModelProto, pruned: onnx.ModelProto) -> None:
    """Count what was cut."""
    before, after = layers(reference), layers(pruned)
    row.convs, row.layers = sum(layer.op == "Conv" for layer in before), len(before)
    if [layer.op for layer in before] != [layer.op for layer in after]:
        return
    lost = [old.weights.shape[0] - new.weights.shape[0] for old, new in zip(before, after, strict=True)]
    row.convs_cut = sum(count > 0 and layer.op == "Conv" for count, layer in zip(lost, before, strict=True))
    row.layers_cut, row.filters_cut = sum(count > 0 for count in lost), sum(lost)


# --- one attempt --------------------------------------------------------------------------------


def usual_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Sizes of dynamic inputs with which a model runs, as onnxcop's analysis finds them."""
    import onnxcop

    try:
        return {name: tuple(shape) for name, shape in onnxcop.analyze(path).input_shapes.items()}
    except onnxcop.OnnxcopError:
        return {}


def attempt(path: Path, tool: str, macs: float) -> Row:
    """Prune one model with one tool and judge the result."""
    row = Row(path.stem, tool)
    model = onnx.load(path)
    started = time.perf_counter()
    inexact = False
    try:
        base = peers_files.count_macs(model)
        if not base:
            raise ValueError("no layers in the main graph")
        if tool == OURS:
            pruned, inexact = ours(model, macs)
        else:
            outcome = peers.Outcome(tool, "", macs)
            cut = peers.partition(tool, model, [])
            made = peers.bisect(cut, base, outcome, NEAR)
            row.error = outcome.error
            if made is None:
                return row
            pruned = made
        row.seconds = round(time.perf_counter() - started, 2)
        reference = cut(0.0).model if tool.startswith("torch") else model
        row.macs = peers_files.count_macs(pruned) / base
        tally(row, reference, pruned)
        failure = peers_files.load_failure(model, pruned)
        row.loads = not failure
        row.error = "; ".join(filter(None, (row.error, failure)))
        if row.loads and row.macs < 1:
            row.verdict = verdict(reference, pruned)
        if inexact and row.verdict in ("differs", "unknown"):
            row.verdict = "inexact"
        elif tool == OURS and row.verdict == "unknown":
            row.verdict = "own"
    except Exception as error:  # whatever goes wrong is this table's subject
        row.error = "; ".join(filter(None, (row.error, peers_files.one_line(error))))
    return row


def ours(model: onnx.ModelProto, macs: float) -> tuple[onnx.ModelProto, bool]:
    """onnxcop's result, proven by itself, and whether filters under a statistic are among those cut."""
    import onnxcop
    from onnxcop.criteria.registry import criterion_named

    analysis = onnxcop.analyze(model)
    context = onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost)
    ranking = criterion_named("l2").rank(context)
    low, high, best = 0.0, 1.0, None
    for _ in range(STEPS):
        share = (low + high) / 2
        try:
            limits = onnxcop.Limits(max_cut=share)
            best = onnxcop.choose(context, ranking, onnxcop.Budget(macs=macs), limits)
            high = share
        except onnxcop.OnnxcopError:
            low = share
    if best is None:
        best = nearest_selection(context, criterion_named("l2"), macs)
    removed = np.sort(best.removed)
    pruned = onnxcop.apply(analysis.model, analysis.structure, removed)
    return pruned, onnxcop.verify(analysis.model, pruned, analysis.structure, removed).inexact_units > 0


# --- all of them --------------------------------------------------------------------------------


def run_all(options: argparse.Namespace) -> list[Row]:
    """Every tool on every chosen model; rows of an earlier run that are not run again stay."""
    table = options.out.with_name(options.out.name + ".csv")
    rows = {(row.model, row.tool): row for row in (read_csv(table) if table.exists() else [])}
    for path in model_files(options.zoo, options.match):
        with tempfile.TemporaryDirectory() as folder:
            filled = Path(folder) / path.name
            model = onnx.load(path)
            size = sum(math.prod(tensor.dims) for tensor in model.graph.initializer) * 4 / 1e6
            if size <= options.largest:
                onnx.save(fill(options.zoo, model) if path.parent.name == "skeletons" else model, filled)
                options.shapes = json.dumps(usual_shapes(filled))
            for tool in options.tool or TOOLS:
                if size > options.largest:
                    row = Row(path.stem, tool, error=f"left out: {size:.0f} MB of weights")
                else:
                    row = run_child(filled, tool, options)
                rows[path.stem, tool] = row
                print(json.dumps(dataclasses.asdict(row)), flush=True)
        ordered = [rows[key] for key in sorted(rows)]
        with table.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in ordered)
        options.out.with_name(options.out.name + ".md").write_text(markdown(ordered))
    return list(rows.values())


def run_child(path: Path, tool: str, options: argparse.Namespace) -> Row:
    """One attempt in a process of its own."""
    python = sys.executable if tool == OURS else str(options.peers)
    command = [python, __file__, str(options.zoo), "--one", str(path), "--tool", tool, "--macs", str(options.macs)]
    command += ["--shapes", options.shapes]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=options.timeout, env=environment
        )
        return Row(**json.loads(done.stdout.strip().splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return Row(path.stem, tool, error=f"no result within {options.timeout:g} s")
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return Row(path.stem, tool, error=f"exit status {done.returncode}: {last}"[:300])


def read_csv(path: Path) -> list[Row]:
    """Read the result of an earlier run."""
    rows = []
    with path.open(newline="") as stream:
        for entry in csv.DictReader(stream):
            values: dict[str, Any] = dict(entry)
            for name in ("convs", "convs_cut", "layers", "layers_cut", "filters_cut"):
                values[name] = int(entry[name]) if entry[name] else None
            for name in ("macs", "seconds"):
                values[name] = float(entry[name]) if entry[name] else None
            values["loads"] = entry["loads"] == "True"
            rows.append(Row(**values))
    return rows


def sound(row: Row) -> bool:
    """Whether a row is a result that may be used: it runs, and nothing shows it to be wrong."""
    return row.loads and row.verdict != "differs" and bool(row.layers_cut)


def shortfall(rows: dict[str, Row]) -> str:
    """How onnxcop falls short on a model; empty if it leads."""
    own = rows[OURS]
    found = []
    for tool, row in rows.items():
        if tool == OURS or not sound(row):
            continue
        if not sound(own):
            found.append(f"{tool} has a result")
        elif (row.convs_cut or 0) > (own.convs_cut or 0):
            found.append(f"{tool} cuts {row.convs_cut} convs, onnxcop {own.convs_cut}")
        elif (row.layers_cut or 0) > (own.layers_cut or 0):
            found.append(f"{tool} cuts {row.layers_cut} layers, onnxcop {own.layers_cut}")
    return "; ".join(found)


def markdown(rows: list[Row]) -> str:
    """The summary by tool, and a line per model."""
    models: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if not row.error.startswith("left out"):
            models[row.model][row.tool] = row
    lines = [
        INTRODUCTION,
        "| tool | models | results | run | equal | own | inexact | unknown | differ | convs cut | seconds, median |",
    ]
    lines.append("|" + "---|" * 11)
    for tool in TOOLS:
        own = [row for row in rows if row.tool == tool and row.model in models]
        words = [row.verdict for row in own]
        results = [row for row in own if row.layers_cut]
        counts = [len(own), len(results), sum(row.loads for row in results)]
        counts += [words.count(word) for word in ("equal", "own", "inexact", "unknown", "differs")]
        cut = sum(row.convs_cut or 0 for row in own if sound(row))
        times = [row.seconds for row in own if row.seconds is not None]
        middle = f"{np.median(times):.1f}" if times else ""
        lines.append(f"| {tool} | {' | '.join(map(str, counts))} | {cut} | {middle} |")
    lines += ["", "| model | convs | " + " | ".join(TOOLS) + " | behind |", "|" + "---|" * (3 + len(TOOLS))]
    for name, by_tool in models.items():
        convs = max((row.convs or 0 for row in by_tool.values()), default=0)
        cells = [cell(by_tool.get(tool)) for tool in TOOLS]
        behind = shortfall(by_tool) if OURS in by_tool else ""
        lines.append(f"| {name} | {convs} | {' | '.join(cells)} | {behind} |")
    return "\n".join(lines) + "\n"


def cell(row: Row | None) -> str:
    """`12 convs, 40/50 layers, MACs 70%, equal, 1.2 s`, or why not."""
    if row is None:
        return "not tried"
    if row.macs is None:
        return "error: " + row.error.replace("|", "/")[:60]
    if row.layers_cut == 0:
        return f"cuts nothing, {row.seconds:.1f} s"
    words = [f"{'?' if row.convs_cut is None else row.convs_cut} convs"]
    words.append(f"{'?' if row.layers_cut is None else row.layers_cut}/{row.layers} layers")
    words += [f"MACs {row.macs:.0%}", row.verdict or "does not run", f"{row.seconds:.1f} s"]
    return ", ".join(words)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("zoo", type=Path, help="folder of the zoo")
    parser.add_argument("--peers", type=Path, help="Python of the environment of the other tools")
    parser.add_argument("--out", type=Path, default=Path("peers"), help="tables OUT.md and OUT.csv")
    parser.add_argument("--match", action="append", default=[], help="names to run, as patterns")
    parser.add_argument("--tool", choices=TOOLS, action="append", help="default: all")
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--timeout", type=float, default=120, help="seconds per attempt")
    parser.add_argument("--largest", type=float, default=200, help="MB of weights above which a model is left out")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the child process
    parser.add_argument("--shapes", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is None:
        run_all(options)
        return
    warnings.simplefilter("ignore")
    stdout, sys.stdout = sys.stdout, sys.stderr  # the tools print; the answer alone goes out
    peers_files.GIVEN_SHAPES.update({name: tuple(shape) for name, shape in json.loads(options.shapes).items()})
    row = attempt(options.one, options.tool[0], options.macs)
    print(json.dumps(dataclasses.asdict(row)), file=stdout)


if __name__ == "__main__":
    main()
