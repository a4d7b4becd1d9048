#!/usr/bin/env python3
"""Prunes every model of a zoo and tabulates what was found, cut, reached and proven.

    python tools/zoo.py ZOO --out docs/coverage       # writes docs/coverage.md and docs/coverage.csv
    python tools/zoo.py ZOO --out some --match '*yolo*' --criterion cop

ZOO is a folder with `trained/*.onnx` (models with weights), `skeletons/*.onnx` (graphs without) and
`skeleton.py`, whose `fill(model)` gives a skeleton seeded weights. Every model runs in a process of
its own with a time limit, so that none can stop the rest; the tables are written again after each,
and rows of an earlier run that are not run again stay.

A row with a difference and no error is a model that was pruned, is valid, and equals its masked
original. Where the budget cannot be reached the nearest feasible one is taken, and the reasons say
what stands in the way.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zoo_table import Row, page, percent, read_csv, signature, write_csv

CONVOLUTIONS = {"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv"}


def main() -> int:
    """Parse the command line and run; returns how many models have no result, at most 100."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("zoo", type=Path, help="folder of the zoo")
    parser.add_argument("--out", type=Path, default=Path("zoo"), help="tables OUT.md and OUT.csv")
    parser.add_argument("--match", action="append", default=[], help="names to run, as patterns")
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--criterion", default="l2")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600, help="seconds per model")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the child process
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(asdict(prune_one(options.one, options))))
        return 0
    return min(run_all(options), 100)


def run_all(options: argparse.Namespace) -> int:
    """Run the chosen models and keep the tables current."""
    table = options.out.with_name(options.out.name + ".csv")
    rows = {row.model: row for row in read_csv(table)} if table.exists() else {}
    files = list(model_files(options.zoo, options.match))
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda path: run_child(path, options), files):
            rows[row.model] = row
            print(
                f"{row.model:45} {percent(row.prunable):>7} prunable {percent(row.macs):>7} MACs "
                f"{'' if row.difference is None else f'{row.difference:.1e}':>8} {row.error}",
                flush=True,
            )
            ordered = sorted(rows.values(), key=lambda entry: entry.model)
            write_csv(table, ordered)
            options.out.with_name(options.out.name + ".md").write_text(page(ordered, options.macs, options.criterion))
    return sum(bool(rows[path.stem].error) for path in files)


def model_files(zoo: Path, patterns: list[str]) -> Iterator[Path]:
    """The zoo's models, small files first."""
    found = [*(zoo / "trained").glob("*.onnx"), *(zoo / "skeletons").glob("*.onnx")]
    for path in sorted(found, key=lambda path: (path.parent.name, path.stat().st_size)):
        if not patterns or any(fnmatch.fnmatch(path.stem, pattern) for pattern in patterns):
            yield path


def run_child(path: Path, options: argparse.Namespace) -> Row:
    """Run one model in a process of its own."""
    command = [
        sys.executable, __file__, str(options.zoo), "--one", str(path),
        "--macs", str(options.macs), "--criterion", options.criterion,
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=options.timeout,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return Row(path.stem, error=f"no result within {options.timeout:g} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Row(path.stem, error=last[:300])
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def prune_one(path: Path, options: argparse.Namespace) -> Row:
    """Analyse, choose, rewrite and verify one model."""
    import onnx

    import onnxcop
    from onnxcop.analysis.census import census, inner_share
    from onnxcop.analysis.summary import frozen_reasons, totals
    from onnxcop.criteria.registry import criterion_named
    from onnxcop.verification.verify import verify

    model = onnx.load(path)
    if path.parent.name == "skeletons":
        model = fill(options.zoo, model)
    row = Row(path.stem, convs=sum(node.op_type in CONVOLUTIONS for node in all_nodes(model.graph)))
    start = time.perf_counter()
    try:
        analysis = onnxcop.analyze(model)
        structure = analysis.structure
        row.groups, row.units = len(structure.groups), len(structure.unit_class)
        row.filters, row.prunable, reasons = frozen_reasons(analysis)
        row.reasons = "; ".join(summarized(reasons))
        layers = census(analysis)
        row.given, row.inner = sum(layer.given for layer in layers), inner_share(layers)
        row.signature = signature((group.width, len(group.producers), group.exact) for group in structure.groups)
        context = onnxcop.PruningContext.of(analysis.model, structure, analysis.cost)
        if not row.units:
            raise onnxcop.OnnxcopError("nothing to prune")
        selection = nearest_selection(context, criterion_named(options.criterion), options.macs)
        removed = selection.removed.copy()
        removed.sort()
        pruned = onnxcop.apply(analysis.model, structure, removed)
        checked = verify(analysis.model, pruned, structure, removed)
        row.difference, row.inexact = checked.max_difference, checked.inexact_units
        row.notes = "; ".join(checked.notes)[:300]
        before = analysis.cost.original()
        row.macs = float(selection.cost[0] / before[0]) if before[0] else None
        row.params = totals(pruned, 0.0).params / max(totals(analysis.model, 0.0).params, 1)
    except Exception as error:  # whatever goes wrong is this table's subject
        row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"
    row.seconds = time.perf_counter() - start
    return row


def nearest_selection(context: Any, criterion: Any, macs: float) -> Any:
    """The selection for a budget, or for the nearest feasible one."""
    import onnxcop

    budget = onnxcop.Budget(macs=macs)
    for _ in range(3):  # cuts at a loosened budget may end a little above it again
        try:
            return onnxcop.choose(context, criterion.rank(context), budget)
        except onnxcop.OnnxcopError as error:
            nearest = getattr(error, "nearest", None)
            if nearest is None or not budget.macs < nearest < 1:
                raise
            budget = onnxcop.Budget(macs=nearest)
    raise onnxcop.OnnxcopError("no feasible budget was found")


def fill(zoo: Path, model: Any) -> Any:
    """Give a skeleton its weights with the zoo's own script."""
    spec = importlib.util.spec_from_file_location("skeleton", zoo / "skeleton.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{zoo / 'skeleton.py'}: no such script")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fill(model)


def all_nodes(graph: Any) -> Iterator[Any]:
    """Nodes of a graph and of all bodies in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from all_nodes(inner)


def summarized(reasons: dict[str, int]) -> list[str]:
    """The three reasons that freeze most filters; the same words about several nodes are one."""
    texts: Counter[str] = Counter()
    places: dict[str, str] = {}
    for reason, filters in reasons.items():
        text, _, place = reason.partition(" (")
        texts[text] += filters
        places.setdefault(text, place.rstrip(")"))
    named = {text: f"{text} ({place})" if place else text for text, place in places.items()}
    return [f"{named[text]}: {count}" for text, count in texts.most_common(3)]


if __name__ == "__main__":
    sys.exit(main())
