"""Times models cut by this package and by onnxsim beside their originals.

    python tools/bench_latency.py --out results --peers-python peers/bin/python
    python tools/bench_latency.py --out results --zoo --macs 0.7          # every model of the zoo, ours alone
    python tools/bench_latency.py --out results --table                   # the tables alone, of what is known

Every method gets the same budgets of multiply-accumulates. All results of one model and budget take turns with the
original, one thread, by the thread's own CPU time, and what counts is the ratio within a turn; with `--zoo` it is what
the run itself measured. The results are
OUT/latency.csv, to which rows are appended as soon as they are known, and whose rows are not measured again unless
`--force` says so, OUT/latency.md, OUT/latency.svg, and OUT/frontier.svg with accuracy against time (plots with
`pip install ".[bench]"`); with `--zoo` they are named zoo.

Filters go by the L2 norm and nothing is recovered, since time does not depend on the values of weights: `ours` is the
default but for that, `any-width` adds `--multiple-of 1`, and `onnxsim-l2`, `onnxsim-wanda` and `torch-pruning` are
other tools (see tools/peers.py for their environment). `with-data` is the default with calibration samples, and
`closed-form` is the same without distillation. Their accuracy, and that of the other tools, is measured where there are
evaluation samples. MACs are counted in the files, by one counter for all.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_data
import bench_report
import numpy as np
import onnx
import peers_files
from peers_files import ZOO

import onnxcop
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.latency import measure_times

OURS, ANY, CLOSED, DATA = "ours", "any-width", "closed-form", "with-data"
PEERS = ("onnxsim-l2", "onnxsim-wanda", "torch-pruning")
METHODS = (OURS, ANY, *PEERS, CLOSED, DATA)
CALIBRATED = (CLOSED, DATA)
JUDGED = (*CALIBRATED, *PEERS)  # methods whose accuracy says something
ENGINE = onnxcop.EngineOptions(provider="cpu", threads=1)
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    OURS: ("--criterion", "l2", "--recover", "none"),
    ANY: ("--criterion", "l2", "--recover", "none", "--multiple-of", "1"),
    CLOSED: ("--distill", "none"),
    DATA: (),
}
PRESETS = {"cifar10": "cifar"}  # of `--preprocess`, where it is not called as the data set
COLUMNS = (
    "model", "method", "macs_target", "macs_kept", "params_kept", "time", "time_low", "time_high", "original_ms",
    "turns", "accuracy", "base_accuracy", "eval_samples", "seconds", "error", "note",
)  # fmt: skip
BY_TIME = ("time", "time of a run, as a share of the original's")
HEADINGS = {"model": "model", "original_ms": "original, ms"}

Row = dict[str, str]
Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Timed:
    """A model to time.

    Attributes:
        name: In the tables.
        path: Of its file, below the zoo.
        shapes: Of its dynamic inputs.
    """

    name: str
    path: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


TEN = (
    Timed("imagenet_mobilenet_v2", "trained/imagenet_mobilenet_v2.onnx"),
    Timed("efficientnet_b0", "skeletons/efficientnet_b0.legacy.onnx"),
    Timed("convnext_atto", "skeletons/convnext_atto.legacy.onnx"),
    Timed("ppocr_v4_det", "trained/ppocr_v4_det.onnx", {"x": (1, 3, 160, 160)}),
    Timed("ppocr_v4_rec", "trained/ppocr_v4_rec.onnx", {"x": (1, 3, 48, 320)}),
    Timed("resnet50", "skeletons/resnet50.legacy.onnx"),
    Timed("yolov8n_320", "trained/yolov8n_320.onnx", {"images": (1, 3, 320, 320)}),
    Timed("cifar_resnet20", "trained/cifar_resnet20.onnx"),
    Timed("vit_tiny", "skeletons/vit_tiny_patch16_224.legacy.onnx"),
    Timed("ultraface_rfb_320", "trained/ultraface_rfb_320.onnx"),
)


def whole_zoo() -> list[Timed]:
    """Every model of the zoo, small files first."""
    files = sorted((*(ZOO / "trained").glob("*.onnx"), *(ZOO / "skeletons").glob("*.onnx")), key=lambda p: p.stem)
    known = {Path(case.path).stem: case for case in TEN}
    return [
        Timed(path.stem, str(path.relative_to(ZOO)), known[path.stem].shapes if path.stem in known else {})
        for path in sorted(files, key=lambda path: (path.parent.name != "trained", path.stem))
    ]


def filled(case: Timed, folder: Path) -> Path:
    """The model's file; of a skeleton one with weights, made in a folder."""
    source = ZOO / case.path
    if source.parent.name != "skeletons":
        return source
    spec = importlib.util.spec_from_file_location("skeleton", ZOO / "skeleton.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{ZOO / 'skeleton.py'} cannot be read")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = onnx.load(source)
    made = module.fill(model)
    target = folder / f"{case.name}.onnx"
    onnx.save(model if made is None else made, target)
    return target


def command(method: str, case: Timed, path: Path, out: Path, args: argparse.Namespace, macs: float) -> list[str]:
    """What makes a method's model."""
    if method in PEERS:
        tool = Path(__file__).with_name("peers.py")
        given = [str(args.peers_python), str(tool), "prune", "--tool", method, str(path), "-o", str(out), "--macs",
                 str(macs)]  # fmt: skip
        kind = peers_files.KINDS.get(case.name)
        return given if kind is None else [*given, "--calib", str(peers_files.CALIB_DATA[kind]), "--samples", "512"]
    given = [sys.executable, "-m", "onnxcop", str(path), "-o", str(out), "--macs", str(macs), "--provider", "cpu",
             "--threads", "1", "--json", "--latency-seconds", str(args.seconds / 2), *ARGUMENTS[method]]  # fmt: skip
    for name, shape in case.shapes.items():
        given += ["--input-shape", f"{name}:{','.join(map(str, shape))}"]
    if method in CALIBRATED:
        known = bench_data.cases()[case.name]
        kind = peers_files.KINDS[case.name]
        data = known.folder or peers_files.CALIB_DATA[kind]
        given += ["--data", str(data), "--samples", str(args.samples), "--seed", str(args.seed)]
        given += ["--preprocess", PRESETS.get(kind, kind)]
    return given


def made(method: str, case: Timed, path: Path, out: Path, args: argparse.Namespace, macs: float) -> Row:
    """Let a method make its model; what it says, and how long it took."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command(method, case, path, out, args, macs), capture_output=True, text=True, check=False,
            timeout=args.timeout, env={"OMP_NUM_THREADS": "1"} | os.environ,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {args.timeout:g} s"}
    row = {"seconds": f"{time.perf_counter() - start:.1f}"}
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode or not out.exists():
        said = json.loads(done.stdout.splitlines()[-1]).get("error") if method in PEERS and done.stdout else ""
        return row | {"error": (said or last)[:200]}
    if method not in PEERS:
        told = json.loads(done.stdout)
        row["note"] = "; ".join(line for line in told["warnings"] if "slower" in line or "no cut" in line)
        row |= as_told(told) if args.zoo else {}
    return row


def as_told(told: Mapping[str, Any]) -> Row:
    """What a run measured itself, as users see it."""
    kept, latency = told["kept"], told["latency"]
    row = {"macs_kept": f"{kept['macs']:.4f}", "params_kept": f"{kept['params']:.4f}"}
    if latency is None:
        return row
    half = 2 * latency["error"]
    return row | {
        "time": f"{latency['ratio']:.4f}", "time_low": f"{latency['ratio'] - half:.4f}",
        "time_high": f"{latency['ratio'] + half:.4f}", "original_ms": f"{1e3 * latency['before']['median']:.4g}",
        "turns": str(latency["turns"]),
    }  # fmt: skip


def timed(case: Timed, path: Path, made_files: Mapping[str, Path], seconds: float) -> dict[str, Row]:
    """Time what methods made beside the original."""
    original = onnx.load(path)
    analysis = onnxcop.analyze(original, options=ENGINE, input_shapes=dict(case.shapes) or None)
    feeds = random_feeds(analysis.original, analysis.input_shapes, seed=0)
    models = [onnx.load(file) for file in made_files.values()]
    inputs = [{value.name for value in model.graph.input} for model in (original, *models)]
    each = [{name: value for name, value in feeds.items() if name in names} for names in inputs]
    found = measure_times([original, *models], each, ENGINE, seconds=seconds)
    peers_files.GIVEN_SHAPES.update(analysis.input_shapes)
    rows: dict[str, Row] = {}
    for place, (method, model) in enumerate(zip(made_files, models, strict=True), start=1):
        ratio = found.latency(place)
        rows[method] = {
            "macs_kept": share(peers_files.count_macs, model, original), "time": f"{ratio.ratio:.4f}",
            "params_kept": share(peers_files.count_params, model, original),
            "time_low": f"{ratio.interval[0]:.4f}", "time_high": f"{ratio.interval[1]:.4f}",
            "original_ms": f"{1e3 * ratio.before.median:.4g}", "turns": str(ratio.turns),
        }  # fmt: skip
    peers_files.GIVEN_SHAPES.clear()
    return rows


def timed_each(case: Timed, path: Path, made_files: Mapping[str, Path], seconds: float) -> dict[str, Row]:
    """Time what methods made; each alone where one of them cannot be run, and says why."""
    try:
        return timed(case, path, made_files, seconds) if made_files else {}
    except Exception as error:  # one model that cannot be timed does not stop the others
        if len(made_files) == 1:
            return {method: {"error": f"{type(error).__name__}: {error}"[:200]} for method in made_files}
    rows: dict[str, Row] = {}
    for method, file in made_files.items():
        rows |= timed_each(case, path, {method: file}, seconds)
    return rows


def share(count: object, model: onnx.ModelProto, original: onnx.ModelProto) -> str:
    """What is left of what is counted; empty where it cannot be counted."""
    try:
        return f"{count(model) / count(original):.4f}"  # type: ignore[operator]
    except Exception:  # a counter runs models, which may fail in any way
        return ""


def accuracy(case: Timed, path: Path, out: Path) -> Row:
    """Accuracy of what was made with data, on samples that were not calibrated on."""
    known = bench_data.cases()[case.name]
    samples, labels = known.evaluation()
    own, base = (bench_data.answers(file, samples, known.metric) for file in (out, path))
    score = bench_data.score(known.metric, own, base, labels)
    return {"accuracy": f"{score.accuracy:.2f}", "base_accuracy": f"{score.base:.2f}",
            "eval_samples": str(score.samples)}  # fmt: skip


def missing(case: Timed, macs: float, known: Mapping[Key, Row], args: argparse.Namespace) -> list[str]:
    """Methods that are asked for, apply to a model, and are not known."""
    found = [m for m in args.methods if args.force or (case.name, m, f"{macs:g}") not in known]
    if args.peers_python is None:
        found = [method for method in found if method not in PEERS]
    return [method for method in found if method not in CALIBRATED or case.name in peers_files.KINDS]


def run(args: argparse.Namespace, known: dict[Key, Row]) -> Iterator[Row]:
    """Rows that are asked for and not known yet."""
    for case in whole_zoo() if args.zoo else TEN:
        if (args.models and case.name not in args.models) or not (ZOO / case.path).exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            path: Path | None = None
            for macs in args.macs:
                methods = missing(case, macs, known, args)
                if not methods:
                    continue
                path = path or filled(case, Path(folder))
                files = {method: Path(folder) / f"{method}.out.onnx" for method in methods}
                rows = {method: made(method, case, path, files[method], args, macs) for method in methods}
                there = {method: files[method] for method in methods if not rows[method].get("error")}
                measured = {} if args.zoo else timed_each(case, path, there, args.seconds)
                for method in methods:
                    row = {"model": case.name, "method": method, "macs_target": f"{macs:g}"} | rows[method]
                    row |= measured.get(method, {})
                    if method in JUDGED and method in there and case.name in bench_data.cases():
                        row |= accuracy(case, path, files[method])
                    files[method].unlink(missing_ok=True)
                    yield {column: row.get(column, "") for column in COLUMNS}


def table(rows: Sequence[Row], *, zoo: bool) -> str:
    """Markdown: a line for every model, the time of each method at each budget."""
    title = "# Time of every model of the zoo" if zoo else "# Time beside the original"
    wanted = [
        (macs, method)
        for macs in sorted({row["macs_target"] for row in rows}, reverse=True)
        for method in METHODS
        if any(row["macs_target"] == macs and row["method"] == method for row in rows)
    ]
    by_key = {(row["model"], row["method"], row["macs_target"]): row for row in rows}
    parts = [title, "", bench_report.machine(), ""]
    heads = [*HEADINGS.values(), *(f"{macs} {method}" for macs, method in wanted)]
    parts += [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [cell(by_key.get((model, method, macs))) for macs, method in wanted]
        first = next((row["original_ms"] for row in rows if row["model"] == model and row["original_ms"]), "")
        parts.append(f"| {model} | {first} | {' | '.join(cells)} |")
    times = [float(row["time"]) for row in rows if row["time"] and row["method"] == OURS]
    if zoo and times:
        slower = sum(float(row["time_low"]) > 1 for row in rows if row["time_low"])
        parts += ["", f"{len(times)} models: median {np.median(times):.3f}, most {max(times):.3f}; {slower} slower "
                  "than the original beyond doubt."]  # fmt: skip
    return "\n".join([*parts, ""])


def cell(row: Row | None) -> str:
    """Time with its interval, MACs where they are far from the budget, accuracy where there is one."""
    if row is None:
        return ""
    if row["error"] or not row["time"]:
        return row["error"].replace("|", "\\|")[:60] or "not timed"
    half = (float(row["time_high"]) - float(row["time_low"])) / 2
    text = f"{100 * float(row['time']):.0f} ±{max(1, round(100 * half))} %"
    if row["macs_kept"] and abs(float(row["macs_kept"]) - float(row["macs_target"])) > 0.03:
        text += f" at {100 * float(row['macs_kept']):.0f} % of the MACs"
    if row["accuracy"]:
        text += f", {row['accuracy']} of {row['base_accuracy']}"
    return text


def plotted(row: Row) -> Row:
    """A row as the plot of accuracies takes it, with time in its place."""
    return row | {"metric": "time", "accuracy": f"{100 * float(row['time']):.3f}", "base_accuracy": "100"}


def frontier(row: Row) -> Row:
    """A row as the plot of accuracies takes it."""
    return row | {"metric": bench_data.cases()[row["model"]].metric}


def write(rows: Sequence[Row], stem: Path, *, zoo: bool) -> None:
    """The tables and, of the ten models, the plots."""
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    stem.with_suffix(".md").write_text(table(rows, zoo=zoo), encoding="utf-8")
    if zoo:
        return
    drawn = [plotted(row) for row in rows if row["time"] and row["macs_kept"] and row["method"] not in CALIBRATED]
    judged = [frontier(row) for row in rows if row["time"] and row["accuracy"]]
    try:
        if drawn:
            bench_report.draw(drawn, stem, METHODS, columns=5, panel=(3.2, 2.7))
        if judged:
            bench_report.draw(judged, stem.with_name("frontier"), METHODS, panel=(4.6, 3.4), across=BY_TIME)
    except ImportError:
        print('no plot: matplotlib is not installed; pip install ".[bench]"', file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    top.add_argument("--out", type=Path, required=True, help="folder of the results")
    top.add_argument("--models", type=lambda text: text.split(","), help="names, separated by commas")
    top.add_argument("--methods", type=lambda text: text.split(","), help=f"default: {','.join(METHODS[:3])}")
    top.add_argument("--macs", type=lambda text: [float(part) for part in text.split(",")], default=[0.9, 0.7, 0.5])
    top.add_argument("--zoo", action="store_true", help="every model of the zoo, by this package alone")
    top.add_argument("--seconds", type=float, default=4.0, help="of CPU time for one comparison (default 4)")
    top.add_argument("--timeout", type=float, default=600, help="seconds for one method to make a model")
    top.add_argument("--samples", type=int, default=300, help="to calibrate on, where data are used (default 300)")
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--peers-python", type=Path, help="the Python of the other tools' environment")
    top.add_argument("--force", action="store_true", help="measure rows again that are there already")
    top.add_argument("--table", action="store_true", help="write the tables of what is known, and measure nothing")
    return top


def main() -> None:
    """Measures what is asked for; the tables are written after every row."""
    args = parser().parse_args()
    args.methods = args.methods or [OURS] if args.zoo else args.methods or list(METHODS[:3])
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / ("zoo" if args.zoo else "latency")
    known: dict[Key, Row] = {}
    if stem.with_suffix(".csv").exists():
        with stem.with_suffix(".csv").open(newline="", encoding="utf-8") as stream:
            known = {(row["model"], row["method"], row["macs_target"]): row for row in csv.DictReader(stream)}
    order = [case.name for case in (whole_zoo() if args.zoo else TEN)]

    def tidy() -> list[Row]:
        return sorted(
            known.values(),
            key=lambda r: (order.index(r["model"]), -float(r["macs_target"]), METHODS.index(r["method"])),
        )

    for row in () if args.table else run(args, dict(known)):
        known[row["model"], row["method"], row["macs_target"]] = row
        print(f"{row['model']} {row['macs_target']} {row['method']}: {cell(row)} {row['note']}", flush=True)
        write(tidy(), stem, zoo=True)  # without the plot
    write(tidy(), stem, zoo=args.zoo)


if __name__ == "__main__":
    main()
