"""Prune a sentence encoder and judge the written files in plain ONNX Runtime, on sentences that no choice has seen.

    python tools/bench_transformer.py ENCODER.onnx CALIBRATION.npz EVALUATION.npz --macs 0.9,0.8,0.7 --seeds 0,1,2

Both .npz files hold an array for every input of the model, by its name. For every budget the table gives the mean
cosine between the embeddings of the original and of the written file, and how many of a sentence's ten nearest
neighbours (by cosine, among the sentences of the evaluation) both have in common. The divergence is what the run
itself reports. With several seeds, figures are means, with the standard deviation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort

import onnxcop

_BATCH = 100
_NEIGHBOURS = 10

Array = np.ndarray[Any, Any]


def embeddings(model: Path, inputs: Mapping[str, Array]) -> Array:
    """Embeddings of unit norm, float32 [sentences, width], from a file in plain ONNX Runtime."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    count = len(next(iter(inputs.values())))
    found = np.concatenate([
        session.run(None, {name: values[at : at + _BATCH] for name, values in inputs.items()})[0]
        for at in range(0, count, _BATCH)
    ])  # fmt: skip
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def neighbours(vectors: Array) -> Array:
    """The nearest other vectors of each, int64 [vectors, 10], in no order."""
    near = vectors @ vectors.T
    np.fill_diagonal(near, -np.inf)
    return np.argpartition(-near, _NEIGHBOURS, axis=1)[:, :_NEIGHBOURS]


def judged(expected: Array, found: Array) -> dict[str, float]:
    """Mean cosine, and the share of nearest neighbours in common."""
    pairs = zip(neighbours(expected), neighbours(found), strict=True)
    shared = [len(np.intersect1d(one, other)) / _NEIGHBOURS for one, other in pairs]
    return {"cosine": float((expected * found).sum(axis=1).mean()), "neighbours": float(np.mean(shared))}


def measured(
    model: Path, data: Mapping[str, Array], held: Mapping[str, Array], macs: list[float], seed: int, folder: Path
) -> list[dict[str, float]]:
    """A row for every budget, each reached from the one before."""
    expected = embeddings(model, held)
    count = len(next(iter(data.values())))
    rows, start = [], time.process_time()
    for point in onnxcop.sweep(model, macs, data=dict(data), samples=count, seed=seed):
        file = folder / f"{model.stem}.{point.macs:g}.{seed}.onnx"
        point.result.save(file)
        row = {"macs": point.macs, "seed": float(seed), "cpu seconds": time.process_time() - start}
        row |= {"divergence": point.result.report.quality.get("divergence", float("nan"))}
        row |= judged(expected, embeddings(file, held))
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def table(rows: list[dict[str, float]]) -> str:
    """Means over the seeds, with their deviation where there are several, as Markdown."""
    lines = ["| MACs | divergence | mean cosine | ten nearest neighbours in common |", "|---|---|---|---|"]
    for macs in sorted({row["macs"] for row in rows}, reverse=True):
        own = [row for row in rows if row["macs"] == macs]

        def told(name: str, scale: float, digits: int, own: list[dict[str, float]] = own) -> str:
            values = np.array([row[name] for row in own]) * scale
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(own) > 1 else ""
            return f"{values.mean():.{digits}f}{spread}"

        cells = told("divergence", 1, 3), told("cosine", 1, 4), told("neighbours", 100, 1)
        lines.append(f"| {macs:.0%} | {cells[0]} | {cells[1]} | {cells[2]} % |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--macs", default="0.9,0.8,0.7,0.5")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, help="calibration sentences, all unless told")
    parser.add_argument("--out", type=Path, help="folder for the pruned files")
    given = parser.parse_args()
    data, held = (dict(np.load(path)) for path in (given.calibration, given.evaluation))
    data = {name: values[: given.samples] for name, values in data.items()}
    budgets = [float(part) for part in given.macs.split(",")]
    with TemporaryDirectory() as scratch:
        folder = given.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            row for seed in given.seeds.split(",")
            for row in measured(given.model, data, held, budgets, int(seed), folder)
        ]  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    main()
