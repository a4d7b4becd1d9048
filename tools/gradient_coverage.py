#!/usr/bin/env python3
"""Takes the gradient of every model of a zoo, checks it, and tabulates where gradients stop.

    python tools/gradient_coverage.py ZOO --out docs/gradients    # writes docs/gradients.md and docs/gradients.csv
    python tools/gradient_coverage.py ZOO --out some --match '*yolo*'

The loss is the mean of each floating-point output times random weights. Its gradient with respect to all stored
floating-point tensors of more than one element (without statistics of normalizations) is compared with central
differences of the loss along three random directions in the space of all of them. Where units switch on and off within
the smallest step that single precision allows, the gradient is integrated along the way between both ends instead.
Every model runs in a process of its own; rows of an earlier run that are not run again stay.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx

DIRECTIONS = 3
STEPS = (1e-3, 1e-4, 3e-5, 1e-5)  # of the weights' own size; tried until one agrees: rounding or kinks spoil some
LENGTH, POINTS = 1e-3, 256  # of the way that the gradient is integrated along, where no step agrees
CLOSE = 0.02  # relative error of a directional derivative
LEAST = 0.95  # of the parameters, that get a gradient where a model is covered

PAGE = """# Gradients

`tools/gradient_coverage.py` writes this page. For real models and published architectures, `onnxcop.gradient` writes
the gradient of a loss with respect to every stored floating-point tensor of more than one element.

- **trained**: the share of these parameters that a gradient reaches.
- **error**: the largest relative error of a directional derivative, against central differences along {directions}
  random directions. It is limited by single precision, and by units that switch on and off all along the way.
- **stops**: operators that the gradient does not pass, and why.

{covered} of {count} models get a gradient for at least {least:.0%} of their parameters; in {checked} of them all
directional derivatives agree within {close:.0%}.

## Where gradients stop

| operator | nodes | models | reason |
|---|---|---|---|
{stops}

## Models

| model | parameters | trained | error | nodes | stops |
|---|---|---|---|---|---|
{rows}
"""


@dataclass
class Row:
    """One model's outcome."""

    model: str
    parameters: int = 0
    trained: float | None = None
    error: float | None = None
    nodes: int = 0
    stops: str = "[]"
    seconds: float = 0.0
    trouble: str = ""


def main() -> int:
    """Parse the command line and run; returns how many models have no result, at most 100."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gradients"))
    parser.add_argument("--match", action="append", default=[])
    parser.add_argument("--missing", action="store_true", help="only models without a row")
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(asdict(one(options.one, options.zoo))))
        return 0
    table = options.out.with_name(options.out.name + ".csv")
    rows = {row.model: row for row in read(table)} if table.exists() else {}
    files = [*(options.zoo / "trained").glob("*.onnx"), *(options.zoo / "skeletons").glob("*.onnx")]
    for path in sorted(files, key=lambda path: (elements(path), path.name)):
        if options.match and not any(fnmatch.fnmatch(path.stem, pattern) for pattern in options.match):
            continue
        if options.missing and path.stem in rows and not rows[path.stem].trouble:
            continue
        rows[path.stem] = child(path, options)
        write(options.out, sorted(rows.values(), key=lambda row: row.model))
        print(rows[path.stem], flush=True)
    write(options.out, sorted(rows.values(), key=lambda row: row.model))
    return min(sum(bool(row.trouble) for row in rows.values()), 100)


def elements(path: Path) -> int:
    """How many weights a model has, also where the file leaves them out: small models run first."""
    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)


def child(path: Path, options: argparse.Namespace) -> Row:
    """Run one model in a process of its own."""
    command = [sys.executable, __file__, str(options.zoo), "--one", str(path)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return Row(path.stem, trouble=f"no result within {options.timeout:g} s")
    if done.returncode:
        return Row(path.stem, trouble=(done.stderr.strip().splitlines() or ["no message"])[-1][:300])
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def one(path: Path, zoo: Path) -> Row:
    """Take and check the gradient of one model."""
    from zoo import fill

    from onnxcop.gradient import differentiate, trainable
    from onnxcop.gradient.backward import Gradients
    from onnxcop.graph.io import load
    from onnxcop.runtime.input_shapes import settle_shapes
    from onnxcop.runtime.inputs import random_feeds

    start = time.monotonic()
    model = onnx.load(path)
    model = load(fill(zoo, model) if path.parent.name == "skeletons" else model)
    shapes = settle_shapes(model)
    feeds = random_feeds(model, shapes, seed=0)
    work, terms = with_loss(model, feeds)
    names = trainable(work)
    found: Gradients = differentiate(work, "loss", names, input_shapes=shapes)
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in found.model.graph.initializer}
    from onnxcop.training.step import initializers_of

    sizes = {name: int(np.prod(tensor.dims)) for name, tensor in initializers_of(work).items() if name in names}
    row = Row(path.stem, sum(sizes.values()), nodes=len(found.model.graph.node))
    row.trained = sum(sizes[name] for name in found.names) / max(row.parameters, 1)
    row.stops = json.dumps([(stop.operator, stop.reason) for stop in found.stops])
    row.error = largest_error(work, terms, found, feeds)
    row.seconds = time.monotonic() - start
    return row


def with_loss(model: onnx.ModelProto, feeds: dict[str, Any]) -> tuple[onnx.ModelProto, list[str]]:
    """The model at a recent opset with the loss, and the tensors whose means it is the sum of."""
    from onnxcop.gradient.builder import FLOATS, Builder, total
    from onnxcop.gradient.prepare import raised
    from onnxcop.runtime.session import Session

    with Session(model, optimize=False) as session:
        results = session.run(feeds)
    work = onnx.ModelProto()
    work.CopyFrom(raised(model))
    build = Builder(work.graph, "loss")
    parts, terms = [], []
    rng = np.random.default_rng(5)
    for value in model.graph.output:
        if value.type.tensor_type.elem_type not in FLOATS:
            continue
        result = np.nan_to_num(np.asarray(results[value.name], np.float64))
        output = build.known(value.name, value.type.tensor_type.elem_type)
        weights = rng.uniform(0.5, 1.5, result.shape) / max(float(np.abs(result).mean()), 1e-6)
        weighted = output * output.number(weights)
        terms.append(weighted.name)
        parts.append(weighted.op("ReduceMean", keepdims=0).cast(build.constant(0, 1)))
    build.op("Identity", total(parts))
    work.graph.node[-1].output[0] = "loss"
    work.graph.output.append(onnx.helper.make_tensor_value_info("loss", 1, []))
    return work, terms


def largest_error(work: onnx.ModelProto, terms: list[str], found: Any, feeds: dict[str, Any]) -> float | None:
    """Of the directional derivatives along random directions, relative to their size."""
    import onnxruntime as ort
    from onnx import numpy_helper

    if not found.names:
        return None
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    providers = ["CPUExecutionProvider"]
    stored = {t.name: numpy_helper.to_array(t) for t in found.model.graph.initializer if t.name in found.names}
    whole_model = with_inputs(found.model, stored)
    backward = ort.InferenceSession(whole_model.SerializeToString(), options, providers=providers)

    def gradient(values: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(found.names, backward.run(list(found.names.values()), {**feeds, **values}), strict=True))

    grads = gradient(stored)
    forward = onnx.ModelProto()
    forward.CopyFrom(work)
    from onnxcop.gradient.prepare import store_constants

    store_constants(forward)
    weights = {t.name: numpy_helper.to_array(t) for t in forward.graph.initializer if t.name in found.names}
    forward = with_inputs(forward, weights)
    forward.graph.output.extend(onnx.ValueInfoProto(name=name) for name in terms)
    session = ort.InferenceSession(forward.SerializeToString(), options, providers=providers)

    def loss(values: dict[str, Any]) -> float:
        results = session.run(terms, {**feeds, **values})
        return sum(float(result.mean(dtype=np.float64)) for result in results)  # in double precision

    def along(way: dict[str, Any]) -> float:
        """The error of the integral of the gradient along a short way, which kinks of activations leave as it is."""
        places = LENGTH * (np.arange(0.5, POINTS) / POINTS * 2 - 1)
        slopes = []
        for place in places:
            here = gradient({n: (a + place * way[n]).astype(a.dtype) for n, a in weights.items()})
            slopes.append(sum(float((here[name] * way[name]).sum()) for name in weights))
        ends = [loss({n: (a + s * LENGTH * way[n]).astype(a.dtype) for n, a in weights.items()}) for s in (1, -1)]
        found_slope, mean = (ends[0] - ends[1]) / (2 * LENGTH), float(np.mean(slopes))
        return abs(found_slope - mean) / max(abs(mean), float(np.std(slopes)), 1e-6)

    worst = 0.0
    for number in range(DIRECTIONS):
        rng = np.random.default_rng([3, number])
        way = {}
        for name, array in weights.items():
            size = float(np.sqrt(np.mean(array.astype(np.float64) ** 2))) or 1e-3
            noise, slope = rng.standard_normal(array.shape), grads[name].astype(np.float64)
            scale = float(np.sqrt(np.mean(slope**2))) or 1.0
            # Part noise, part along the gradient with a random sign and length, so that every tensor counts.
            way[name] = size * (0.3 * noise + rng.uniform(-1, 1) * slope / scale)
        told = sum(float((grads[name] * way[name]).sum()) for name in weights)
        whole = sum(abs(float((grads[name] * way[name]).sum())) for name in weights)
        errors = []
        for step in STEPS:
            ends = [loss({n: (a + s * step * way[n]).astype(a.dtype) for n, a in weights.items()}) for s in (1, -1)]
            errors.append(abs((ends[0] - ends[1]) / (2 * step) - told) / max(abs(told), 0.25 * whole, 1e-6))
            if errors[-1] <= CLOSE / 20:
                break
        if min(errors) > CLOSE:
            errors.append(along(way))
        worst = max(worst, min(errors))
    return worst


def with_inputs(model: onnx.ModelProto, weights: dict[str, Any]) -> onnx.ModelProto:
    """The model with these initializers as inputs in their stead."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    kept = [tensor for tensor in found.graph.initializer if tensor.name not in weights]
    listed = [value for value in found.graph.input if value.name not in weights]
    del found.graph.initializer[:], found.graph.input[:]
    found.graph.initializer.extend(kept)
    found.graph.input.extend(listed)
    for name, array in weights.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        found.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
    found.ir_version = max(found.ir_version, 8)
    return found


def read(path: Path) -> list[Row]:
    """Rows of an earlier run."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [
            Row(
                entry["model"], int(entry["parameters"]),
                *(float(entry[key]) if entry[key] else None for key in ("trained", "error")), int(entry["nodes"]),
                entry["stops"],                 float(entry["seconds"]), entry["trouble"],
            ) for entry in csv.DictReader(stream)
        ]  # fmt: skip


def write(out: Path, rows: list[Row]) -> None:
    """Write both tables."""
    with out.with_name(out.name + ".csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, [field.name for field in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(row) for row in rows)
    nodes: Counter[tuple[str, str]] = Counter()
    models: Counter[tuple[str, str]] = Counter()
    for row in rows:
        stops = [(operator, reason) for operator, reason in json.loads(row.stops)]
        nodes.update(stops)
        models.update(set(stops))
    covered = [row for row in rows if row.trained is not None and row.trained >= LEAST]
    out.with_name(out.name + ".md").write_text(
        PAGE.format(
            directions=DIRECTIONS, covered=len(covered), count=len(rows), least=LEAST, close=CLOSE,
            checked=sum(row.error is not None and row.error <= CLOSE for row in covered),
            stops="\n".join(f"| {o} | {count} | {models[o, r]} | {r} |" for (o, r), count in nodes.most_common()),
            rows="\n".join(map(line, rows)),
        ), encoding="utf-8",
    )  # fmt: skip


def line(row: Row) -> str:
    """A row of the page."""
    stops = ", ".join(f"{o} ({c})" for o, c in Counter(o for o, _ in json.loads(row.stops)).most_common())
    trained = "" if row.trained is None else f"{row.trained:.1%}"
    error = "" if row.error is None else f"{row.error:.1e}"
    return f"| {row.model} | {row.parameters:,} | {trained} | {error} | {row.nodes} | {row.trouble or stops} |"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
