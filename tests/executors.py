"""Executors that do what a cluster may do: finish in any order, lose workers, see no files."""

import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from onnxcop.parallel.local import LocalWorkers


class AnyOrder(Executor):
    """One thread that carries out tasks in a random order of those that wait."""

    width = 4

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._waiting: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []
        self._there = threading.Condition()
        self._open = True
        self.order: list[int] = []
        self._given = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._there:
            self._waiting.append((future, lambda number=self._given: self._carry_out(number, fn, args), ()))
            self._given += 1
            self._there.notify()
        return future

    def _carry_out(self, number: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self.order.append(number)
        return fn(*args)

    def _work(self) -> None:
        while True:
            with self._there:
                while self._open and not self._waiting:
                    self._there.wait()
                if not self._waiting:
                    return
                future, task, _ = self._waiting.pop(self._random.randrange(len(self._waiting)))
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except BaseException as error:
                    future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._there:
            self._open = False
            self._there.notify()
        if wait:
            self._thread.join()


class Homes(Executor):
    """Threads that each have a number, as workers that keep something between tasks.

    Args:
        width: How many.
        lost: Whether the worker of a task dies, by the number of the task; a new one takes its place.
    """

    def __init__(self, width: int, lost: Callable[[int], bool] = lambda number: False) -> None:
        self.width, self.lost, self.given = width, lost, 0
        self.tasks_of = [0] * width
        self._threads = [ThreadPoolExecutor(1) for _ in range(width)]

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.submit_to(self.given, fn, *args)

    def submit_to(self, home: int, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        self.given += 1
        home %= self.width
        self.tasks_of[home] += 1
        if self.lost(self.given):
            self._threads[home].shutdown()
            self._threads[home] = ThreadPoolExecutor(1)
            future: Future[Any] = Future()
            future.set_exception(ConnectionError("the worker is gone"))
            return future
        return self._threads[home].submit(fn, *args)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for threads in self._threads:
            threads.shutdown(wait)


class Lossy(Executor):
    """Carries tasks out at once, and loses some of them as a worker that dies does.

    Args:
        lost: Whether the worker of a task dies, by the number of the task.
        refuses: The number of the task from which on none is taken.
    """

    width = 2

    def __init__(self, lost: Callable[[int], bool], refuses: float = float("inf")) -> None:
        self.lost, self.refuses, self.given = lost, refuses, 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.given += 1
        if self.given > self.refuses:
            raise ConnectionError("the scheduler is gone")
        future: Future[Any] = Future()
        if self.lost(self.given):
            future.set_exception(ConnectionError("the worker is gone"))
        else:
            future.set_result(fn(*args))
        return future


class Mortal(LocalWorkers):
    """Kills a worker now and then, while it works."""

    given = killed = 0

    def _given(self, place: int, fn: Any, args: Any, kwargs: Any) -> Any:
        future = super()._given(place, fn, args, kwargs)
        self.given += 1
        if self.given % 50 == 20:
            self.killed += 1
            os.kill(next(iter(self._pools[place]._processes)), signal.SIGKILL)
        return future
