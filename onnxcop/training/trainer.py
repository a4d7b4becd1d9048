"""Running training steps: one session, its state bound where it is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcop._base.types import Array
from onnxcop.runtime.bound import BoundSession
from onnxcop.runtime.session import EngineOptions
from onnxcop.training.losses import LOSS
from onnxcop.training.step import FIRST, NEXT, NORM, RATE, SECOND, STEP, WEIGHTS, StepGraph


@dataclass(frozen=True, slots=True)
class TrainingState:
    """All that a run needs to resume.

    Attributes:
        weights: float32 [elements].
        first: First moments, like it.
        second: Second moments.
        step: Steps that were made.
    """

    weights: Array
    first: Array
    second: Array
    step: int

    @classmethod
    def fresh(cls, weights: Array) -> TrainingState:
        """Before the first step."""
        return cls(weights.copy(), np.zeros_like(weights), np.zeros_like(weights), 0)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step reports.

    Attributes:
        loss: Before the step, on its batch.
        norm: Of the gradient, before clipping.
    """

    loss: float
    norm: float

    @property
    def finite(self) -> bool:
        """Whether the step counts."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Trainer:
    """Makes steps.

    Args:
        graph: The step.
        state: What to begin with.
        options: How to run it.

    Raises:
        EngineError: ONNX Runtime refuses the graph.
    """

    def __init__(self, graph: StepGraph, state: TrainingState, options: EngineOptions = EngineOptions()) -> None:
        self.layout = graph.layout
        self._session = BoundSession(graph.model, dict(NEXT), options)
        self.restore(state)

    def restore(self, state: TrainingState) -> None:
        """Go on from a state."""
        self._session.set_state({WEIGHTS: state.weights, FIRST: state.first, SECOND: state.second})
        self._steps = state.step

    def step(self, feeds: Mapping[str, Array], rate: float) -> StepResult:
        """Make one step; one whose loss or gradient is not finite is undone.

        Args:
            feeds: Inputs of the model, and targets.
            rate: Learning rate.

        Raises:
            OutOfMemory: The batch is too large.
        """
        scalars: dict[str, Any] = {RATE: np.float32(rate), STEP: np.float32(self._steps + 1)}
        values = self._session.run_bound({**feeds, **{k: np.asarray(v) for k, v in scalars.items()}}, [LOSS, NORM])
        result = StepResult(float(values[LOSS]), float(values[NORM]))
        if result.finite:
            self._session.advance()
            self._steps += 1
        return result

    def step_in_parts(self, parts: Sequence[Mapping[str, Array]], rate: float) -> StepResult:
        """One step on a batch that comes in parts: parts of a batch that is too large become steps of their own.

        Each part is a step at the rate over the root of their number, which keeps the noise of the whole.
        """
        results = [self.step(part, rate / math.sqrt(len(parts))) for part in parts]
        if len(results) > 1:
            self._steps -= sum(result.finite for result in results) - 1
        losses = [result.loss for result in results]
        return StepResult(float(np.mean(losses)), max(result.norm for result in results))

    @property
    def steps(self) -> int:
        """Steps that were made."""
        return self._steps

    @property
    def state(self) -> TrainingState:
        """A copy of what a run needs to resume."""
        held = self._session.state()
        return TrainingState(held[WEIGHTS], held[FIRST], held[SECOND], self._steps)

    @property
    def weights(self) -> Array:
        """A copy of the weights as they are, float32 [elements]."""
        return self._session.state([WEIGHTS])[WEIGHTS]

    def close(self) -> None:
        """Free the session."""
        self._session.close()
