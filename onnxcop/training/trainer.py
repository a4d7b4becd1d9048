"""Execution of training steps: one session with its state on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

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


def mean_of_parts(parts: Iterable[tuple[float, float, Array]]) -> tuple[float, Array]:
    """The loss and the gradient of a batch, added in the order of its parts.

    Args:
        parts: Share of the batch's samples, loss and gradient [elements] of each part; at least one.
    """
    loss, gradient = 0.0, None
    for share, one, slope in parts:
        loss += share * one
        part = np.float32(share) * slope
        gradient = part if gradient is None else np.add(gradient, part, out=gradient)
    assert gradient is not None
    return loss, gradient


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
        """Make one step on a batch that comes in parts; their gradients are mean_of_parts.

        Args:
            parts: Feeds, as :meth:`step` takes them; only one of them is computed at a time.
            shares: Share of the batch's samples in each part.
            rate: Learning rate.

        Raises:
            OutOfMemory: A part is too large.
        """
        if len(parts) == 1 and self._gradients is None:
            return self.step(parts[0], rate)
        if self._gradients is None:
            self._gradients = Session(self.split(), self._options)
        weights = {WEIGHTS: self.weights}
        results = (self._gradients.run({**part, **weights}, [LOSS, GRADIENT]) for part in parts)
        found = ((share, float(v[LOSS]), v[GRADIENT]) for share, v in zip(shares, results, strict=True))
        return self.update(*mean_of_parts(found), rate)

    def split(self) -> onnx.ModelProto:
        """Let steps be made by :meth:`update` from now on; returns the graph of a part's loss and gradient."""
        first, second = self._graph.in_two()
        state = self.state
        self._session.close()
        self._session = BoundSession(second, dict(NEXT), self._options)
        self.restore(state)
        return first

    def update(self, loss: float, gradient: Array, rate: float) -> StepResult:
        """Make one step by a gradient; it is undone if the loss or the gradient is not finite.

        Args:
            loss: Loss on the batch.
            gradient: Its gradient, float32 [elements].
            rate: Learning rate.
        """
        result = self._apply({GRADIENT: gradient}, rate, [NORM])
        return self._done(StepResult(loss, float(result[NORM])))

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
