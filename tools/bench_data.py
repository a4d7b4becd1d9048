"""The models that accuracy is compared on, with their samples and what is measured of each.

Calibration samples and evaluation samples never meet: the first come from the calibration sets (or
one seed), the others from the evaluation sets (or another seed), and nothing here reads an
evaluation set but `Case.evaluation`. The models and pictures of the zoo are looked for in the folder
that ONNXCOP_ZOO names, else in ../shared/zoo beside the repository.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import peers_files

from onnxcop.outputs.judgement import judge
from onnxcop.reconstruction.divergence import Reference

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.int64] | None

TOP1, AGREEMENT, ERROR = "top-1", "agreement", "relative error"
RATE = 16_000  # Hz, of the tones
FRAME = 1024  # samples of a tone
LOWEST, OCTAVES = 32.7, 5.9  # Hz and width of the range that the pitch is drawn from
HARMONICS = 12
TONES = 2000  # in an evaluation
CALIB_SEED, EVAL_SEED = 101, 202  # of the tones; any two that differ
DETECTOR_SIDE = 320


@dataclass(frozen=True)
class Case:
    """A model with its samples.

    Attributes:
        name: Of the model.
        path: Of its file.
        metric: TOP1 in percent of right answers, AGREEMENT in percent of samples with the original's
            top-1, or ERROR, the relative error of the original's output in percent, lower is better: of
            boxes and scores apart, as `onnxcop.divergence` has it, since pixels would hide scores.
        calibration: From the largest number of samples to float32 inputs [samples, ...].
        evaluation: To float32 inputs [samples, ...] and int64 labels [samples] (None but for TOP1).
        shapes: Concrete shapes of dynamic inputs.
        folder: Pictures that the calibration samples are read from, for methods that read such.
        preprocess: By name, what makes the same samples of them.
    """

    name: str
    path: Path
    metric: str
    calibration: Callable[[int], Array]
    evaluation: Callable[[], tuple[Array, Labels]]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    folder: Path | None = None
    preprocess: str | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy (or error) of a model and of the original on the same samples, in percent.

    Attributes:
        accuracy: Of the model, in its case's metric.
        base: Of the original.
        difference: Mean of the samples' differences, model minus original.
        spread: Standard error of that mean.
        agreement: Samples with the original's top-1; None where there are no classes.
        samples: How many.
    """

    accuracy: float
    base: float
    difference: float
    spread: float
    agreement: float | None
    samples: int


def tones(count: int, seed: int) -> Array:
    """Harmonic tones with a little noise, each of zero mean and unit deviation.

    Args:
        count: How many.
        seed: Of pitches (log-uniform), amplitudes, phases and noise (20 to 40 dB below the tone).

    Returns:
        float32 [count, 1024], at 16 kHz.
    """
    rng = np.random.default_rng(seed)
    time = np.arange(FRAME) / RATE
    frames = np.empty((count, FRAME), np.float32)
    for place in range(count):
        pitches = LOWEST * 2 ** rng.uniform(0, OCTAVES) * np.arange(1, HARMONICS + 1)
        amplitudes = rng.uniform(0.3, 1, HARMONICS) * np.arange(1, HARMONICS + 1) ** -rng.uniform(0.5, 2)
        amplitudes[pitches >= RATE / 2] = 0
        phases = rng.uniform(0, 2 * np.pi, HARMONICS)
        tone = amplitudes @ np.sin(2 * np.pi * np.outer(pitches, time) + phases[:, None])
        noise = rng.standard_normal(FRAME) * tone.std() * 10 ** -rng.uniform(1, 2)
        frame = tone + noise
        frames[place] = (frame - frame.mean()) / frame.std()
    return frames


def resized(folder: Path, limit: int | None = None) -> Array:
    """Pictures of a folder as a detector takes them: 320×320 without cropping, divided by 255.

    Args:
        folder: Of JPEG files.
        limit: Take this many, drawn without replacement by a fixed seed.

    Returns:
        float32 [pictures, 3, 320, 320], RGB.
    """
    from PIL import Image

    files = sorted(folder.glob("*.jpg"))
    if limit is not None and limit < len(files):
        chosen = np.sort(np.random.default_rng(0).choice(len(files), limit, replace=False))
        files = [files[index] for index in chosen]
    side = (DETECTOR_SIDE, DETECTOR_SIDE)
    pictures = [np.asarray(Image.open(file).convert("RGB").resize(side, Image.Resampling.BILINEAR)) for file in files]
    return peers_files.normalize(np.stack(pictures), (0.0,), (1.0,))


def _pictured(name: str) -> Case:
    kind = peers_files.KINDS[name]
    folder = peers_files.REPOSITORY / "models" if kind == "digits" else peers_files.ZOO / "trained"
    return Case(
        name,
        folder / f"{name}.onnx",
        TOP1,
        lambda limit: peers_files.load_samples(peers_files.CALIB_DATA[kind], limit)[0],
        lambda: peers_files.load_samples(peers_files.EVAL_DATA[kind]),
        folder=peers_files.CALIB_DATA[kind] if kind == "imagenet" else None,
        preprocess=kind if kind == "imagenet" else None,
    )


def cases() -> dict[str, Case]:
    """All cases by name."""
    detector = peers_files.ZOO / "trained" / "yolov8n_320.onnx"
    found = [
        *(_pictured(n) for n in ("digits_resnet", "digit_cnn", "cifar_resnet20", "imagenet_mobilenet_v2")),
        Case(
            "crepe_tiny",
            peers_files.ZOO / "trained" / "crepe_tiny.onnx",
            AGREEMENT,
            lambda limit: tones(limit, CALIB_SEED),
            lambda: (tones(TONES, EVAL_SEED), None),
        ),
        Case(
            "yolov8n_320",
            detector,
            ERROR,
            lambda limit: resized(peers_files.CALIB_DATA["imagenet"], limit),
            lambda: (resized(peers_files.EVAL_DATA["imagenet"]), None),
            {"images": (1, 3, DETECTOR_SIDE, DETECTOR_SIDE)},
        ),
    ]
    return {case.name: case for case in found}


def answers(model: onnx.ModelProto | Path, samples: Array, metric: str) -> Array:
    """What a model says of samples.

    Returns:
        The first output, float32 [samples, ...], where the metric is ERROR; else its top-1, int64 [samples].
    """
    runner = peers_files.session(model)
    first = runner.get_inputs()[0]
    step = first.shape[0] if isinstance(first.shape[0], int) else peers_files.BATCH
    parts = []
    for start in range(0, len(samples), step):
        output = runner.run(None, {first.name: samples[start : start + step]})[0]
        parts.append(output if metric == ERROR else output.argmax(axis=1))
    return np.concatenate(parts)


def relative_error(own: Array, base: Array) -> float:
    """Relative error of outputs [samples, ...], parts of very different size counting alike."""
    told = judge([{"output": base}], task="regress")
    return Reference([{"output": base}], judgements=told).compare([{"output": own}]).value


def score(metric: str, own: Array, base: Array, labels: Labels) -> Score:
    """Compare a model's answers with the original's.

    Args:
        metric: As in `Case`.
        own: The model's answers.
        base: The original's.
        labels: int64 [samples], for TOP1.
    """
    count = len(own)
    if metric == ERROR:
        accuracy = 100 * relative_error(own, base)
        each = [100 * relative_error(own[i : i + 1], base[i : i + 1]) for i in range(count)]
        return Score(accuracy, 0.0, accuracy, float(np.std(each, ddof=1) / np.sqrt(count)), None, count)
    truth = base if labels is None else labels
    right, right_before = own == truth, base == truth
    differences = right.astype(np.float64) - right_before
    return Score(
        100 * float(right.mean()),
        100 * float(right_before.mean()),
        100 * float(differences.mean()),
        100 * float(differences.std(ddof=1) / np.sqrt(count)),
        100 * float((own == base).mean()),
        count,
    )
