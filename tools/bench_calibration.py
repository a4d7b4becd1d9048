"""Measures what calibration costs over plain inference, and the memory it takes.

    python tools/bench_calibration.py MODEL.onnx MODEL.onnx=PICTURES ...

A model's data are whatever `onnxcop prune --data` takes; without any they are random. They are read
into memory first, so that neither side is charged for decoding. A round runs the original on all
samples, and calibrates on the same ones; both load the model anew, and calibration is charged with
all it does: shapes, instrumented graph, first sample, moments. Which comes first alternates, and the
ratio is that of the two times of one round, so that a machine that is busy at times hurts both. The
peak of resident memory is that of a fresh process, on random samples that are read from a stream.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnxcop.analysis import layers
from onnxcop.calibration.calibrate import calibrate
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.coupling import groups, tracing
from onnxcop.data.open import CalibrationData, open_source
from onnxcop.graph import io as model
from onnxcop.runtime.input_shapes import settle_shapes, shapes_of
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.session import EngineOptions, Session


def loaded(path: str, options: EngineOptions) -> tuple[onnx.ModelProto, list[layers.Layer], Session]:
    """A model, its layers, and a session that knows its inputs."""
    original = model.load(path)
    shapes = shapes_of(original, settle_shapes(original, None, options), options)
    structure = groups.structure_of(tracing.trace(original, shapes))
    return original, layers.layers_of(original, structure), Session(original, options)


def in_memory(source: CalibrationData) -> CalibrationData:
    """The same samples, decoded."""
    feeds = list(source.batches(1))
    arrays = {
        name: feeds[0][name] if axis is None else np.concatenate([f[name] for f in feeds], axis)
        for name, axis in source.layout.axes.items()
    }
    return open_source(arrays, source.layout.specs, samples=source.count, batch_size=source.batch_size)


def random_samples(
    session: Session, network: onnx.ModelProto, args: argparse.Namespace, options: EngineOptions, count: int
) -> CalibrationData:
    """Random samples in the shapes asked for, read as a stream: they wait on disk, not in memory."""
    shapes = settle_shapes(network, shapes_for(session, args), options)
    feeds = (random_feeds(network, shapes, seed) for seed in range(count))
    return open_source(feeds, session.inputs, samples=count, batch_size=args.batch_size)


def shapes_for(session: Session, args: argparse.Namespace) -> dict[str, list[int]]:
    """The shapes asked for, of the inputs that this model has."""
    names = {spec.name for spec in session.inputs}
    return {name: shape for name, shape in args.shape if name in names}


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(path: str, data: str, args: argparse.Namespace, options: EngineOptions) -> list[str]:
    """One row of the table, without memory."""
    original, watched, session = loaded(path, options)
    sizes = {"samples": args.samples, "batch_size": args.batch_size}
    source = (
        open_source(data, session.inputs, input_shapes=shapes_for(session, args), **sizes)
        if data
        else random_samples(session, original, args, options, args.samples)
    )
    source = in_memory(source)
    session.close()
    found: list[CalibrationStats] = []

    def plain() -> None:
        with Session(original, options) as session:
            for feed in source.batches():
                session.run(feed)

    def calibrated() -> None:
        found.append(calibrate(original, watched, source, options, sha="", positions=args.positions))

    seconds(plain), seconds(calibrated)
    times = []
    for number in range(args.rounds):
        pair = [(plain, 0), (calibrated, 1)]
        took = {which: seconds(work) for work, which in (pair if number % 2 else pair[::-1])}
        times.append((took[0], took[1]))
    ratios = sorted(b / a for a, b in times)
    unit = 1000 / source.count
    counts = [moments.count / source.count for moments in found[0].taps.values()]
    return [
        Path(path).stem,
        str(source.count),
        str(len(counts)),
        f"{min(counts):g} to {max(counts):g}",
        f"{statistics.median(a for a, _ in times) * unit:.2f}",
        f"{statistics.median(b for _, b in times) * unit:.2f}",
        f"{statistics.median(ratios):.2f}",
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
    ]


def peak(path: str, samples: int, args: argparse.Namespace) -> str:
    """Peak resident memory of a process that calibrates, MiB."""
    command = [sys.executable, __file__, path, "--child", str(samples)]
    command += ["--provider", args.provider, "--batch-size", str(args.batch_size)]
    command += [] if args.threads is None else ["--threads", str(args.threads)]
    command += [] if args.positions == "auto" else ["--positions", str(args.positions or "all")]
    command += [f"--shape={name}:{','.join(map(str, s))}" for name, s in args.shape]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def peak_kilobytes() -> int:
    """Of this program; `getrusage` counts what the process was before it became this program."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def child(path: str, args: argparse.Namespace, options: EngineOptions) -> None:
    """Calibrate once and print the peak of resident memory, MiB."""
    original, watched, session = loaded(path, options)
    source = random_samples(session, original, args, options, args.child)
    session.close()
    calibrate(original, watched, source, options, sha="", positions=args.positions)
    print(f"{peak_kilobytes() / 1024:.0f}")


HEADINGS = ["model", "samples", "taps", "positions", "plain-ms", "calibration-ms", "ratio", "range"]


def shape(text: str) -> tuple[str, list[int]]:
    """`name:1,3,224,224`."""
    name, _, sizes = text.rpartition(":")
    return name, [int(size) for size in sizes.split(",")]


def positions(text: str) -> int | None:
    """`auto`, `all` or a number."""
    return {"auto": "auto", "all": None}[text] if text in ("auto", "all") else int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, one row per model."""
    parser = argparse.ArgumentParser(description="Measures what calibration costs.")
    parser.add_argument("models", nargs="+", help="MODEL.onnx or MODEL.onnx=DATA")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--positions", type=positions, default="auto", help="auto, all or a number")
    parser.add_argument("--memory", default="64,1024", help="samples to take the peak memory at")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--shape", type=shape, action="append", default=[], help="name:1,3,224,224")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    options = EngineOptions(args.provider, threads=args.threads)
    if args.child is not None:
        child(args.models[0], args, options)
        return
    memory = [int(count) for count in args.memory.split(",") if count]
    print(*HEADINGS, *(f"MiB@{count}" for count in memory), sep=" | ")
    for entry in args.models:
        path, _, data = entry.partition("=")
        row = measure(path, data, args, options)
        print(*row, *(peak(path, count, args) for count in memory), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
