"""Progress of long steps, as bars on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from onnxcop.drawing import terminal

_PATIENCE = 1.0  # seconds a step may take before progress is shown


class Progress:
    """Bars for steps that take over a second, on a terminal only.

    Used as a context manager, and called with the name of a step, how much of it is done, and how
    much there is in all (None where that is not known).
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._bars: Any = None
        self._started: dict[str, float] = {}
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, stage: str, done: float, total: float | None = None) -> None:
        """Say how far a step has come."""
        if not self._enabled:
            return
        started = self._started.setdefault(stage, time.monotonic())
        if stage not in self._tasks:
            if time.monotonic() - started < _PATIENCE:
                return
            self._tasks[stage] = self._drawn().add_task(stage, total=total)
        self._drawn().update(self._tasks[stage], completed=done, total=total)

    def _drawn(self) -> Any:
        if self._bars is None:
            from rich import progress

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(),
                progress.TaskProgressColumn(), progress.TimeRemainingColumn(),
                console=terminal(error=True), transient=True,
            )  # fmt: skip
            self._bars.start()
        return self._bars
