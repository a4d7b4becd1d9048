"""Execution of training steps: one session with its state on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import Array, Feed
from onnxcop.runtime.bound import BoundSession
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.training.losses import LOSS
from onnxcop.training.step import FIRST, GRADIENT, NEXT, NORM, RATE, SECOND, STEP, WEIGHTS, StepGraph


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Everything that a run needs to resume.

    Attributes:
        weights: float32 [elements].
        first: First moments, like it.
        second: Second moments.
        step: Number of finished steps.
    """

    weights: Array
    first: Array
    second: Array
    step: int

    @classmethod
    def fresh(cls, weights: Array) -> TrainingState:
        """The state before the first step."""
        return cls(weights.copy(), np.zeros_like(weights), np.zeros_like(weights), 0)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of a step.

    Attributes:
        loss: Loss on the batch, before the step.
        norm: Norm of the gradient, before clipping.
    """

    loss: float
    norm: float

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Trainer:
    """Runs training steps.

    Args:
        graph: The step.
        state: The initial state.
        options: How to run it.

    Raises:
        EngineError: ONNX Runtime refuses the graph.
    """

    def __init__(self, graph: StepGraph, state: TrainingState, options: EngineOptions = EngineOptions()) -> None:
        self.layout, self._graph, self._options = graph.layout, graph, options
        self._gradients: Session | None = None
        self._session = BoundSession(graph.model, dict(NEXT), options)
        self.restore(state)

    def restore(self, state: TrainingState) -> None:
        """Continue from a state."""
        self._session.set_state({WEIGHTS: state.weights, FIRST: state.first, SECOND: state.second})
        self._steps = state.step

    def step(self, feeds: Mapping[str, Array], rate: float) -> StepResult:
        """Make one step; it is undone if its loss or gradient is not finite.

        Args:
            feeds: Inputs of the model, and targets.
            rate: Learning rate.

        Raises:
            OutOfMemory: The batch is too large.
        """
        values = self._apply(feeds, rate, [LOSS, NORM])
        return self._done(StepResult(float(values[LOSS]), float(values[NORM])))

    def step_in_parts(self, parts: Sequence[Mapping[str, Array]], shares: Sequence[float], rate: float) -> StepResult:
        """Make one step on a batch that comes in parts; their gradients are averaged.

        Args:
            parts: Feeds, as :meth:`step` takes them; only one of them is computed at a time.
            shares: Share of the batch's samples in each part.
            rate: Learning rate.

        Raises:
            OutOfMemory: A part is too large.
        """
        if len(parts) == 1 and self._gradients is None:
            return self.step(parts[0], rate)
        gradients = self._split()
        weights = {WEIGHTS: self.weights}
        loss, gradient = 0.0, np.zeros_like(weights[WEIGHTS])
        for part, share in zip(parts, shares, strict=True):
            values = gradients.run({**part, **weights}, [LOSS, GRADIENT])
            loss += share * float(values[LOSS])
            gradient += np.float32(share) * values[GRADIENT]
        result = self._apply({GRADIENT: gradient}, rate, [NORM])
        return self._done(StepResult(loss, float(result[NORM])))

    def _split(self) -> Session:
        """Run the gradient and the update separately from now on."""
        if self._gradients is None:
            first, second = self._graph.in_two()
            state = self.state
            self._session.close()
            self._session = BoundSession(second, dict(NEXT), self._options)
            self.restore(state)
            self._gradients = Session(first, self._options)
        return self._gradients

    def _apply(self, feeds: Mapping[str, Array], rate: float, outputs: Sequence[str]) -> Feed:
        scalars = {RATE: np.asarray(rate, np.float32), STEP: np.asarray(self._steps + 1, np.float32)}
        return self._session.run_bound({**feeds, **scalars}, outputs)

    def _done(self, result: StepResult) -> StepResult:
        """Accept the result of a step if it is finite."""
        if result.finite:
            self._session.advance()
            self._steps += 1
        return result

    @property
    def steps(self) -> int:
        """Number of finished steps."""
        return self._steps

    @property
    def state(self) -> TrainingState:
        """A copy of the state from which a run can resume."""
        current = self._session.state()
        return TrainingState(current[WEIGHTS], current[FIRST], current[SECOND], self._steps)

    @property
    def weights(self) -> Array:
        """A copy of the current weights, float32 [elements]."""
        return self._session.state([WEIGHTS])[WEIGHTS]

    def close(self) -> None:
        """Free the sessions."""
        self._session.close()
        if self._gradients is not None:
            self._gradients.close()
