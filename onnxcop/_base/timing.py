"""Seconds of the stages of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar


class Clock:
    """Adds up the seconds of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


P = ParamSpec("P")
R = TypeVar("R")


def single_threaded(method: Callable[P, R]) -> Callable[P, R]:
    """Run a method with one BLAS thread.

    Many small factorizations are faster this way: threads that wait for one another cost more than they gain, ten times
    as much on a busy machine. The threads of ONNX Runtime are not affected.
    """

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(limits=1, user_api="blas"):
            return method(*args, **kwargs)

    return run
