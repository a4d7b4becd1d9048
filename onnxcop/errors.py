"""The exceptions of the package.

An :class:`OnnxcopError` has a cause in the user's input: a model, data, a budget, a plan, an engine. Its message is one
line that says what is wrong, where, and what to do. An :class:`InternalError` is a bug of the package itself. It is
deliberately not an :class:`OnnxcopError`, so that ``except OnnxcopError`` never hides it.
"""

from __future__ import annotations


class OnnxcopError(Exception):
    """Base of every error that the user can act upon."""


class ModelError(OnnxcopError):
    """The model cannot be read, is invalid, or holds something that is not supported."""


class CalibrationError(OnnxcopError):
    """The calibration data cannot be read or do not fit the model's inputs."""


class EngineError(OnnxcopError):
    """The execution engine is missing, refuses the model, or fails while running it."""


class BudgetError(OnnxcopError):
    """The budget cannot be met.

    Args:
        message: The message; `{bound}` in it stands for the bound.
        nearest: As the attribute.
        flag: As the attribute.
        bound: The bound that cannot be met, as text.

    Attributes:
        nearest: The nearest value that can be reached, in the budget's own unit, or None.
        flag: The option whose bound is out of reach; empty if the error has another cause.
    """

    def __init__(self, message: str, nearest: float | None = None, *, flag: str = "", bound: str = "") -> None:
        super().__init__(message.replace("{bound}", bound) if flag else message)
        self.nearest = nearest
        self.flag = flag
        self._message = message

    def with_bound(self, bound: str) -> BudgetError:
        """The same error for another bound of the same option."""
        return BudgetError(self._message, self.nearest, flag=self.flag, bound=bound)


class PlanMismatchError(OnnxcopError):
    """A saved plan, saved statistics or a table of times belong to another model."""


class VerificationError(OnnxcopError):
    """The pruned model fails a check against the original."""


class InternalError(Exception):
    """A broken invariant inside the package: a bug, not a mistake of the user."""
