#!/usr/bin/env python3
"""What int8 costs pruned networks: prunes and quantizes three by the command line, over seeds, and measures all files.

    ONNXCOP_ZOO=../shared/zoo python tools/bench_int8.py --work FOLDER
    ONNXCOP_ZOO=../shared/zoo python tools/bench_int8.py --work FOLDER --seeds 2 yolov8n_320

Every command runs in FOLDER and is the one that docs/howto/toolchains.md shows. Results stay there as JSON, so a run
that is stopped goes on, and a run of some networks or seeds leaves the others as they were. The original, the pruned
and the int8 file are then run on other images than those of the calibration: the share of right classes, or of boxes
in common with the original's. The page gets the table, between two comments.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_classes
import numpy as np
import onnx
import peers_files
from gallery import answer, link
from pages import write_table

import onnxcop
from onnxcop._base.types import Array
from onnxcop.data.open import open_data
from onnxcop.data.options import DataOptions
from onnxcop.outputs.detections import Boxes, form_of, matched
from onnxcop.outputs.intervals import standard_error

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 3600  # seconds of a run
_BOX = 4


@dataclass(frozen=True, slots=True)
class Network:
    """A network of the table.

    Attributes:
        name: Of its file, without the suffix.
        shown: Its name in the table, and what is measured.
        data: Calibration data, in the zoo's folder of data.
        evaluation: Other data there.
        options: What its command says beside model, data, budget and seed.
        detector: Whether boxes are compared, with the original's; else classes, with the labels.
    """

    name: str
    shown: str
    data: str
    evaluation: str
    options: str
    detector: bool = False

    def command(self, seed: int) -> list[str]:
        """The command as the page shows it, with a seed."""
        text = f"onnxcop {self.name}.onnx -o {self.name}.{seed}.onnx --macs 0.7 --data {self.data} {self.options} "
        return shlex.split(f"{text} --then-quantize static --provider cpu --threads 1 --seed {seed}")


NETWORKS = (
    Network("cifar_resnet20", "ResNet-20, top-1 on 10,000 images", "cifar10_calib.npz", "cifar10_eval.npz",
        "--preprocess imagenet"),
    Network("imagenet_mobilenet_v2", "MobileNetV2, top-1 on 300 images", "imagenet_calib", "imagenet_eval",
        "--preprocess imagenet"),
    Network("yolov8n_320", "YOLOv8n, boxes of 300 images matched", "imagenet_calib", "imagenet_eval",
        "--samples 128", detector=True),
)  # fmt: skip


def main() -> int:
    """Parse the command line, run, and write the table; returns how many runs failed."""
    known = {network.name: network for network in NETWORKS}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NETWORK", help=f"{', '.join(known)} (default: all)")
    parser.add_argument("--work", type=Path, required=True, help="folder that commands run in")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas (default 0,1,2)")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"no such network: {', '.join(sorted(unknown))}")
    work, failed = options.work.resolve(), 0
    work.mkdir(parents=True, exist_ok=True)
    for network in NETWORKS:
        for seed in map(int, options.seeds.split(",")):
            if network.name in (options.names or known) and not (work / f"{network.name}.{seed}.json").exists():
                failed += not run(network, seed, work)
    write(work)
    return failed


def run(network: Network, seed: int, work: Path) -> bool:
    """Run one command and measure its files; says whether it went well."""
    link(work / f"{network.name}.onnx", peers_files.ZOO / "trained" / f"{network.name}.onnx")
    link(work / network.data, peers_files.ZOO / "data" / network.data)
    shown = answer(network.command(seed), work, f"{network.name}, seed {seed}", LONGEST)
    if shown is None:
        return False
    report = json.loads(shown)
    files = [work / f"{network.name}{part}.onnx" for part in ("", f".{seed}", f".{seed}.int8")]
    found = (boxes_in_common if network.detector else right_classes)(
        peers_files.ZOO / "data" / network.evaluation, files
    )
    found |= {
        "time": report["int8"]["latency"]["ratio"] / report["latency"]["ratio"],
        "bytes": report["int8"]["bytes"] / report["after"]["bytes"],
        "how": report["int8"]["chosen"],
    }
    (work / f"{network.name}.{seed}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{network.name}, seed {seed}: {json.dumps(found)}", flush=True)
    return True


def right_classes(data: Path, files: list[Path]) -> dict[str, Any]:
    """Top-1 of three files, and the standard error of what the last loses beside the second, in percent."""
    samples, labels = peers_files.load_samples(data)
    right = [100.0 * (peers_files.predictions(file, samples) == labels) for file in files]
    return {
        "shares": [float(values.mean()) for values in right],
        "error": float(np.std(right[1] - right[2], ddof=1) / np.sqrt(len(labels))),
    }


def boxes_in_common(data: Path, files: list[Path]) -> dict[str, Any]:
    """Share of boxes in common with the first file's, and the standard error of what the last loses, in percent."""
    models = [onnx.load(file) for file in files]
    opened = open_data(onnxcop.analyze(models[0]), DataOptions(data=data, samples=1000))
    if opened is None:
        raise SystemExit(f"no images in {data}")
    name = models[0].graph.input[0].name
    images = [np.asarray(feed[name]) for feed in opened.in_batches_of(1).batches()]
    metadata = {entry.key: entry.value for entry in models[0].metadata_props}
    seen = [boxes_of(bench_classes.answers(model, images), metadata) for model in models]
    counts = [[len(boxes.classes) for boxes in entry] for entry in seen]
    hits = [np.array([2.0 * matched(a, b) for a, b in zip(seen[0], entry, strict=True)]) for entry in seen]
    sums = [np.add(counts[0], count, dtype=np.float64) for count in counts]
    lost = without(hits[1], sums[1]) - without(hits[2], sums[2])
    return {
        "shares": [100.0 * float(hit.sum() / total.sum()) for hit, total in zip(hits, sums, strict=True)],
        "error": 100.0 * standard_error(lost),
        "boxes": sum(counts[0]),
    }


def without(hits: Array, sums: Array) -> Array:
    """The share of boxes in common, without one image after another."""
    return np.asarray((hits.sum() - hits) / np.maximum(sums.sum() - sums, 1.0))


def boxes_of(outputs: list[Array], metadata: dict[str, str]) -> list[Boxes]:
    """Boxes of all classes that a user sees, image by image."""
    form = form_of([outputs], metadata)
    rows = [form.rows(output[0]) for output in outputs]
    return [form.shown(entry[:, :_BOX], entry[:, _BOX:]) for entry in rows]


def row(network: Network, found: list[dict[str, Any]]) -> str:
    """A row of the page's table: means over seeds, and what every seed loses."""
    original, pruned, int8 = np.mean([entry["shares"] for entry in found], axis=0)
    lost = [entry["shares"][1] - entry["shares"][2] for entry in found]
    each = ", ".join(f"{round(value, 1) + 0.0:.1f}" for value in lost)  # no -0.0
    spread = f"{np.mean(lost):.1f} ± {np.sqrt(np.mean([entry['error'] ** 2 for entry in found])):.1f}"  # same images
    shares = [f"{100 * np.mean([entry[name] for entry in found]):.0f} %" for name in ("time", "bytes")]
    cells = network.shown, f"{original:.1f} %", f"{pruned:.1f} %", f"{int8:.1f} %", f"{spread} ({each})", *shares
    return f"| {' | '.join(cells)} |"


def write(work: Path) -> None:
    """Put the table of all that ran between the comments of the page."""
    head = (
        "| pruned to 70 % of the multiply-accumulates | original | pruned | in int8 | lost | time of a run | file |\n"
    )
    rows = []
    for network in NETWORKS:
        stored = sorted(work.glob(f"{network.name}.[0-9]*.json"))
        if stored:
            rows.append(row(network, [json.loads(path.read_text(encoding="utf-8")) for path in stored]))
    table = head + "|---|---|---|---|---|---|---|\n" + "\n".join(rows)
    print(table)
    write_table(ROOT / "docs" / "howto" / "toolchains.md", "int8", table)


if __name__ == "__main__":
    raise SystemExit(main())
