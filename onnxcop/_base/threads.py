"""How many threads linear algebra takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def single_threaded(method: Callable[P, R]) -> Callable[P, R]:
    """Run a method with one BLAS thread.

    Its many small factorizations are faster so: threads that wait for one another cost more than they
    bring, ten times as much on a machine that has other work to do. The engine's threads are its own.
    """

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(limits=1, user_api="blas"):
            return method(*args, **kwargs)

    return run
