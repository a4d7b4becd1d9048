"""Supervised training of any ONNX model on labelled samples, with or without a teacher."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx

from onnxcop._base.keywords import by_keywords
from onnxcop._base.progress import Progress, shown
from onnxcop._base.types import Array, Feed, IntArray
from onnxcop.data.dataset import CalibrationData
from onnxcop.data.open import open_source
from onnxcop.data.text import with_tokenizer
from onnxcop.errors import CalibrationError, EngineError, ModelError
from onnxcop.graph.input_spec import InputSpec
from onnxcop.graph.io import load, sha256
from onnxcop.graph.subgraphs import excerpt
from onnxcop.images.preprocess import Preprocess
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.training.checkpoint import digest_of
from onnxcop.training.labels import labelled, labels_of
from onnxcop.training.loop import Loop, LoopSettings
from onnxcop.training.losses import TARGET
from onnxcop.training.normalization import BatchStatistics, estimated_statistics, use_batch_statistics
from onnxcop.training.objectives import LABELS, Objective, objective
from onnxcop.training.samples import ImageView, SampleSet
from onnxcop.training.schedule import Schedule
from onnxcop.training.shards import PartOfBatch, Shards, divided
from onnxcop.training.step import Optimizer, WeightLayout, build_step, own_weights, with_weights
from onnxcop.training.steps import Course, steps_of
from onnxcop.training.teacher import Teacher
from onnxcop.training.trainer import Trainer, TrainingState

log = logging.getLogger("onnxcop")

BatchNorm = Literal["frozen", "batch"]

_ALL = 1 << 31  # more samples than there are
_ESTIMATED_ON = 2048  # samples to estimate statistics on


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneOptions:
    """Options of fine-tuning.

    Attributes:
        labels: See :func:`onnxcop.training.labels.labels_of`.
        teacher: A model whose outputs count as much as the labels, or its path.
        loss: "auto", "cross-entropy", "mse", or a small ONNX model or its path (see
            :func:`onnxcop.training.objectives.objective`).
        epochs: Passes over the samples.
        rate: The highest learning rate.
        batch_size: Samples of a step.
        decay: Weight decay of AdamW, of tensors of two and more axes.
        held_out: Share of the samples to hold out for scoring the weights.
        augment: Whether images are shifted and mirrored at random.
        batch_norm: "frozen" keeps the statistics of BatchNormalization; "batch" trains with those of the batch and
            estimates the stored ones anew.
        metric: A score of models, higher is better; None for the accuracy, or minus the squared error.
        tokenizer: The model's `tokenizer.json`, or its folder, for data that are a text file, one text a line.
        preprocess: Preprocessing of images; None for the model's declaration, or else a guess.
        samples: Number of samples to use; None for all.
        checkpoint: File for the training state; if it exists, the run resumes from it.
        seed: Random seed.
        engine: How to run models.
        progress: True for bars (on a terminal or in a notebook), or a function called with (stage, done, total).
    """

    labels: Any = None
    teacher: onnx.ModelProto | str | Path | None = None
    loss: str | Path | onnx.ModelProto = "auto"
    epochs: float = 10
    rate: float = 1e-3
    batch_size: int = 64
    decay: float = 1e-4
    held_out: float = 0.1
    augment: bool = False
    batch_norm: BatchNorm = "frozen"
    metric: Callable[[onnx.ModelProto], float] | None = None
    tokenizer: str | Path | None = None
    preprocess: Preprocess | None = None
    samples: int | None = None
    checkpoint: Path | None = None
    seed: int = 0
    engine: EngineOptions = EngineOptions()
    progress: Progress | bool | None = None


@dataclass(frozen=True, slots=True)
class Finetuned:
    """Result of fine-tuning.

    Attributes:
        model: The model with the best weights on the held-out samples.
        before: Held-out score before, higher is better.
        after: Held-out score of these weights.
        last: Held-out score of the last weights.
        steps: Number of steps.
        seconds: Wall time.
        history: Step, mean loss since the entry before, and held-out score.
        interrupted: Whether the user ended it.
    """

    model: onnx.ModelProto
    before: float
    after: float
    last: float
    steps: int
    seconds: float
    history: tuple[dict[str, float], ...] = field(repr=False)
    interrupted: bool = False

    def __str__(self) -> str:
        """A sentence for the log."""
        return (
            f"fine-tuning: held-out score {self.before:.4g} to {self.after:.4g} (last {self.last:.4g}; "
            f"{self.steps} steps, {self.seconds:.0f} s)"
        )

    def to_json(self) -> str:
        """The history, as JSON."""
        return json.dumps({"before": self.before, "after": self.after, "last": self.last, "steps": self.steps,
                           "seconds": self.seconds, "history": list(self.history)}, indent=2)  # fmt: skip


@by_keywords(FinetuneOptions)
def finetune(model: onnx.ModelProto | str | Path, data: Any, options: FinetuneOptions) -> Finetuned:
    """Train a model on labelled samples.

    Args:
        model: A path or a model in memory (never changed).
        data: Samples, as calibration data are given.
        options: The fields of :class:`onnxcop.training.finetune.FinetuneOptions`, as keyword arguments.

    Raises:
        OnnxcopError: The model, the samples, the labels, the teacher or the loss cannot be used.
    """
    with shown(options.progress) as progress:
        return _Finetuning(load(model), data, options, progress).run()


class _Finetuning:
    """One run."""

    def __init__(self, model: onnx.ModelProto, data: Any, options: FinetuneOptions, progress: Progress) -> None:
        self.model, self.options, self.progress, self.started = model, options, progress, time.monotonic()
        with Session(model, options.engine) as session:
            source, everything = self._opened(data, session.inputs)
            places = {int(number): place for place, number in enumerate(source.numbers)}
            fit, held_out = source.split(options.held_out, options.seed)
            self.fit, self.samples, self.held = fit, SampleSet.of(fit), SampleSet.of(held_out)
            self.labels, self.held_labels = (
                everything[[places[int(number)] for number in part.numbers]] for part in (fit, held_out)
            )
            self.size = source.layout.size or min(options.batch_size, fit.count)
            self.source = source
            self.example = self.held.batch(np.arange(min(self.size, self.held.count)))
            outputs = session.run(self.example)
        self.teacher = None if options.teacher is None else load(options.teacher)
        answers = None
        if self.teacher is not None:
            with Session(self.teacher, options.engine) as session:
                self._check_teacher(session)
                try:
                    answers = session.run(self.example)
                except EngineError as error:
                    raise CalibrationError(
                        f"the teacher does not run on the model's samples: {error}; give a model with the same inputs"
                    ) from None
        loss = options.loss
        if isinstance(loss, Path) or (isinstance(loss, str) and loss.endswith(".onnx")):
            loss = load(loss)
        self.objective = objective(model, outputs, everything, loss, answers)
        self.normalized = _normalized(self.objective.model, options)
        self.shards = self._shards()
        engine = self.shards.engine(options.engine)
        self.asks: Teacher | None = None
        if self.teacher is not None and not options.augment:
            self.asks = Teacher(Session(self.teacher, engine), self.samples, 1, self.objective.taught)
        self.live = Session(self.teacher, engine) if self.teacher is not None and options.augment else None

    def _opened(self, data: Any, inputs: Sequence[InputSpec]) -> tuple[CalibrationData, Array]:
        """The samples and their labels, from a stream of both or from two sources."""
        options = self.options
        with labelled(data, [one.name for one in inputs], options.labels, options.samples) as (samples, beside):
            source = open_source(
                with_tokenizer(samples, options.tokenizer), inputs,
                preprocess=options.preprocess, samples=options.samples or _ALL,
                batch_size=options.batch_size, seed=options.seed,
            )  # fmt: skip
        if source.count < 2:
            raise CalibrationError(f"fine-tuning needs at least 2 samples, but got {source.description}")
        return source, labels_of(source, samples, options.labels if beside is None else beside.array(source))

    def _check_teacher(self, session: Session) -> None:
        mine = {value.name for value in self.model.graph.input}
        other = [spec.name for spec in session.inputs if spec.name not in mine]
        if other:
            raise CalibrationError(f"the teacher reads {', '.join(other)}, which the model does not; give its original")

    def run(self) -> Finetuned:
        """Train, and keep the best weights on the held-out samples."""
        options, model = self.options, self.objective.model
        trained = own_weights(self.model, model)
        if self.normalized is not None:
            model, _ = self.normalized
        shapes = {name: array.shape for name, array in self._feed(0, np.arange(self.size)).items()}
        graph = build_step(model, Optimizer(decay=options.decay), trained, shapes, options.engine)
        for stop in graph.stops:
            log.info("the gradient stops at %s %s: %s", stop.operator, stop.node, stop.reason)
        self.start = start = graph.layout.vector(model)
        trainer = Trainer(graph, TrainingState.fresh(start), options.engine)
        before = self._score(graph.layout, start)
        if options.metric is not None and math.isnan(before):
            raise CalibrationError("--metric returned no number; return one that is higher for better models")
        total = max(1, round(options.epochs * self.shards.steps))
        settings = LoopSettings(
            Schedule(options.rate, total), evaluations=max(1, min(round(options.epochs), total)),
            checkpoint=options.checkpoint, run=self._identity(graph.layout), stage="fine-tuning", sign=-1,
            named=self.fit.named, remedy="give a lower --lr",
        )  # fmt: skip
        course = Course(_Reader(self._feed, self.shards.bounds), self.source, self.shards, options.seed)
        with closing(steps_of(trainer, course, options.engine)) as steps:
            loop = Loop(
                trainer=trainer,
                steps=steps,
                measure=lambda weights: -self._score(graph.layout, weights),
                settings=settings,
                progress=self.progress,
            )
            history = loop.run(-before)
        losses = dict(history.losses)
        entries = tuple(
            {"step": step, "loss": losses.get(step, float("nan")), "score": -score} for step, score in history.scores
        )
        made = trainer.steps
        trainer.close()
        return Finetuned(
            model=self._with_weights(self.model, graph.layout, loop.best),
            before=before,
            after=-loop.best_score,
            last=entries[-1]["score"] if entries else before,
            steps=made,
            seconds=time.monotonic() - self.started,
            history=entries,
            interrupted=history.interrupted,
        )

    def _shards(self) -> Shards:
        """Division of the samples; whole batches where the loss is no mean over samples, or may be none."""
        shards, options = Shards(self.samples.count, self.size), self.options
        own_loss = not isinstance(options.loss, str) or options.loss.endswith(".onnx")
        if own_loss or self.normalized is not None or self.source.layout.size is not None:
            return shards
        return divided(shards, self.model, (self.example, min(self.size, self.held.count)), options.engine)

    def _feed(self, epoch: int, indices: IntArray) -> Feed:
        feed = self.samples.batch(indices)
        if self.options.augment and self.samples.image is not None:
            feed = _augmented(feed, self.samples, np.random.default_rng([self.options.seed, epoch, int(indices[0])]))
        extra: Feed = {LABELS: self.labels[indices]}
        taught, answers = self.objective.taught, Feed()
        if self.asks is not None:
            answers = self.asks.answers(indices, 0, feed)
        elif self.live is not None:
            answers = self.live.run(feed, taught)
        return feed | extra | {TARGET + name: answers[name] for name in taught}

    def _score(self, layout: WeightLayout, weights: Array) -> float:
        """Score on the held-out samples, higher is better: the metric, or that of the objective, or minus its loss."""
        own = self.objective.own
        if own is not None and self.options.metric is None:
            return self._minus_loss(self._with_weights(excerpt(self.objective.model, [own]), layout, weights))
        model = self._with_weights(self.model, layout, weights)
        if self.options.metric is not None:
            return float(self.options.metric(model))
        with Session(model, self.options.engine) as session:
            outputs = [
                session.run(f, [self.objective.output])[self.objective.output] for f in self.held.batches(self.size)
            ]
        return self.objective.score(np.concatenate(outputs), self.held_labels)

    def _with_weights(self, model: onnx.ModelProto, layout: WeightLayout, weights: Array) -> onnx.ModelProto:
        """A copy of a model with other weights, and with the statistics that belong to them."""
        arrays = layout.arrays(weights)
        if self.normalized is not None and not np.array_equal(weights, self.start):
            network, nodes = self.normalized
            count = min(self.samples.count, _ESTIMATED_ON)
            starts = range(0, max(count - self.size + 1, 1), self.size)
            batches = (self.samples.batch(np.arange(s, min(s + self.size, count))) for s in starts)
            arrays |= estimated_statistics(with_weights(network, arrays), nodes, batches, self.options.engine)
        return with_weights(model, arrays)

    def _minus_loss(self, model: onnx.ModelProto) -> float:
        losses, sizes, name = [], [], model.graph.output[0].name
        with Session(model, self.options.engine) as session:
            for start in range(0, self.held.count, self.size):
                indices = np.arange(start, min(start + self.size, self.held.count))
                feed = self.held.batch(indices) | {LABELS: self.held_labels[indices]}
                losses.append(session.run({spec.name: feed[spec.name] for spec in session.inputs})[name].item())
                sizes.append(len(indices))
        return -float(np.average(losses, weights=sizes))

    def _identity(self, layout: WeightLayout) -> str:
        """Identity of a checkpoint that the run can resume from."""
        options = self.options
        teacher = None if self.teacher is None else sha256(self.teacher)
        metric = next((getattr(options.metric, key) for key in ("name", "__qualname__")
                       if hasattr(options.metric, key)), type(options.metric).__name__)  # fmt: skip
        data = digest_of({"labels": self.labels, "held": self.held_labels} | self.example)
        parts = (sha256(self.objective.model), teacher, self.source.description, data, metric, options.epochs,
                 options.rate, options.decay, options.held_out, options.augment, options.batch_norm, options.seed,
                 self.shards, layout.names)  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Reader:
    """Labelled samples of parts of batches.

    Attributes:
        read: The feed of some samples: the number of the pass, and their places.
        bounds: The first sample of every shard.
    """

    read: Callable[[int, IntArray], Feed]
    bounds: Sequence[int]

    def feed(self, part: PartOfBatch, source: CalibrationData) -> Feed:
        """The feed of a part of a batch; its samples were read before."""
        return self.read(part.epoch, self.bounds[part.shard] + part.indices)

    def load(self) -> None:
        """Nothing is left to make."""

    def close(self) -> None:
        """Nothing is open."""


def _normalized(
    model: onnx.ModelProto, options: FinetuneOptions
) -> tuple[onnx.ModelProto, tuple[BatchStatistics, ...]] | None:
    """The model with batch statistics, if requested."""
    choice, known = options.batch_norm, get_args(BatchNorm)
    if choice not in known:
        raise CalibrationError(f"--batch-norm {choice!r} does not exist; choose one of {', '.join(known)}")
    if choice == "frozen":
        return None
    normalized = use_batch_statistics(model, options.engine)
    if not normalized[1]:
        raise ModelError(
            "the model has no BatchNormalization with stored statistics (exporters fold it into convolutions); "
            "leave out --batch-norm batch, or export the model with BatchNormalization kept"
        )
    return normalized


def _augmented(feed: Feed, samples: SampleSet, rng: np.random.Generator) -> Feed:
    """Every image shifted by up to an eighth of its side, half of them mirrored."""
    assert samples.image is not None
    name, axes = samples.image
    images = feed[name]
    most = [max(1, images.shape[axis] // 8) for axis in axes]
    moved = [
        ImageView(bool(rng.random() < 0.5), *(int(rng.integers(-m, m + 1)) for m in most)).of(images[i : i + 1], axes)
        for i in range(len(images))
    ]
    return feed | {name: np.concatenate(moved)}


__all__ = ["FinetuneOptions", "Finetuned", "Objective", "finetune"]
