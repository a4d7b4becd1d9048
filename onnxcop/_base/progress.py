"""Progress of a run: a callback of the caller, bars on a terminal or in a notebook, or lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from types import TracebackType
from typing import Any

from onnxcop._base.formatting import terminal
from onnxcop._base.whole_run import ROUNDS, WholeRun, time_left

Progress = Callable[[str, float, float | None], None]
"""Called with the name of a step, how much of it is done, and the total (None: unknown)."""

log = logging.getLogger("onnxcop")

_PATIENCE = 1.0  # seconds that a step takes before progress is shown
_WORTH = 5.0  # seconds that a step takes before it gets a line of its own, without a terminal
_SPARSE = 60.0  # seconds between two lines on the same step
_EVERY = 0.2  # seconds between two updates in a notebook


def silent(stage: str, done: float, total: float | None = None) -> None:
    """Report nothing."""


class ProgressLines:
    """Log a line when a step is over, and now and then during it, if it takes long enough."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._heard = self._started = self._said = time.monotonic()

    def __call__(self, stage: str, done: float, total: float | None = None) -> None:
        """Report the progress of a step."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started, self._said = stage, self._heard, self._heard
        self._heard = now
        if done == total:
            self._stage = None
            if now - self._started >= _WORTH:
                log.info("%s: done in %.0f s", stage, now - self._started)
        elif now - self._said >= _SPARSE:
            self._said = now
            log.info("%s: %s after %.0f s", stage, f"{done / total:.0%}" if total else done, now - self._started)


class ProgressBars:
    """One bar: for the whole run if its rounds are known, else for a step that takes over a second.

    It shows the time left. If there is no terminal, log lines take its place.
    Used as a context manager, and called with the name of a step, how much of it is done, and the total (None if
    unknown). Lines written to standard error meanwhile appear above the bar.

    Args:
        enabled: False for silence.
        lines: Whether to write log lines if there is no terminal.
    """

    def __init__(self, *, enabled: bool = True, lines: bool = True) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._lines = ProgressLines() if enabled and lines and not self._enabled else None
        self._whole = WholeRun() if self._enabled else None
        self._bars: Any = None
        self._stage: str | None = None
        self._started = 0.0
        self._task: Any = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def pause(self) -> None:
        """Hide the bar so that something else can be written; it returns with the next step."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._stage = self._task = None

    def __call__(self, stage: str, done: float, total: float | None = None) -> None:
        """Report the progress of a step."""
        if self._lines is not None and stage != ROUNDS:
            self._lines(stage, done, total)
        if self._whole is None:
            return
        if stage == ROUNDS:
            self._whole.round(done, total)
        elif self._whole.known:
            self._whole.step(stage, done, total)
        if self._whole.known:
            self._show_whole(self._whole)
        else:
            self._show_step(stage, done, total)

    def _show_whole(self, whole: WholeRun) -> None:
        if self._task is None or self._stage != ROUNDS:
            if self._task is not None:
                self._drawn().remove_task(self._task)
            self._stage, self._task = ROUNDS, self._drawn().add_task("", total=1.0, left="")
        self._drawn().update(self._task, completed=whole.share, description=whole.label, left=whole.left)

    def _show_step(self, stage: str, done: float, total: float | None) -> None:
        now = time.monotonic()
        if stage != self._stage or done == total:
            if self._task is not None:
                self._drawn().remove_task(self._task)
            self._stage, self._started, self._task = stage, now, None
        if done == total:
            return
        if self._task is None:
            if now - self._started < _PATIENCE:
                return
            self._task = self._drawn().add_task(stage, total=total, left="")
        left = time_left(now - self._started, done / total) if total else ""
        self._drawn().update(self._task, completed=done, total=total, left=left)

    def _drawn(self) -> Any:
        if self._bars is None:
            from rich import progress

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(),
                progress.TaskProgressColumn(), progress.TextColumn("{task.fields[left]}"),
                console=terminal(error=True), transient=True,
            )  # fmt: skip
            self._bars.start()
        return self._bars


def in_notebook() -> bool:
    """Whether this is a kernel that shows HTML, as in Jupyter."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


class NotebookBars:
    """Bars in the output of a notebook's cell, without widgets; removed when the run is over."""

    def __init__(self) -> None:
        self._whole = WholeRun()
        self._steps: dict[str, tuple[float, float | None]] = {}
        self._drawn = 0.0
        self._handle: Any = None

    def __enter__(self) -> NotebookBars:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._handle is not None:
            self._show("")

    def __call__(self, stage: str, done: float, total: float | None = None) -> None:
        """Report the progress of a step."""
        if stage == ROUNDS:
            self._whole.round(done, total)
        elif self._whole.known:
            self._whole.step(stage, done, total)
        if self._whole.known:
            self._steps = {", ".join(filter(None, (self._whole.label, self._whole.left))): (self._whole.share, 1.0)}
        else:
            self._steps[stage] = (done, total)
        now = time.monotonic()
        if now - self._drawn >= _EVERY or done == total:
            self._drawn = now
            self._show("".join(_bar(name, *state) for name, state in self._steps.items()))

    def _show(self, html: str) -> None:
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(html), display_id=True)
        else:
            self._handle.update(HTML(html))


def _bar(name: str, done: float, total: float | None) -> str:
    known = f' value="{done:g}" max="{total:g}"' if total else ""
    share = f"{done / total:.0%}" if total else f"{done:g}"
    return f"<div><progress{known}></progress> {share} {escape(name)}</div>"


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress]:
    """The callback that a run reports to.

    Args:
        progress: A callback of the caller, True for bars if they can be shown (on a terminal or in a notebook), None or
            False for silence.
    """
    if not progress:
        yield silent
    elif callable(progress):
        yield progress
    elif in_notebook():
        with NotebookBars() as bars:
            yield bars
    else:
        with ProgressBars() as terminal:
            yield terminal
