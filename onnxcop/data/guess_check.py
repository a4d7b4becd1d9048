"""Check of a guessed preprocessing against the model's predictions on some of the images.

A classifier that gets correctly preprocessed images is certain of its predictions, and predicts different classes for
different images. Mutual information of image and class, H(mean p) - mean H(p), measures both. Images that are too dark,
too bright or shifted lower it, because predictions become uncertain or alike. A guess is doubted if another common
preprocessing has clearly more of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from onnxcop._base.types import Feed, FloatArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.data.dataset import CalibrationData
from onnxcop.errors import OnnxcopError
from onnxcop.images.preprocess import Preprocess
from onnxcop.images.reader import ImageReader
from onnxcop.runtime.session import EngineOptions, Session

log = logging.getLogger("onnxcop")

_CANDIDATES = ("imagenet", "keras-tf", "unit", "none", "caffe", "mnist")
_SAMPLES, _FEWEST = 32, 8
_AFFORDABLE = 3e11  # multiply-accumulates, over all candidates
_CLEARLY = 0.1  # of the largest possible mutual information
_DARK = 2.0  # of 255: images of smaller values were stored as 0..1


def check_guess(
    analysis: Analysis, source: CalibrationData, reopen: Callable[[Preprocess, int], CalibrationData]
) -> str:
    """Explain why the guessed preprocessing seems wrong and what to use instead; empty if it seems right.

    Args:
        analysis: The model.
        source: Its data, read by a guess or not.
        reopen: Opens some of the data with another preprocessing.
    """
    reader = source.image_reader
    if reader is None or not reader.guessed or reader.scale == 1:
        return ""
    brightest = max(_brightest(reader, feed) for feed in source.take(_FEWEST).batches(1))
    if brightest < _DARK:
        return (
            f"the brightest pixel of the images looked at is {brightest:.3g} of 255: they seem to hold values 0..1; "
            "give float arrays, or images of 0..255"
        )
    count = int(min(_SAMPLES, _AFFORDABLE / len(_CANDIDATES) / max(float(analysis.cost.original()[0]), 1.0)))
    if count < _FEWEST:
        return ""
    guessed = reader.origin.removeprefix("guess ").strip("'")
    information: dict[str, float] = {}
    most = 0.0
    for name in (guessed, *_CANDIDATES):
        if name in information:
            continue
        answers = _answers(analysis, reopen, replace(Preprocess.named(name), resize=None, crop=None), count)
        if answers is not None:
            information[name] = mutual_information(answers)
            most = float(np.log(min(answers.shape)))
    best = max(information, key=information.__getitem__, default=guessed)
    if guessed not in information or information[best] < information[guessed] + _CLEARLY * most:
        return ""
    return (
        f"the preprocessing '{guessed}' is a guess, and with '{best}' the model distinguishes {count} of the images "
        f"much better ({information[best]:.2f} nats of at most {most:.2f}, against {information[guessed]:.2f}); "
        f"give --preprocess {best} if it was trained so, or the one that it was trained with"
    )


def mutual_information(answers: FloatArray) -> float:
    """Mutual information of sample and class, in nats.

    Args:
        answers: float64 [samples, classes], probabilities.
    """

    def entropy(p: FloatArray) -> FloatArray:
        return np.asarray(-(p * np.log(np.maximum(p, 1e-12))).sum(-1))

    return float(entropy(answers.mean(0)) - entropy(answers).mean())


def _answers(
    analysis: Analysis, reopen: Callable[[Preprocess, int], CalibrationData], preprocess: Preprocess, count: int
) -> FloatArray | None:
    """Probabilities of classes, float64 [samples, classes]; None if the model gives none."""
    try:
        source = reopen(preprocess, count)
        with Session(analysis.original, EngineOptions(provider="cpu")) as session:
            runs = [session.run(feed) for feed in source.batches(_FEWEST)]
    except OnnxcopError as error:
        log.debug("trying another preprocessing: %s", error)
        return None
    for name in runs[0]:
        parts = [np.asarray(run[name]) for run in runs]
        if parts[0].dtype.kind == "f" and parts[0].ndim == 2 and parts[0].shape[1] > 2:
            return _probabilities(np.concatenate(parts).astype(np.float64))
    return None


def _probabilities(values: FloatArray) -> FloatArray:
    """Rows that sum to one: as they are, or else by a softmax."""
    if values.min() >= 0 and np.allclose(values.sum(1), 1, atol=1e-3):
        return values
    raised = np.exp(values - values.max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True))


def _brightest(reader: ImageReader, feed: Feed) -> float:
    """The largest pixel value (0..255) of images, recovered from the preprocessed ones."""
    (array,) = feed.values()
    last = array if reader.layout == "nhwc" else np.moveaxis(array, 1, -1)
    return float((last * np.asarray(reader.std or 1.0) + np.asarray(reader.mean or 0.0)).max()) / reader.scale
