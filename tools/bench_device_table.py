"""How well a table of times predicts the time of pruned models: expected beside measured times.

    python tools/bench_device_table.py MODEL.onnx ...                        # a table in Markdown
    python tools/bench_device_table.py MODEL.onnx --keep tables/ --threads 1  # tables are written there, or read

Run it on the device itself. Every model is profiled as `onnxcop profile` does, then pruned with `--latency-table` to
90, 70 and 50 % of its time (filters by l2, no recovery), and each result is timed in turns with its original. Both have
constant weights then: without recovery, outputs are often denormal numbers, which take ten times as long.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import onnx

import onnxcop
from onnxcop.errors import BudgetError, EngineError
from onnxcop.pipeline.profile import plain
from onnxcop.runtime.device_table import DeviceTable
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.latency import Latency, timed

BOUNDS = (0.9, 0.7, 0.5)


def main() -> None:
    """Parse the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--keep", type=Path, help="folder of the tables of times")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="for one model beside the original")
    given = parser.parse_args()
    engine = onnxcop.EngineOptions(provider=given.provider, threads=given.threads)
    heads = "".join(f" {bound} |" for bound in BOUNDS)
    print(f"| model | ms | seconds to profile |{heads} largest error |\n|---|---|---|{'---|' * len(BOUNDS)}---|")
    with tempfile.TemporaryDirectory() as folder:
        for model in given.models:
            print(
                row(model, (given.keep or Path(folder)) / f"{model.stem}.times.json", engine, given.seconds), flush=True
            )


def row(model: Path, path: Path, engine: onnxcop.EngineOptions, seconds: float) -> str:
    """One model: expected and measured shares at every bound."""
    began = time.perf_counter()
    known = path.exists()
    table = DeviceTable.load(path) if known else onnxcop.profile(model, path, options=engine, seconds=seconds)
    took = "" if known else f"{time.perf_counter() - began:.0f}"
    cells, errors = [], []
    for bound in BOUNDS:
        try:
            expected, found = at(model, path, bound, engine, seconds)
        except BudgetError as error:
            cells.append(f"– (least {error.nearest})")
            continue
        cells.append(f"{expected:.3f} / {found.ratio:.3f} ±{found.interval[1] - found.ratio:.3f}")
        errors.append(abs(expected / found.ratio - 1))
    return f"| {model.stem} | {1e3 * table.seconds:.2f} | {took} | {' | '.join(cells)} | {max(errors, default=0):.1%} |"


def at(model: Path, table: Path, bound: float, engine: onnxcop.EngineOptions, seconds: float) -> tuple[float, Latency]:
    """The expected time of a result, as a share of the original's, and the measured one."""
    result = onnxcop.prune(
        model, latency=bound, latency_table=table, criterion="l2", recover="none", options=engine
    )  # fmt: skip
    whole = onnxcop.analyze(model, keep_initializer_inputs=False, options=engine).model  # as the table has it
    both = [onnx.load_model_from_string(plain(one)) for one in (whole, result.model)]
    found = timed(both[0], both[1], lambda: random_feeds(whole, result.plan.input_shapes, seed=0), engine, seconds)
    if found is None or result.report.expected is None:
        raise EngineError(f"{model} cannot be timed")
    return result.report.expected.ratio, found


if __name__ == "__main__":
    main()
