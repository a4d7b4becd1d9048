"""What onnxsim's own recovery gives after its structured pruning: ridge regression, block training, normalization.

In the environment that `tools/peers.py` describes (onnxsim alone is enough):

    peers/bin/python tools/peers_recovery.py cifar_resnet20:0.9,0.7 nlp_minilm:0.9,0.8 -o recovery.csv

Every budget is met by bisection over the ratio of channels, as in `tools/peers.py`. Then the model is left as it
is, or goes through `apply_pruning_finetune` (ridge regression of MatMul and Gemm layers),
`apply_block_finetune_all_blocks` (gradient descent on blocks of the same layers) or `recover_batch_norm` (a
normalization after every convolution, fitted to the original's moments).

onnxsim cuts nothing of the sentence encoder as it was exported, since its chains end where an exported GELU
forks. So it gets the file as ONNX Runtime fuses it (one node for each GELU), where it cuts feed-forward layers.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from peers import Outcome, bisect, onnxsim_cutter
from peers_files import (
    BATCH,
    CALIB_DATA,
    EVAL_DATA,
    KINDS,
    ZOO,
    Array,
    Feeds,
    count_macs,
    load_samples,
    one_line,
    session,
)

TOOLS = ("l2", "l2-global", "wanda", "wanda-global")
RECOVERIES = ("none", "ridge", "blocks", "normalization")
TOKENS = 32  # of every sentence of the data
NEIGHBOURS = 10
COLUMNS = ("model", "macs", "tool", "recovery", "macs_kept", "ratio", "score", "neighbours", "seconds", "error")


class Subject(NamedTuple):
    """A model with what it is calibrated and judged on.

    Attributes:
        model: What onnxsim is given.
        macs: Counts the multiply-accumulates of a model made of it.
        calibration: Batches.
        judge: The figures of a model: top-1 in percent, or mean cosine and share of common neighbours.
    """

    model: onnx.ModelProto
    macs: Callable[[onnx.ModelProto], int]
    calibration: list[Feeds]
    judge: Callable[[onnx.ModelProto], dict[str, float]]


def classifier(name: str, samples: int, images: int) -> Subject:
    """A classifier of the zoo."""
    model = onnx.load(ZOO / "trained" / f"{name}.onnx")
    entry = model.graph.input[0].name
    calibration, _ = load_samples(CALIB_DATA[KINDS[name]], samples)
    pictures, labels = load_samples(EVAL_DATA[KINDS[name]], images)

    def judge(candidate: onnx.ModelProto) -> dict[str, float]:
        runner = session(candidate)
        parts = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
        found = np.concatenate([runner.run(None, {entry: part})[0].argmax(axis=1) for part in parts])
        return {"score": round(100 * float(np.mean(found == labels)), 2)}

    batches = [{entry: calibration[start : start + BATCH]} for start in range(0, len(calibration), BATCH)]
    return Subject(model, count_macs, batches, judge)


def encoder(name: str, samples: int, sentences: int) -> Subject:
    """The sentence encoder, fused by ONNX Runtime."""
    source = ZOO / "trained" / f"{name}.onnx"
    with tempfile.TemporaryDirectory() as folder:
        fused = Path(folder) / "fused.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(fused)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        model = onnx.load(fused)

    def batches(kind: str, limit: int) -> list[Feeds]:
        with np.load(ZOO / "data" / f"minilm_{kind}.npz") as arrays:
            feeds = {key: arrays[key][:limit] for key in ("input_ids", "attention_mask")}
        count = len(feeds["input_ids"])
        return [{key: value[s : s + BATCH] for key, value in feeds.items()} for s in range(0, count, BATCH)]

    def embedded(runner: onnxruntime.InferenceSession) -> Array:
        found = np.concatenate([runner.run(None, feeds)[0] for feeds in judged])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    judged = batches("eval", sentences)
    wanted = embedded(session(source))

    def judge(candidate: onnx.ModelProto) -> dict[str, float]:
        found = embedded(session(candidate))
        cosine = round(float((found * wanted).sum(axis=1).mean()), 4)
        return {"score": cosine, "neighbours": round(100 * common_neighbours(found, wanted), 1)}

    return Subject(model, matrix_macs, batches("calib", samples), judge)


def common_neighbours(one: Array, other: Array) -> float:
    """The share of the nearest neighbours of every vector that both sets agree on."""
    nearest = []
    for vectors in (one, other):
        similar = vectors @ vectors.T
        np.fill_diagonal(similar, -np.inf)
        nearest.append(np.argpartition(-similar, NEIGHBOURS, axis=1)[:, :NEIGHBOURS])
    return float(np.mean([len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(*nearest, strict=True)]))


def matrix_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of a sentence: stored matrices at every token, and products of tokens with tokens."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    weights = {node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm")}
    stored = sum(math.prod(shapes[name]) for name in weights if len(shapes.get(name, ())) == 2)
    layers = sum(node.op_type == "Softmax" for node in model.graph.node)
    return TOKENS * stored + layers * 2 * TOKENS * TOKENS * 384


def recovered(how: str, subject: Subject, pruned: onnx.ModelProto) -> onnx.ModelProto:
    """A pruned model after one of onnxsim's recoveries, with its defaults."""
    import onnxsim

    original, data = subject.model, subject.calibration
    if how == "ridge":
        return onnxsim.apply_pruning_finetune(original, pruned, calibration_data=data)
    if how == "blocks":
        found, results = onnxsim.apply_block_finetune_all_blocks(original, pruned, calibration_data=data)
        print(f"blocks: {results}"[:400], file=sys.stderr)
        return found
    if how == "normalization":
        return onnxsim.recover_batch_norm(pruned, calibration_data=data, target_model=original)
    return pruned


def rows(name: str, budget: float, subject: Subject, tools: list[str], recoveries: list[str]) -> Any:
    """The figures of every tool and recovery at a budget."""
    base = subject.macs(subject.model)
    for tool in tools:
        criterion, _, scope = tool.partition("-")
        outcome = Outcome(tool, "", budget)
        cut = onnxsim_cutter(subject.model, criterion, scope or "local", subject.calibration)
        pruned = bisect(cut, base, outcome, count=subject.macs)
        for how in recoveries:
            row: dict[str, Any] = {"model": name, "macs": budget, "tool": tool, "recovery": how, "error": outcome.error}
            started = time.perf_counter()
            try:
                if pruned is not None:
                    row |= {"macs_kept": round(subject.macs(pruned) / base, 4), "ratio": outcome.ratio}
                    row |= subject.judge(recovered(how, subject, pruned))
            except Exception as error:  # a tool may raise anything; the row tells it
                row["error"] = one_line(error)
            yield row | {"seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Runs the cases that the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="+", metavar="MODEL:MACS[,MACS…]")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tool", choices=TOOLS, action="append", help="default: all")
    parser.add_argument("--recovery", choices=RECOVERIES, action="append", help="default: all")
    parser.add_argument("--samples", type=int, default=512, help="for calibration (default 512)")
    parser.add_argument("--judged", type=int, default=2000, help="samples that figures are taken on (default 2000)")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with given.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for case in given.cases:
            name, _, budgets = case.partition(":")
            subject = (classifier if name in KINDS else encoder)(name, given.samples, given.judged)
            print(json.dumps({"model": name, "original": subject.judge(subject.model)}), flush=True)
            for budget in budgets.split(","):
                for row in rows(name, float(budget), subject, given.tool or TOOLS, given.recovery or RECOVERIES):
                    writer.writerow(row)
                    stream.flush()
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
