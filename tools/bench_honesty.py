"""Holds what a run prints against what is true: divergence and agreement on many samples that it never got.

    python tools/bench_honesty.py --out honesty.csv [--only CASE …]

Each case is a model with its budget and calibration samples. The run prints figures with 95 % intervals, from
the samples that it set aside itself; the same figures are then taken on the evaluation samples, which are many
more. A row is appended as soon as it is known: CASE, what was printed, what is true, whether the interval holds
it, and what the search itself measured on the samples that it chose by, which is what it would print without
samples set aside. Cases of one model share the samples that are set aside, so one unlucky choice shows in all of
them. So `--draws 200` also draws as many samples as often from the evaluation samples, and counts the intervals
that hold the figure of them all (`coverage`). Models and samples come from tools/bench_data.py, and from what is
drawn here.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any

import bench_data
import numpy as np
import onnx
import peers_files
from bench_data import CALIB_SEED, EVAL_SEED, Array

import onnxcop
from onnxcop.data.open import CalibrationData, open_data
from onnxcop.data.options import DataOptions
from onnxcop.outputs.intervals import Estimate
from onnxcop.outputs.judgement import judge
from onnxcop.outputs.tasks import Task
from onnxcop.pipeline.unseen import UnseenSamples
from onnxcop.reconstruction.divergence import Reference
from onnxcop.recovery.rounds import RecoverySettings
from onnxcop.report.summary import Report
from onnxcop.runtime.session import Session

ENGINE = onnxcop.EngineOptions(provider="cpu")
QUICK = RecoverySettings(rounds=1, curve_passes=1, sharper_passes=0, held_out_samples=64, refine_samples=96)
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
LINE = (48, 320)  # height and width of a line of text
CAPTCHA = (60, 160)  # height and width
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
VOICE = 576  # samples at 16 kHz
SOUND_RATE, SOUND = 22_050, 43_844  # Hz, and samples of a clip
COLUMNS = ("case", "macs", "samples", "figure", "printed", "low", "high", "n", "true", "n true", "held", "searched",
           "coverage", "seconds")  # fmt: skip

Inputs = Mapping[str, Array]


@dataclass(frozen=True)
class Trial:
    """A run whose figures are checked.

    Attributes:
        model: Name of the zoo's file.
        macs: Share of multiply-accumulates to keep.
        calibration: Inputs [samples, ...] by name, or feeds of one sample.
        evaluation: Others.
        shapes: Concrete shapes of dynamic inputs.
        task: What the model is for, where its outputs do not tell.
    """

    model: str
    macs: float
    calibration: Callable[[], Inputs | list[Inputs]]
    evaluation: Callable[[], Inputs | list[Inputs]]
    shapes: Mapping[str, tuple[int, ...]] | None = None
    task: Task | None = None


def lines(count: int, seed: int) -> Array:
    """Lines of random words in the fonts of matplotlib, as text recognizers take them.

    Args:
        count: How many.
        seed: Of words, fonts, sizes, colours and noise.

    Returns:
        float32 [count, 3, 48, 320], from -1 to 1.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(seed)
    fonts = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVu*.ttf"))
    fonts = [font for font in fonts if "Display" not in font.name]
    found = np.empty((count, 3, *LINE), np.float32)
    for place in range(count):
        words = ["".join(rng.choice(list(LETTERS), rng.integers(2, 7))) for _ in range(rng.integers(1, 4))]
        light, dark = rng.integers(150, 256, 3), rng.integers(0, 100, 3)
        picture = Image.new("RGB", LINE[::-1], tuple(map(int, light)))
        font = ImageFont.truetype(str(rng.choice(fonts)), int(rng.integers(22, 33)))
        corner = (int(rng.integers(2, 12)), int(rng.integers(1, 10)))
        ImageDraw.Draw(picture).text(corner, " ".join(words), font=font, fill=tuple(map(int, dark)))
        values = np.asarray(picture, np.float32) + rng.normal(0, rng.uniform(0, 12), (*LINE, 3))
        found[place] = values.transpose(2, 0, 1) / 127.5 - 1
    return found.clip(-1, 1)


def chords(count: int, seed: int) -> Array:
    """Notes that begin and end, one to four at once, with harmonics and a little noise.

    Args:
        count: How many clips.
        seed: Of all that is drawn.

    Returns:
        float32 [count, 43844, 1], at 22,050 Hz.
    """
    rng = np.random.default_rng(seed)
    time = np.arange(SOUND) / SOUND_RATE
    found = np.empty((count, SOUND, 1), np.float32)
    for place in range(count):
        clip = rng.standard_normal(SOUND) * 10 ** -rng.uniform(2, 3.5)
        for _ in range(rng.integers(1, 9)):
            pitch = 440 * 2 ** ((rng.integers(33, 85) - 69) / 12)
            start, length = rng.uniform(0, 1.6), rng.uniform(0.15, 1.2)
            shape = np.exp(-np.maximum(time - start, 0) * rng.uniform(0.5, 5)) * (time >= start)
            shape *= np.clip((start + length - time) / 0.03, 0, 1) * np.clip((time - start) / 0.01, 0, 1)
            partials = np.arange(1, 9)
            loud = partials ** -rng.uniform(0.8, 2.0) * (partials * pitch < SOUND_RATE / 2)
            clip += rng.uniform(0.05, 0.3) * shape * (loud @ np.sin(2 * np.pi * np.outer(partials * pitch, time)))
        found[place, :, 0] = clip / max(1.0, np.abs(clip).max())
    return found


def captchas(count: int, seed: int) -> Array:
    """Four or five letters and digits, tilted, with lines and noise across them.

    Args:
        count: How many.
        seed: Of all that is drawn.

    Returns:
        float32 [count, 3, 60, 160], from 0 to 1.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(seed)
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = np.empty((count, 3, *CAPTCHA), np.float32)
    for place in range(count):
        image = Image.new("RGB", CAPTCHA[::-1], tuple(rng.integers(200, 256, 3).tolist()))
        at = int(rng.integers(4, 16))
        for letter in rng.choice(list(LETTERS), rng.integers(4, 6)):
            font = ImageFont.truetype(str(fonts / str(rng.choice(FONTS))), int(rng.integers(28, 42)))
            tile = Image.new("RGBA", (44, 56))
            ink = (*rng.integers(0, 130, 3).tolist(), 255)
            ImageDraw.Draw(tile).text((6, 4), str(letter), font=font, fill=ink)
            tile = tile.rotate(float(rng.uniform(-25, 25)), resample=Image.Resampling.BILINEAR)
            image.paste(tile, (at, int(rng.integers(0, 8))), tile)
            at += int(rng.integers(24, 31))
        ends = rng.integers(0, 160, (3, 4)) % [160, 60, 160, 60]
        for end in ends.tolist():
            ImageDraw.Draw(image).line(end, fill=tuple(rng.integers(0, 200, 3).tolist()))
        pixels = np.asarray(image, np.float32) / 255 + rng.normal(0, 0.03, (*CAPTCHA, 3))
        found[place] = pixels.transpose(2, 0, 1).clip(0, 1)
    return found


def voices(count: int, seed: int) -> list[Inputs]:
    """Feeds of a detector of speech: vowels of synthetic voices, hiss and hum, each 36 ms at 16 kHz.

    Vowels are pulses at the pitch of a voice through three resonances (formants).

    Args:
        count: How many.
        seed: Of all that is drawn.

    Returns:
        Feeds of one sample: `input` float32 [1, 576], `state` float32 [2, 1, 128] of zeros, `sr` int64.
    """
    from scipy.signal import lfilter

    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        hiss = rng.standard_normal(4 * VOICE) * 10 ** -rng.uniform(1.5, 3.5)
        if rng.random() < 0.6:
            pulses = (np.arange(4 * VOICE) % int(16_000 / rng.uniform(80, 260)) == 0).astype(np.float64)
            for low, high, width in ((300, 900, 80), (900, 2400, 120), (2400, 3200, 180)):
                radius, angle = np.exp(-np.pi * width / 16_000), 2 * np.pi * rng.uniform(low, high) / 16_000
                pulses = lfilter([1.0], [1.0, -2 * radius * np.cos(angle), radius**2], pulses)
            hiss += pulses / np.abs(pulses).max() * 10 ** -rng.uniform(0.2, 1.5)
        elif rng.random() < 0.5:
            hiss += rng.uniform(0.01, 0.3) * np.sin(2 * np.pi * rng.uniform(50, 4000) * np.arange(4 * VOICE) / 16_000)
        clip = hiss[-VOICE:].astype(np.float32)[None]
        found.append({"input": clip, "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16_000, np.int64)})
    return found


def sentences(name: str) -> Callable[[], Inputs]:
    """Token numbers of a set of the zoo, int64 [sentences, 32] by input."""

    def load() -> Inputs:
        with np.load(peers_files.ZOO / "data" / name) as file:
            return dict(file)

    return load


def trials() -> dict[str, Trial]:
    """All of them by name."""
    known = bench_data.cases()

    def of(name: str, macs: float, limit: int) -> Trial:
        case = known[name]
        (entry,) = (value.name for value in onnx.load(case.path, load_external_data=False).graph.input[:1])
        return Trial(
            name, macs, lambda: {entry: case.calibration(limit)}, lambda: {entry: case.evaluation()[0]}, case.shapes
        )

    def drawn(name: str, macs: float, entry: str, draw: Callable[[int, int], Array], *counts: int) -> Trial:
        calibration, evaluation = counts
        shapes = {lines: {entry: (1, 3, *LINE)}}.get(draw)
        return Trial(
            name, macs, lambda: {entry: draw(calibration, CALIB_SEED)}, lambda: {entry: draw(evaluation, EVAL_SEED)},
            shapes,
        )  # fmt: skip

    found = {}
    for macs in (0.9, 0.8, 0.7):
        found[f"ppocr-{macs}"] = drawn("ppocr_v4_rec", macs, "x", lines, 320, 1000)
        found[f"captcha-{macs}"] = drawn("captcha_crnn", macs, "image", captchas, 320, 1000)
        found[f"basic_pitch-{macs}"] = drawn("basic_pitch", macs, "serving_default_input_2:0", chords, 320, 400)
        found[f"silero-{macs}"] = Trial(
            "silero_vad_16k_op15", macs, lambda: voices(320, CALIB_SEED), lambda: voices(1000, EVAL_SEED),
            {"input": (1, VOICE), "state": (2, 1, 128), "sr": ()},
        )  # fmt: skip
    return found | {
        "resnet20-0.7": of("cifar_resnet20", 0.7, 2048),
        "resnet20-0.5": of("cifar_resnet20", 0.5, 2048),
        "minilm-0.8": Trial("nlp_minilm", 0.8, sentences("minilm_calib.npz"), sentences("minilm_eval.npz")),
        "yolov8n-0.9": of("yolov8n_320", 0.9, 128),
    }


def coverage(
    original: onnx.ModelProto, pruned: onnx.ModelProto, data: CalibrationData, task: Task | None, size: int, draws: int
) -> list[float]:
    """How often an interval from a few samples holds the figure of them all.

    Args:
        original: Before.
        pruned: After.
        data: All samples.
        task: What the model is for.
        size: Samples of a draw, with replacement.
        draws: How many.

    Returns:
        Shares of the draws: for the divergence, then for the agreement of each output that has one.
    """
    feeds = [dict(feed) for feed in data.batches()]
    counts = [data.layout.samples_in(feed) for feed in feeds]
    with Session(original, ENGINE) as one, Session(pruned, ENGINE) as other:
        before, after = ([session.run(feed) for feed in feeds] for session in (one, other))
    judgements = judge(before, counts, original, task)

    def estimates(places: Sequence[int]) -> list[Estimate]:
        reference = Reference(
            [before[at] for at in places], judgements=judgements, counts=[counts[at] for at in places]
        )
        found = reference.figures([after[at] for at in places])
        return [found.divergence, *(output.agreement for output in found.outputs if output.agreement is not None)]

    truth, rng = estimates(range(len(feeds))), np.random.default_rng(EVAL_SEED)
    held = np.zeros(len(truth))
    for _ in range(draws):
        drawn = estimates(rng.integers(len(feeds), size=size).tolist())
        held += [_holds(estimate, whole) is True for estimate, whole in zip(drawn, truth, strict=True)]
    return [float(share) for share in held / max(draws, 1)]


def _holds(printed: Estimate, truth: Estimate) -> bool | None:
    """Whether the interval holds the figure; None where there is no interval."""
    return None if printed.low is None or printed.high is None else printed.low <= truth.value <= printed.high


def measured(
    name: str, trial: Trial, samples: int | None = None, settings: RecoverySettings | None = None, draws: int = 0
) -> list[dict[str, Any]]:
    """Prune, and hold the figures of the report against those of the evaluation samples.

    Args:
        name: Of the trial.
        trial: What is run.
        samples: To calibrate on at most.
        settings: How much effort recovery makes.
        draws: How many draws the coverage of intervals is counted on.
    """
    path = peers_files.ZOO / "trained" / f"{trial.model}.onnx"
    calibration = trial.calibration()
    whole = len(calibration) if isinstance(calibration, list) else len(next(iter(calibration.values())))
    count = min(samples or whole, whole)
    shapes = dict(trial.shapes) if trial.shapes else None
    start = process_time()
    result = onnxcop.prune(
        path, macs=trial.macs, data=calibration, samples=count, input_shapes=shapes, options=ENGINE, task=trial.task,
        settings=settings,
    )  # fmt: skip
    seconds = process_time() - start
    report = result.report
    analysis = onnxcop.analyze(path, input_shapes=shapes, options=ENGINE)
    many = DataOptions(data=trial.evaluation(), samples=1 << 30)
    others = open_data(analysis, many, shapes)
    if report.figures is None or others is None:
        raise SystemExit(f"{name}: nothing was measured")
    truth = UnseenSamples(analysis.original, others, ENGINE, trial.task).figures(result.model)
    if truth is None:
        raise SystemExit(f"{name}: no output to measure")
    pairs = [("divergence", report.figures.divergence, truth.divergence)]
    for mine, other in zip(report.figures.outputs, truth.outputs, strict=True):
        if mine.kind != other.kind:
            raise SystemExit(f"{name}: {mine.described}, but on the evaluation samples {other.described}")
        if mine.agreement is not None and other.agreement is not None:
            pairs.append((f"{mine.agreement_name} ({mine.outputs[0]})", mine.agreement, other.agreement))
    rows = [
        {"case": name, "macs": trial.macs, "samples": count, "seconds": f"{seconds:.0f}", **_row(report, *pair)}
        for pair in pairs
    ]
    if draws:
        single = open_data(analysis, replace(many, batch_size=1), shapes)
        assert single is not None
        size = report.figures.divergence.samples
        shares = coverage(analysis.original, result.model, single, trial.task, size, draws)
        for row, share in zip(rows, shares, strict=True):
            row["coverage"] = f"{share:.3f}"
    return rows


def _row(report: Report, figure: str, printed: Estimate, truth: Estimate) -> dict[str, Any]:
    searched = report.held_out.get(figure.split(" (", maxsplit=1)[0])
    numbers = {"printed": printed.value, "low": printed.low, "high": printed.high, "true": truth.value,
               "searched": searched}  # fmt: skip
    return {
        "figure": figure, "n": printed.samples, "n true": truth.samples, "held": _holds(printed, truth),
        **{key: "" if value is None else f"{value:.4g}" for key, value in numbers.items()},
    }  # fmt: skip


def main() -> None:
    """Run the trials that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("honesty.csv"))
    parser.add_argument("--only", nargs="*", choices=[*trials()], default=[*trials()])
    parser.add_argument("--samples", type=int, help="to calibrate on at most")
    parser.add_argument("--draws", type=int, default=0, help="how many draws the coverage of intervals is counted on")
    parser.add_argument("--quick", action="store_true", help="one round, few curves: worse models, judged the same")
    asked = parser.parse_args()
    for name in asked.only:
        rows = measured(name, trials()[name], asked.samples, QUICK if asked.quick else None, asked.draws)
        new = not asked.out.exists()
        with asked.out.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)
        for row in rows:
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
