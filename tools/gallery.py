#!/usr/bin/env python3
"""Prunes twelve real models by the command line, and writes the gallery page with a report page for each.

    ONNXCOP_ZOO=../shared/zoo python tools/gallery.py --work FOLDER
    ONNXCOP_ZOO=../shared/zoo python tools/gallery.py --work FOLDER cifar_resnet20 crepe_tiny

Every command runs in FOLDER, in which models and data lie under the names that the page shows. Results stay there as
JSON, so a run that is stopped, or that names some models, leaves the others as they were. docs/gallery.md gets the
table, between two comments, and docs/gallery/ the reports.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_data
import bench_honesty
import numpy as np
import peers_files
from pages import write_table

from onnxcop._base.formatting import counted, sized

ROOT = Path(__file__).resolve().parents[1]
SEED = 101
COUNT = 160  # samples that are drawn, where none are stored
LONGEST = 1200  # seconds of a run


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A model of the gallery.

    Attributes:
        name: Of its file, without the suffix.
        task: What it is for.
        options: What its command says beside model, data and reports.
        data: Name of its calibration data in the zoo's folder, or in models/; else what is drawn.
        drawn: Draws samples, by input; None where they are stored.
        source: Folder of the model.
    """

    name: str
    task: str
    options: str
    data: str = ""
    drawn: Callable[[], dict[str, Any]] | None = None
    source: Path = peers_files.ZOO / "trained"

    @property
    def command(self) -> list[str]:
        """The command as the page shows it."""
        data = Path(self.data or f"{self.name}.npz").name
        return shlex.split(f"onnxcop {self.name}.onnx -o small/{self.name}.onnx {self.options} --data {data}")


def of_lines(width: int) -> Callable[[], dict[str, Any]]:
    """Lines of text, cut to a width."""
    return lambda: {"x": bench_honesty.lines(COUNT, SEED)[..., :width]}


ZOO = peers_files.ZOO / "data"
EXHIBITS = (
    Exhibit("digits_resnet", "digits, 8×8", "--macs 0.5", "digits_calib.npz", source=ROOT / "models"),
    Exhibit("digit_cnn", "digits of MNIST", "--macs 0.5 --preprocess mnist --samples 128", "mnist_calib.npz"),
    Exhibit("cifar_resnet20", "images of CIFAR-10", "--macs 0.7 --preprocess imagenet --samples 256",
        "cifar10_calib.npz"),
    Exhibit("imagenet_mobilenet_v2", "images of ImageNet", "--macs 0.9 --preprocess imagenet --samples 64",
        "imagenet_calib"),
    Exhibit("yolov8n_320", "18 kinds of objects", "--macs 0.9 --samples 48", "imagenet_calib"),
    Exhibit(
        "ultraface_rfb_320", "faces", "--macs 0.8 --resize stretch --scale 1 --mean 127 --std 128 --samples 64",
        "imagenet_calib",
    ),
    Exhibit("ppocr_v4_rec", "text in a line", "--macs 0.9 --samples 64 --input-shape x:1,3,48,320",
        drawn=of_lines(320)),
    Exhibit("ppocr_v2_cls", "upside-down text", "--macs 0.8 --samples 96 --input-shape x:1,3,48,192",
        drawn=of_lines(192)),
    Exhibit(
        "captcha_crnn", "captchas", "--macs 0.9 --samples 96",
        drawn=lambda: {"image": bench_honesty.captchas(COUNT, SEED)},
    ),
    Exhibit(
        "crepe_tiny", "pitch of a tone", "--macs 0.8 --samples 128",
        drawn=lambda: {"input": bench_data.tones(COUNT, SEED)},
    ),
    Exhibit(
        "basic_pitch", "notes of music", "--macs 0.9 --samples 48",
        drawn=lambda: {"serving_default_input_2:0": bench_honesty.chords(64, SEED)},
    ),
    Exhibit("nlp_minilm", "embeddings of sentences", "--macs 0.9 --samples 96", "minilm_calib.npz"),
)  # fmt: skip


def main() -> int:
    """Parse the command line, run, and write the page; returns how many runs failed."""
    known = {exhibit.name: exhibit for exhibit in EXHIBITS}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL", help=f"{', '.join(known)} (default: those not run yet)")
    parser.add_argument("--work", type=Path, required=True, help="folder that commands run in")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    work, failed = options.work.resolve(), 0
    for name, exhibit in known.items():
        if name in options.names or not (options.names or (work / f"{name}.json").exists()):
            failed += not run(exhibit, work)
    write(work)
    return failed


def run(exhibit: Exhibit, work: Path) -> bool:
    """Run one command; says whether it went well, and leaves its result as JSON and its report page in the folder."""
    (work / "small").mkdir(parents=True, exist_ok=True)
    link(work / f"{exhibit.name}.onnx", exhibit.source / f"{exhibit.name}.onnx")
    if exhibit.drawn is None:
        link(work / exhibit.data, (ZOO if exhibit.source != ROOT / "models" else exhibit.source) / exhibit.data)
    else:
        np.savez(work / f"{exhibit.name}.npz", **exhibit.drawn())
    page = f"{exhibit.name}.html"
    found = answer([*exhibit.command, "--report", page], work, exhibit.name)
    if found is None:
        return False
    (work / f"{exhibit.name}.json").write_text(found, encoding="utf-8")
    print(row(exhibit, json.loads(found)), flush=True)
    return True


def answer(command: list[str], work: Path, name: str, longest: float = LONGEST) -> str | None:
    """What a command of onnxcop prints as JSON in a folder; None, with a line that says why, if it fails."""
    given = [sys.executable, "-m", *command, "--json", "--quiet"]
    try:
        done = subprocess.run(given, cwd=work, check=False, capture_output=True, text=True, timeout=longest)
    except subprocess.TimeoutExpired:
        print(f"{name}: not done in {longest:.0f} s", flush=True)
        return None
    if done.returncode:
        print(f"{name}: {done.stderr.strip()}", flush=True)
        return None
    return done.stdout


def link(path: Path, target: Path) -> None:
    """Make a file or folder appear under a name."""
    if not target.exists():
        raise SystemExit(f"{target} is missing; name the zoo's folder in ONNXCOP_ZOO")
    path.unlink(missing_ok=True)
    path.symlink_to(target.resolve())


def row(exhibit: Exhibit, found: dict[str, Any]) -> str:
    """A row of the page's table."""
    before, after, latency = found["before"], found["after"], found["latency"]
    share = f"{100 * latency['ratio']:.0f} ± {196 * latency['error']:.2g} %"
    figures = found["figures"]
    agreed = [one for one in (figures["outputs"] if figures else []) if one["agreement"] is not None]
    if agreed:
        value, low, high = (100 * agreed[0]["agreement"][name] for name in ("value", "low", "high"))
        quality = f"{agreed[0]['agreement_name']} {value:.1f} % ({low:.1f} to {high:.1f})"
    elif figures:
        value, low, high = (figures["divergence"][name] for name in ("value", "low", "high"))
        quality = f"divergence {value:.3g} ({low:.3g} to {high:.3g})"
    else:
        quality = "not measured"
    cells = (
        exhibit.name, exhibit.task, f"{counted(before['macs'])} → {counted(after['macs'])}",
        f"{sized(before['bytes'])} → {sized(after['bytes'])}", share, quality,
        f"{sum(found['seconds'].values()):.0f} s", f"[report](gallery/{exhibit.name}.html)",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def write(work: Path) -> None:
    """Put the table and the commands of all that ran between the comments of the page, and their reports beside it."""
    ran = [exhibit for exhibit in EXHIBITS if (work / f"{exhibit.name}.json").exists()]
    head = "| model | task | MACs | file | time | agreement | took | |\n|---|---|---|---|---|---|---|---|\n"
    rows = [row(one, json.loads((work / f"{one.name}.json").read_text(encoding="utf-8"))) for one in ran]
    (ROOT / "docs" / "gallery").mkdir(exist_ok=True)
    for one in ran:
        shutil.copy(work / f"{one.name}.html", ROOT / "docs" / "gallery")
    commands = "\n".join(shlex.join(one.command) for one in ran)
    text = head + "\n".join(rows) + f"\n\nThe commands:\n\n```sh\n{commands}\n```"
    write_table(ROOT / "docs" / "gallery.md", "gallery", text)


if __name__ == "__main__":
    raise SystemExit(main())
