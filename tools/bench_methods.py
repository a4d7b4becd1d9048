"""How tools/bench_accuracy.py prunes a model by one method and measures the result: a row of its table."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import bench_data
import numpy as np
import onnx
import peers
import peers_files

import onnxcop
from onnxcop.pipeline.options import Modes, PruneOptions
from onnxcop.runtime.session import EngineOptions

Row = dict[str, str]
Key = tuple[str, ...]

COLUMNS = (
    *("model", "method", "macs_target", "seed", "macs_kept", "params_kept", "metric", "accuracy"),
    *(
        "base_accuracy",
        "difference",
        "standard_error",
        "agreement",
        "eval_samples",
        "calib_samples",
    ),
    *("seconds", "note", "error"),
)
FIGURES = ("accuracy", "base_accuracy", "agreement")
PATIENCE = 1800  # seconds that a peer may take for one budget


@dataclass(frozen=True)
class Own:
    """Options of onnxcop for one method."""

    criterion: str = "auto"
    allocate: str = "auto"
    recover: str = "auto"
    data: bool = True
    distill: str | None = None

    def settled(self) -> tuple[Modes, bool, str | None]:
        """The effective options: two methods with the same options are one run."""
        options = PruneOptions(
            criterion=self.criterion, allocate=self.allocate, recover=self.recover, data=True if self.data else None
        )
        return Modes.of(options), self.data, self.distill or self.recover


DELETION = {
    "cop-delete": Own("cop", recover="none", data=False),
    "l1-delete": Own("l1", recover="none", data=False),
}
OURS = {"ours": Own()}
ABLATION = {
    "cop+merge": Own("cop", "cop", "merge"),
    "cop+full": Own("cop", "cop", "full"),
    "measured+merge": Own(allocate="measured", recover="merge"),
    "measured+full": Own(allocate="measured", recover="full"),
    "data-free": Own(data=False),
    "ours+distill": Own(distill="auto"),
}
OWN = DELETION | OURS | ABLATION
METHODS = (*peers.TOOLS, *OWN)


def key(row: Row) -> Key:
    """Key of a row."""
    return row["model"], row["method"], f"{float(row['macs_target']):g}", row["seed"]


class Bench:
    """One model, with all that its methods share, read when it is first needed."""

    def __init__(self, case: bench_data.Case, samples: int, seed: int, folder: Path) -> None:
        self.case, self.samples, self.seed, self.folder = case, samples, seed, folder

    @cached_property
    def original(self) -> onnx.ModelProto:
        """The model as it was."""
        return onnx.load(self.case.path)

    @cached_property
    def feed(self) -> dict[str, bench_data.Array]:
        """Calibration samples by input name."""
        return {next(iter(peers_files.fixed_shapes(self.original))): self.case.calibration(self.samples)}

    @cached_property
    def feed_file(self) -> Path:
        """The same samples in a file for the peers."""
        path, (samples,) = self.folder / f"{self.case.name}.npz", self.feed.values()
        np.savez(path, input=samples, labels=np.zeros(len(samples), np.int64))
        return path

    @cached_property
    def evaluation(self) -> tuple[bench_data.Array, bench_data.Labels, bench_data.Array]:
        """Evaluation samples, labels and the original's answers."""
        samples, labels = self.case.evaluation()
        return samples, labels, bench_data.answers(self.original, samples, self.case.metric)

    def own(self, how: Own, macs: float) -> tuple[onnx.ModelProto, Row]:
        """Prune by this package."""
        threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or None
        count = len(next(iter(self.feed.values()))) if how.data else 0
        data = (self.case.folder or self.feed) if how.data else None
        started = time.perf_counter()
        result = onnxcop.prune(
            self.original, macs=macs, data=data, preprocess=self.case.preprocess, samples=self.samples,
            criterion=how.criterion, allocate=how.allocate, recover=how.recover, distill=how.distill,
            input_shapes=dict(self.case.shapes) or None,
            options=EngineOptions("cpu", threads=threads), seed=self.seed,
        )  # fmt: skip
        seconds = f"{time.perf_counter() - started:.1f}"
        note = "; ".join(choice for choice in result.report.choices if "distillation" in choice)
        return result.model, {"seconds": seconds, "calib_samples": str(count), "note": note}

    def peer(self, tool: str, macs: float, python: Path) -> tuple[onnx.ModelProto, Row]:
        """Prune by another tool, in a process of its environment.

        Raises:
            RuntimeError: It gave no model that runs.
        """
        out = self.folder / "pruned.onnx"
        out.unlink(missing_ok=True)
        command = [
            python,
            peers.__file__,
            "prune",
            "--tool",
            tool,
            self.case.path,
            "-o",
            out,
            "--macs",
            macs,
        ]
        count = 0
        if "wanda" in tool:
            count = len(next(iter(self.feed.values())))
            command += ["--calib", self.feed_file, "--samples", count]
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"exit status {done.returncode}: {last}"[:300])
        outcome = json.loads(lines[-1])
        if not outcome["loads"]:
            raise RuntimeError(outcome["error"])
        note = "; ".join(filter(None, (outcome["error"], outcome["note"])))
        return onnx.load(out), {
            "seconds": f"{outcome['seconds']:.1f}",
            "calib_samples": str(count),
            "note": note,
        }

    def measured(self, model: onnx.ModelProto) -> Row:
        """Cost and accuracy of a pruned model, as columns."""
        samples, labels, base = self.evaluation
        own = bench_data.answers(model, samples, self.case.metric)
        found = bench_data.score(self.case.metric, own, base, labels)
        return {
            "macs_kept": f"{peers_files.count_macs(model) / peers_files.count_macs(self.original):.4f}",
            "params_kept": f"{peers_files.count_params(model) / peers_files.count_params(self.original):.4f}",
            "accuracy": f"{found.accuracy:.2f}",
            "base_accuracy": f"{found.base:.2f}",
            "difference": f"{found.difference:+.2f}",
            "standard_error": f"{found.spread:.2f}",
            "agreement": "" if found.agreement is None else f"{found.agreement:.2f}",
            "eval_samples": str(found.samples),
        }

    def blank(self, method: str, macs: float) -> Row:
        """A row of which only the question is known."""
        given = {
            "model": self.case.name,
            "method": method,
            "macs_target": f"{macs:g}",
            "seed": str(self.seed),
        }
        return dict.fromkeys(COLUMNS, "") | given | {"metric": self.case.metric}

    def row(self, method: str, macs: float, python: Path | None) -> Row:
        """Prune by a method and measure what it made."""
        row = self.blank(method, macs)
        try:
            if method in OWN:
                model, facts = self.own(OWN[method], macs)
            elif python is not None:
                model, facts = self.peer(method, macs, python)
            else:
                raise RuntimeError("--peers-python is not given")
            return row | facts | self.measured(model)
        except Exception as error:  # whatever a method fails with is its row of the table
            return row | {"error": peers_files.one_line(error)}


def earlier(path: Path, benches: Sequence[Bench]) -> dict[Key, Row]:
    """Rows of a table that tools/peers.py wrote."""
    named = {bench.case.name: bench for bench in benches}
    found = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for past in csv.DictReader(stream):
            if past["model"] not in named or past["tool"] not in peers.TOOLS:
                continue
            row = named[past["model"]].blank(past["tool"], float(past["macs_target"]))
            row |= {name: past[name] for name in COLUMNS if past.get(name)}
            row["macs_target"] = f"{float(past['macs_target']):g}"
            origin = f"from {path.name}, where Wanda's calibration samples may be fewer"
            origin = origin if "wanda" in past["tool"] else f"from {path.name}"
            if past["accuracy"]:
                row |= {name: f"{float(row[name]):.2f}" for name in FIGURES if row[name]}
                row["difference"] = f"{float(past['accuracy']) - float(past['base_accuracy']):+.2f}"
                row["note"], row["error"] = "; ".join(filter(None, (past["error"], past["note"]))), ""
            row["note"] = "; ".join(filter(None, (row["note"], origin)))
            found[key(row)] = row
    return found
