"""The training loop of distillation and fine-tuning.

The order of samples and views follows from the seed and the step number alone, and the schedule from the number of
steps, which is fixed at the start. So a run that resumes from a checkpoint makes the same steps as one that was never
stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import Array, IntArray
from onnxcop.errors import ModelError
from onnxcop.training.checkpoint import Checkpoint
from onnxcop.training.schedule import Schedule
from onnxcop.training.steps import Steps
from onnxcop.training.trainer import StepResult, Trainer

log = logging.getLogger("onnxcop")

_HALVINGS = 3  # factor of the rate after steps without a finite loss
_SAVED_EVERY = 20.0  # seconds between checkpoints


class Diverged(ModelError):
    """The loss is not finite, not even at a lower rate."""


def _numbered(places: IntArray) -> str:
    return "samples " + ", ".join(map(str, np.sort(places)))


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """Settings of the loop.

    Attributes:
        schedule: The learning rate and the number of steps.
        evaluations: Number of evaluations, including the end.
        checkpoint: File for the training state.
        run: Identity of the run.
        stage: Name of the stage in the progress display.
        sign: Factor of scores in the log: -1 where higher was better before `measure` turned it round.
        named: Names samples by their places, for messages.
        remedy: What to do if the loss stays infinite, for messages.
    """

    schedule: Schedule
    evaluations: int = 4
    checkpoint: Path | None = None
    run: str = ""
    stage: str = "training"
    sign: int = 1
    named: Callable[[IntArray], str] = _numbered
    remedy: str = "give a lower rate"


@dataclass
class History:
    """Record of a run.

    Attributes:
        losses: Mean loss of the steps since the last evaluation, with the number of the step.
        scores: The scores, with the number of the step; lower is better.
        interrupted: Whether the user ended it.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    interrupted: bool = False


class Loop:
    """Training steps over samples, with regular evaluations.

    Args:
        trainer: Holds the weights.
        steps: Makes the steps.
        measure: Scores weights (lower is better).
        settings: Settings of the loop.
        progress: Called with (stage, done, total).
    """

    def __init__(
        self, trainer: Trainer, steps: Steps, measure: Callable[[Array], float], settings: LoopSettings,
        progress: Progress = silent,
    ) -> None:  # fmt: skip
        self.trainer, self.steps, self.measure = trainer, steps, measure
        self.settings, self.progress = settings, progress
        self.history = History()
        self.best, self.best_score = trainer.weights, float("inf")
        self._factor = 1.0
        self._halvings = 0
        self._recent: list[float] = []
        self._saved = time.monotonic()

    def run(self, score: float) -> History:
        """Train to the end of the schedule, or until Ctrl-C.

        Args:
            score: The score of the weights at the start.

        Raises:
            Diverged: The loss is not finite even after the rate was halved.
            OutOfMemory: A single sample does not fit.
        """
        total, started = self.settings.schedule.steps, time.monotonic()
        self.best, self.best_score = self.trainer.weights, score
        self._resume()
        begun = self.trainer.steps
        evaluated = {round(total * (k + 1) / self.settings.evaluations) for k in range(self.settings.evaluations)}
        try:
            while self.trainer.steps < total:
                self._step(self.trainer.steps)
                done = self.trainer.steps
                if done in evaluated:
                    self._evaluate(done, total, (time.monotonic() - started) / (done - begun))
                self.progress(self.settings.stage, done, total)
                self._save_now_and_then(done in evaluated)
        except KeyboardInterrupt as stop:
            if type(stop) is not KeyboardInterrupt:  # the process must end at once
                raise
            self.history.interrupted = True
            log.warning("stopped after %d of %d steps; the best so far is kept", self.trainer.steps, total)
            self._score(self.trainer.steps)
        return self.history

    def _step(self, number: int) -> None:
        """One step; if its loss is not finite, it is undone and the rate is halved."""
        result, indices = self._attempt(number)
        while not result.finite:
            self._halvings += 1
            self._factor /= 2
            if self._halvings > _HALVINGS:
                raise Diverged(
                    f"the loss is {result.loss:g} at step {number + 1} although the rate was halved {_HALVINGS} times; "
                    f"look at the batch ({self.settings.named(indices)}), or {self.settings.remedy}"
                )
            log.warning("the loss is not a number at step %d: the step is undone and the rate halved", number + 1)
            result, indices = self._attempt(number)
        self._recent.append(result.loss)

    def _attempt(self, number: int) -> tuple[StepResult, IntArray]:
        schedule = self.settings.schedule
        return self.steps.make(number, schedule.at(number) * self._factor, last=number + 1 == schedule.steps)

    def _evaluate(self, done: int, total: int, seconds: float) -> None:
        loss = float(np.mean(self._recent)) if self._recent else float("nan")
        self.history.losses.append((done, loss))
        self._recent = []
        score = self._score(done)
        log.info(
            "%s: step %d of %d, loss %.4g, held-out %.4g, %.0f s left",
            self.settings.stage, done, total, loss, self.settings.sign * score + 0.0, seconds * (total - done),
        )  # fmt: skip

    def _score(self, done: int) -> float:
        weights = self.trainer.weights
        score = self.measure(weights)
        self.history.scores.append((done, score))
        if score < self.best_score:
            self.best, self.best_score = weights, score
        return score

    def _save_now_and_then(self, worth: bool) -> None:
        path = self.settings.checkpoint
        if path is None or not (worth or time.monotonic() - self._saved > _SAVED_EVERY):
            return
        self._saved = time.monotonic()
        notes = {
            "best": self.best_score, "factor": self._factor, "halvings": self._halvings,
            "steps": self.settings.schedule.steps, "rate": self.settings.schedule.rate,
            "losses": self.history.losses, "scores": self.history.scores, "recent": self._recent,
        }  # fmt: skip
        Checkpoint(self.settings.run, self.trainer.state, self.best, notes).save(path)

    def _resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if self.settings.checkpoint is None:
            return
        checkpoint = Checkpoint.load(self.settings.checkpoint, self.settings.run)
        if checkpoint is None:
            return
        self.trainer.restore(checkpoint.state)
        self.best, self.best_score = checkpoint.best, float(checkpoint.notes["best"])
        self._factor, self._halvings = float(checkpoint.notes["factor"]), int(checkpoint.notes["halvings"])
        self._recent = [float(loss) for loss in checkpoint.notes["recent"]]
        self.history.losses = [(int(step), float(loss)) for step, loss in checkpoint.notes["losses"]]
        self.history.scores = [(int(step), float(score)) for step, score in checkpoint.notes["scores"]]
        log.info("resuming from %s at step %d", self.settings.checkpoint, checkpoint.state.step)
