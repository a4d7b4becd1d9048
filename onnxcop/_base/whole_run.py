"""Progress of a whole run, from its rounds and their steps, with the time left."""

from __future__ import annotations

import time

ROUNDS = "rounds"
"""Name of the stage that counts the rounds of a run: reported with 0 of all when they begin, then after each."""

_REST = 0.3  # work after the rounds (verification, timing, figures), in rounds
_FADING = 0.8  # each finished step of the first round leaves this share of the remaining part
_ALMOST = 0.95  # largest share of a round that is shown while it runs
_EARLY = 0.03  # share of a run before which no time left is shown


class WholeRun:
    """The share of a run that is done, which never falls.

    The first round counts its finished steps, because their number is unknown. Later ones are measured
    against the mean duration of those before.
    """

    def __init__(self) -> None:
        self._began = self._round_began = time.monotonic()
        self._planned = 0.0
        self._seconds: list[float] = []
        self._finished = 0
        self._step = ""
        self._shown = 0.0

    @property
    def known(self) -> bool:
        """Whether the number of rounds is known, and with it a share of the whole."""
        return self._planned > 0

    def round(self, done: float, total: float | None) -> None:
        """Report rounds: 0 of all when they begin (those of an earlier search count as done), then each."""
        now = time.monotonic()
        if done:
            self._seconds.append(now - self._round_began)
        else:
            self._planned = len(self._seconds) + (total or 1.0)
        self._round_began, self._finished, self._step = now, 0, ""

    def step(self, stage: str, done: float, total: float | None) -> None:
        """Report a step of the current round."""
        self._finished += done == total
        self._step = stage.partition(",")[0]

    @property
    def label(self) -> str:
        """The round and its current step."""
        if len(self._seconds) >= self._planned:
            return self._step or "finishing"
        where = f"round {len(self._seconds) + 1} of {self._planned:.0f}"
        return f"{where}, {self._step}" if self._step else where

    @property
    def share(self) -> float:
        """Share of the run that is done, from 0 to 1."""
        finished, mean = len(self._seconds), sum(self._seconds) / max(len(self._seconds), 1)
        passed = time.monotonic() - self._round_began
        if finished >= self._planned:
            done = finished + _REST * min(passed / max(_REST * mean, 1e-9), _ALMOST)
        elif finished:
            done = finished + min(passed / max(mean, 1e-9), _ALMOST)
        else:
            done = 1 - _FADING**self._finished
        self._shown = max(self._shown, done / (self._planned + _REST))
        return self._shown

    @property
    def left(self) -> str:
        """The time left, in words; empty while it is unknown."""
        share = self.share
        return time_left(time.monotonic() - self._began, share) if share > _EARLY else ""


def time_left(elapsed: float, share: float) -> str:
    """The time left of a task that has taken `elapsed` seconds for a share of its work."""
    if share <= 0:
        return ""
    seconds = elapsed * (1 - share) / share
    return f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left"
