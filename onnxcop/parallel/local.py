"""Worker processes on this machine."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class LocalWorkers(Executor):
    """Processes that each have one thread to compute with.

    Every worker is a pool of its own. So a task can return to the worker that has something left from the last one, and
    a process that dies takes nothing but its own tasks with it.

    Args:
        count: How many.

    Attributes:
        width: How many.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"{count} workers were asked for; give 1 or more")
        self.width = count
        self._context = multiprocessing.get_context("spawn")
        self._pools: list[ProcessPoolExecutor] = [self._pool() for _ in range(count)]
        self._load = [0] * count
        self._turn = itertools.count()
        for pool in self._pools:  # they start while the caller reads its model
            pool.submit(_ready)

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=self._context, initializer=_begin)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Give a task to the worker with the fewest."""
        turn = next(self._turn)
        place = min(range(self.width), key=lambda place: (self._load[place], (place - turn) % self.width))
        return self._given(place, fn, args, kwargs)

    def submit_to(self, home: int, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Give a task to the worker of a number."""
        return self._given(home % self.width, fn, args, {})

    def _given(self, place: int, fn: Callable[..., Any], args: Any, kwargs: Any) -> Future[Any]:
        try:
            future = self._pools[place].submit(fn, *args, **kwargs)
        except BrokenProcessPool:  # the process was killed: another one takes its place
            self._pools[place].shutdown(wait=False, cancel_futures=True)
            self._pools[place] = self._pool()
            future = self._pools[place].submit(fn, *args, **kwargs)
        self._load[place] += 1
        future.add_done_callback(lambda _: self._done(place))
        return future

    def _done(self, place: int) -> None:
        self._load[place] -= 1

    def processes(self) -> list[int]:
        """The numbers of the processes that run."""
        return [number for pool in self._pools for number in (pool._processes or {})]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.shutdown(wait=wait, cancel_futures=cancel_futures)


def _begin() -> None:
    """Start a worker: one thread, no answer to Ctrl-C, and an end when the process that started it ends."""
    os.environ |= dict.fromkeys(_ONE_THREAD, "1")  # read when the libraries are loaded
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _ready() -> None:
    pass
