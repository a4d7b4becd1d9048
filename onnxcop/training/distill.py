"""Self-distillation: a pruned model learns the original's outputs on unlabelled samples.

All layers learn together, whereas closed-form recovery treats one layer after another. Samples are views of those used
for recovery. A held-out part that neither used decides at the end: the closed-form result is kept unless distillation
is closer to the original there.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import Array, Feed
from onnxcop.data.dataset import CalibrationData
from onnxcop.errors import CalibrationError
from onnxcop.graph.io import sha256
from onnxcop.outputs.batches import answers_to, outputs_on
from onnxcop.outputs.judgement import judge
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.reconstruction.divergence import Divergence, Reference
from onnxcop.runtime.session import EngineOptions, KeptSession, Session
from onnxcop.training.checkpoint import Checkpoint, digest_of
from onnxcop.training.features import Feature
from onnxcop.training.loop import Diverged, Loop, LoopSettings
from onnxcop.training.losses import TARGET, divergence_loss
from onnxcop.training.samples import PLAIN, ImageView, SampleSet, views_of
from onnxcop.training.schedule import AUTO, Effort, Schedule
from onnxcop.training.shards import Shards, divided
from onnxcop.training.step import Optimizer, StepGraph, WeightLayout, build_step, own_weights, with_weights
from onnxcop.training.steps import Course, Steps, steps_of
from onnxcop.training.teacher import Lesson
from onnxcop.training.trainer import Trainer, TrainingState

log = logging.getLogger("onnxcop")

_TEMPERATURE = 4.0  # improvement of the divergence on the held-out set
_HELD_OUT = 1 / 8  # share of the samples; at least
_FEWEST_HELD_OUT = 128  # of them, up to a third
_MOST_HELD_OUT = 4096  # of them; more take time and memory, and tell nothing more
_VIEWS = 8
_BEARABLE = 0.8  # agreement of the original with itself on another view that makes the view usable
_RATES = (1e-3, 3e-4, 1e-4, 3e-5)
_TRIAL = 1 / 8  # share of the steps spent on trying one rate
_BETTER = 0.97  # of the closed form's divergence, that a trial must reach
_FEWEST_STEPS = 12  # steps of a trial
_MEASURED = 3  # steps to time
_EVALUATIONS = 4  # evaluations on the held-out samples, the last at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions:
    """Options of distillation.

    Attributes:
        effort: Length of the training.
        rate: The highest learning rate; None to find it by short trials scored on the held-out samples.
        batch_size: Samples of a step.
        seed: Random seed.
        checkpoint: File for the training state; if it exists, the run resumes from it.
        engine: How to run models.
    """

    effort: Effort = AUTO
    rate: float | None = None
    batch_size: int = 64
    seed: int = 0
    checkpoint: Path | None = None
    engine: EngineOptions = EngineOptions()


@dataclass(frozen=True, slots=True)
class Distilled:
    """Result of distillation.

    Attributes:
        model: The better model: the distilled or the unchanged one.
        before: Distance from the original on held-out samples before.
        after: Distance afterwards; equal to `before` if there was no improvement.
        kept: Whether the distilled weights are in the model.
        rate: The highest learning rate.
        steps: Number of steps.
        views: Number of views of each sample.
        seconds: Wall time.
        interrupted: Whether the user ended it.
        stops: Nodes that gradients do not pass, in words.
        agreement_name: Name of the agreement of the two divergences.
    """

    model: onnx.ModelProto
    before: Divergence
    after: Divergence
    kept: bool
    rate: float
    steps: int
    views: int
    seconds: float
    interrupted: bool
    stops: tuple[str, ...]
    agreement_name: str = "agreement"

    def __str__(self) -> str:
        """A sentence for the log."""
        size = f"{self.steps} steps at {self.rate:g}, {self.seconds:.0f} s"
        if not self.kept:
            return f"distillation did not improve on held-out samples ({size}): the result in closed form is kept"
        agreed = ""
        if self.before.agreement is not None and self.after.agreement is not None:
            agreed = f", agreement {self.before.agreement:.1%} to {self.after.agreement:.1%}"
        return f"distillation: held-out divergence {self.before.value:.4g} to {self.after.value:.4g}{agreed} ({size})"


def distill(
    student: onnx.ModelProto, teacher: onnx.ModelProto, source: CalibrationData,
    options: DistillOptions = DistillOptions(), progress: Progress = silent, feature: Feature | None = None,
    crew: Crew = HERE,
) -> Distilled:  # fmt: skip
    """Train a model to match the outputs of another with the same inputs and outputs.

    Args:
        student: The model to train; not changed.
        teacher: The model with the target outputs.
        source: Samples; no labels are needed.
        options: Options of the training.
        progress: Called with (stage, done, total).
        feature: An inner tensor to match besides the outputs.
        crew: Computes the gradients of a step, each worker those of its shard of the samples.

    Raises:
        CalibrationError: There are too few samples, or they are of different shapes.
        ModelError: The outputs differ, no gradient reaches a weight, or the loss is not finite at any rate.
    """
    return _Distillation(
        student=student, teacher=teacher, source=source, options=options, progress=progress, feature=feature, crew=crew
    ).run()


class _Distillation:
    """One run."""

    def __init__(
        self, student: onnx.ModelProto, teacher: onnx.ModelProto, source: CalibrationData, options: DistillOptions,
        progress: Progress, feature: Feature | None, crew: Crew,
    ) -> None:  # fmt: skip
        self.student, self.teacher_model, self.options, self.progress = student, teacher, options, progress
        self.source, self.crew, self.started = source, crew, time.monotonic()
        if source.count < 8:
            raise CalibrationError(f"distillation needs at least 8 samples, but got {source.description}")
        share = min(1 / 3, max(_HELD_OUT, _FEWEST_HELD_OUT / source.count), _MOST_HELD_OUT / source.count)
        self.split = share, options.seed
        self.fit, held_out = source.split(*self.split)
        self.size = source.layout.size or min(options.batch_size, self.fit.count)
        self.held_data, self.held = held_out.in_batches_of(self.size), SampleSet.of(held_out)
        outputs = self._outputs(teacher)
        counts = [_count(feed, self.held) for feed in self.held.batches(self.size)]
        judgements = judge(outputs, counts, teacher)
        self.reference = Reference(outputs, judgements=judgements, counts=counts)
        self.views = self._bearable_views()
        learner, features = student, dict[str, Array]()
        if feature is not None:
            both = feature.of_student(student), feature.of_teacher(teacher)
            values = _in_one_basis(feature.name, *both, next(self.held.batches(self.size)), options.engine)
            if values is not None:
                learner, teacher, features = *both, {feature.name: values}
        self.loss = divergence_loss(learner, judgements, outputs, features)
        targets = tuple(v.name.removeprefix(TARGET) for v in self.loss.graph.input if v.name.startswith(TARGET))
        feed = next(self.held.batches(self.size))
        with Session(teacher, options.engine) as session:
            self.example = feed, {TARGET + name: array for name, array in session.run(feed, targets).items()}
        shards = Shards(self.fit.count, self.size)
        if source.layout.size is None:
            shards = divided(shards, student, (feed, _count(feed, self.held)), options.engine)
        kept = KeptSession(teacher, shards.engine(options.engine))
        self.lesson = Lesson(kept, self.split, self.views, targets, shards=shards)
        self.softened = self.reference.softened(_TEMPERATURE)

    def _outputs(self, model: onnx.ModelProto, view: ImageView = PLAIN) -> list[Feed]:
        """Outputs of a model on the held-out samples, batch by batch."""
        engine = self.options.engine
        if self.crew.spread and view == PLAIN:
            return [outputs for _, outputs in outputs_on(model, self.held_data, engine, self.crew)]
        return list(answers_to(model, self.held.batches(self.size, view), engine, self.crew))

    def _bearable_views(self) -> Sequence[ImageView]:
        """Views on which the original predicts the same as on the plain images; else only the plain ones."""
        views = views_of(self.held, _VIEWS, self.options.seed)
        if len(views) == 1 or not all(len(j.kind.tasks) and "classify" in j.kind.tasks and
                                      self.reference.outputs[0][j.outputs[0]].ndim == 2
                                      for j in self.reference.judgements.entries):  # fmt: skip
            return [PLAIN]

        def agreement(view: ImageView) -> float:
            return self.reference.compare(self._outputs(self.teacher_model, view)).agreement or 0.0

        moved = [view for view in views[1:] if not view.mirrored]
        mirrored = [view for view in views[1:] if view.mirrored]
        kept = [PLAIN]
        for some in (moved, mirrored):
            shares = [agreement(view) for view in some]
            if shares and float(np.mean(shares)) >= _BEARABLE:
                kept += some
        return kept

    def run(self) -> Distilled:
        """Find the rate, train, and choose on the held-out samples."""
        feed, targets = self.example
        shapes = {name: array.shape for name, array in (feed | targets).items()}
        graph = build_step(self.loss, Optimizer(), own_weights(self.student, self.loss), shapes, self.options.engine)
        start = graph.layout.vector(self.loss)
        trainer = Trainer(graph, TrainingState.fresh(start), self.options.engine)
        before = self._divergence(graph.layout, start, self.reference)
        score = self._divergence(graph.layout, start, self.softened).value
        course = Course(self.lesson, self.source, self.lesson.shards, self.options.seed)
        with closing(steps_of(trainer, course, self.options.engine, self.crew)) as steps:
            rate, loop = self._trained(trainer, steps, graph, start, score)
        kept = loop.best_score < score
        after = self._divergence(graph.layout, loop.best, self.reference) if kept else before
        model = with_weights(self.student, graph.layout.arrays(loop.best)) if kept else self.student
        made = trainer.steps
        trainer.close()
        return Distilled(
            model=model,
            before=before,
            after=after,
            kept=kept,
            rate=rate,
            steps=made,
            views=len(self.views),
            seconds=time.monotonic() - self.started,
            interrupted=loop.history.interrupted,
            stops=tuple(f"{s.operator} {s.node}: {s.reason}" for s in graph.stops),
            agreement_name=self.reference.agreement_name,
        )

    def _divergence(self, layout: WeightLayout, weights: Array, reference: Reference) -> Divergence:
        return reference.compare(self._outputs(with_weights(self.student, layout.arrays(weights))))

    def _affordable(self, trainer: Trainer, steps: Steps, start: Array) -> int:
        """The number of steps that the effort allows."""
        effort = self.options.effort
        most = math.inf if effort.epochs is None else max(1, round(effort.epochs * self.lesson.shards.steps))
        if effort.seconds is None:
            return int(most)
        times = []
        for number in range(_MEASURED + 1):
            begun = time.monotonic()
            steps.make(number, 0.0)
            times.append(time.monotonic() - begun)
        trainer.restore(TrainingState.fresh(start))
        left = effort.seconds - (time.monotonic() - self.started)
        return int(min(most, max(1, left // (1.1 * min(times[1:])))))

    def _trained(
        self, trainer: Trainer, steps: Steps, graph: StepGraph, start: Array, score: float
    ) -> tuple[float, Loop]:
        """Train at the given rate, at that of the checkpoint, or at the best of short trials; Ctrl-C ends it early."""
        run = self._identity(graph.layout)

        def made(rate: float, count: int, stage: str, evaluations: int, checkpoint: Path | None = None) -> Loop:
            trainer.restore(TrainingState.fresh(start))
            settings = LoopSettings(
                schedule=Schedule(rate, count),
                evaluations=evaluations,
                checkpoint=checkpoint,
                run=run,
                stage=stage,
                named=self.fit.named,
                remedy="leave --distill out",
            )
            loop = Loop(
                trainer=trainer,
                steps=steps,
                measure=lambda weights: self._divergence(graph.layout, weights, self.softened).value,
                settings=settings,
                progress=self.progress,
            )
            loop.run(score)
            return loop

        path = self.options.checkpoint
        earlier = None if path is None else Checkpoint.load(path, run)
        if earlier is not None:
            rate = float(earlier.notes["rate"])
            return rate, made(rate, int(earlier.notes["steps"]), "distillation", _EVALUATIONS, path)
        total = left = self._affordable(trainer, steps, start)
        rate = self.options.rate or _RATES[-1]
        count = max(_FEWEST_STEPS, round(_TRIAL * total))
        for trial in _RATES if self.options.rate is None else ():
            left -= count
            try:
                loop = made(trial, count, f"trial at {trial:g}", 1)
            except Diverged as reason:
                log.info("a rate of %g is too high: %s", trial, reason)
                continue
            if loop.history.interrupted:
                return trial, loop
            if loop.best_score < _BETTER * score:
                rate = trial  # lower rates may win in such a short trial and lose at the end
                break
        if self.options.effort.seconds is None:
            left = total
        return rate, made(rate, max(left, 1), "distillation", _EVALUATIONS, path)

    def _identity(self, layout: WeightLayout) -> str:
        """Identity of a checkpoint that the run can resume from."""
        options, lesson = self.options, self.lesson
        feed, _ = self.example
        parts = (sha256(self.student), sha256(self.teacher_model), self.source.description, digest_of(feed),
                 options.effort, options.rate, options.seed, lesson.shards, layout.names, lesson.targets)  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def _in_one_basis(
    name: str, student: onnx.ModelProto, teacher: onnx.ModelProto, feed: Feed, engine: EngineOptions
) -> Array | None:
    """The teacher's values of a tensor; None if the student's, in another basis, are no nearer to them than zeros."""
    values = []
    for model in (student, teacher):
        with Session(model, engine) as session:
            values.append(session.run(feed, [name])[name].astype(np.float64))
    ours, theirs = values
    return theirs if np.square(ours - theirs).sum() < np.square(theirs).sum() else None


def _count(feed: Mapping[str, Array], samples: SampleSet) -> int:
    """Number of samples in a feed."""
    name, axis = next(((n, a) for n, a in samples.axes.items() if a is not None), ("", None))
    return 1 if axis is None else feed[name].shape[axis]


__all__ = ["DistillOptions", "Distilled", "Effort", "distill"]
