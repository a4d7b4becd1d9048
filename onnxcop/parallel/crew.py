"""Independent tasks on an executor, with results that do not depend on it.

A task is a function of an item and of *shared* values: the model, samples, statistics. An item is small and travels
with its task. A shared value is packed once, and a worker reads it once. Results are returned in the order of the
items, so whoever adds them up adds them in that order.

A task has no effect besides its result. So a task whose worker dies is given to another one, and in the end to this
process: a run that loses its workers becomes slower, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from onnxcop._base.lookup import Recent
from onnxcop._version import __version__
from onnxcop.errors import OnnxcopError
from onnxcop.parallel.packing import PackedValues, removed, unpack
from onnxcop.runtime.session import EngineOptions, OutOfMemory

log = logging.getLogger("onnxcop")

T = TypeVar("T")
R = TypeVar("R")

_TRIES = 3  # workers that a task may lose before this process carries it out
_AHEAD = 2  # tasks for every worker that wait for their turn
_PAUSE, _PAUSES = 2.0, 5  # seconds between two looks at a cluster, and how many of them may find no workers
_HELD = 8  # shared values that a worker keeps


class WorkerError(OnnxcopError):
    """Workers cannot be reached, or cannot do the work."""


@dataclass(frozen=True)
class Shared(Generic[T]):
    """A value that many tasks read.

    Attributes:
        value: The value here.
        digest: The digest of its bytes; empty if tasks run in this thread.
        path: The file that holds them.
    """

    value: T
    digest: str = ""
    path: Path | None = None
    _folder: object = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class _Ticket:
    """A shared value, for a worker that may have it already."""

    digest: str
    path: str


@dataclass(frozen=True, slots=True)
class _Answer:
    """What became of a task: a result, an error of its own, or what its worker lacks."""

    host: str
    result: Any = None
    error: BaseException | None = None
    unseen: bool = False
    versions: dict[str, str] | None = None


class Crew:
    """Carries out independent tasks.

    Args:
        executor: Any executor. None carries tasks out here, one after the other, when their results are read. If it
            has a method `carry(path)`, that returns a reference to a packed value, which the executor's `submit`
            replaces by the bytes of the file. If it has an attribute `width`, that is its number of workers;
            if it has a method `alive()`, that says whether there are any. If it has a method
            `submit_to(home, ...)`, that gives tasks of a number to one worker, unless an attribute `keeps` is false.

    Attributes:
        spread: Whether tasks run elsewhere.
    """

    def __init__(self, executor: Executor | None = None) -> None:
        self._executor = executor
        self._kept: dict[int, Shared[Any]] = {}
        self._carried: dict[Path, Any] = {}  # what the executor made of the files, if it carries values itself
        self._packed: PackedValues | None = None
        self._lost = False

    @property
    def spread(self) -> bool:
        return self._executor is not None and not self._lost

    @property
    def keeps(self) -> bool:
        """Whether tasks of one home go to one worker, so that it can keep something for the next."""
        return self.spread and hasattr(self._executor, "submit_to") and getattr(self._executor, "keeps", True)

    def engine(self, options: EngineOptions) -> EngineOptions:
        """How tasks run models: with one thread, unless the user wants more."""
        return replace(options, threads=options.threads or 1) if self.spread else options

    def share(self, value: T, *, keep: bool = False) -> Shared[T]:
        """Make a value known to the workers; it must not change while tasks read it.

        Args:
            value: The value.
            keep: Whether to remember it, so that sharing the same object again costs nothing.

        Raises:
            WorkerError: The value cannot be packed.
        """
        if not self.spread:
            return Shared(value)
        if keep and id(value) in self._kept:
            return self._kept[id(value)]
        self._packed = self._packed or PackedValues()
        try:
            digest, path = self._packed.add(value)
        except (TypeError, AttributeError, ValueError, pickle.PicklingError) as error:
            raise WorkerError(
                f"a part of this run cannot be sent to workers: {error}; give functions and classes of a module that "
                "workers can import, or leave out --workers"
            ) from error
        self._carried[path] = self._carry(path)
        shared = Shared(value, digest=digest, path=path, _folder=self._packed)
        weakref.finalize(shared, _forget, path, self._carried)
        if keep:
            self._kept[id(value)] = shared  # which holds the value, so that no other object gets its number
        return shared

    def _carry(self, path: Path) -> Any:
        """A packed value as the executor carries it; None if it does not, so that workers read the file."""
        carry = getattr(self._executor, "carry", None)
        if carry is not None:
            with contextlib.suppress(Exception):  # without it, the bytes go with the tasks
                return carry(path)
        return None

    def run(
        self, task: Callable[..., R], items: Iterable[Any], *shared: Shared[Any],
        homes: Sequence[int] | None = None, note: Callable[[R], object] | None = None, most: int | None = None,
    ) -> Generator[R]:  # fmt: skip
        """Carry out a task for every item.

        Args:
            task: A function of a module, called with an item and the shared values.
            items: Arguments.
            shared: Values that all tasks read.
            homes: A number for every item: tasks of one number go to the same worker where that is possible, because
                it has something left from the last one.
            most: How many tasks workers have at once; fewer are carried out in vain if the reader stops early. By
                default so many that none has to wait.
            note: Called with each result as soon as it is there, in any order and from any thread, perhaps twice.

        Yields:
            The results, in the order of the items.

        Raises:
            OnnxcopError: As raised by a task, with the worker's host.
            WorkerError: A worker cannot do the work: it lacks the package, or has another version.
        """
        if not self.spread:
            for item in items:
                result = self._here(task, item, shared)
                if note is not None:
                    note(result)
                yield result
            return
        numbers = iter(homes) if homes is not None else None
        waiting: deque[_Pending] = deque()
        source = iter(items)
        most = most or (_AHEAD + 1) * self.width
        try:
            while True:
                while len(waiting) < most:
                    try:
                        item = next(source)
                    except StopIteration:
                        break
                    pending = _Pending(item, None if numbers is None else next(numbers), note=note)
                    self._submit(task, pending, shared)
                    waiting.append(pending)
                if not waiting:
                    return
                yield self._finished(task, waiting[0], shared)
                waiting.popleft()
        finally:
            for pending in waiting:
                if pending.future is not None:
                    pending.future.cancel()

    @property
    def width(self) -> int:
        """How many workers there are, as far as that is known."""
        known = getattr(self._executor, "width", None) or getattr(self._executor, "_max_workers", None)
        return max(1, int(known or os.cpu_count() or 1)) if self._executor is not None else 1

    def shares(self, count: int) -> int:
        """Into how many shares to divide so many things, each for a worker that keeps its share."""
        return min(count, self.width) if self.keeps else 1

    def _here(self, task: Callable[..., R], item: Any, shared: Sequence[Shared[Any]]) -> R:
        return task(item, *(_value_of(one.digest, one.path) if one.path else one.value for one in shared))

    def _submit(self, task: Callable[..., Any], pending: _Pending, shared: Sequence[Shared[Any]]) -> None:
        if self._lost:
            return
        tickets = tuple(_Ticket(one.digest, str(one.path)) for one in shared)
        for place, one in enumerate(shared):  # a cluster may have lost what it carried, with the worker that held it
            if pending.lost and one.path is not None and pending.carried[place] is self._carried.get(one.path):
                self._carried[one.path] = self._carry(one.path)
        payloads = [None if one.path is None else self._carried.get(one.path) for one in shared]
        pending.carried, pending.lost = payloads, False
        if pending.inline:
            payloads = [b"" if one.path is None else one.path.read_bytes() for one in shared]
        submit: Any = self._executor.submit  # type: ignore[union-attr]
        submit_to = getattr(self._executor, "submit_to", None)
        if pending.home is not None and submit_to is not None:
            submit = lambda *arguments: submit_to(pending.home, *arguments)  # noqa: E731
        try:
            pending.future = submit(
                _perform, task, pending.item, tickets, worker_versions(), (_host(), os.getpid()), *payloads
            )
            if pending.note is not None:
                pending.future.add_done_callback(partial(_noted, pending.note))
        except Exception as error:  # a pool that is broken, a cluster that is gone
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        if not self._lost:
            self._lost = True
            log.warning("the workers are lost (%s); the run goes on in this process", _in_a_line(error))

    def _answer(self, future: Future[Any]) -> _Answer:
        """Wait for a worker's answer, as long as there are workers.

        Raises:
            ConnectionError: There are none, and have not been for a while.
        """
        alive: Callable[[], bool] = getattr(self._executor, "alive", lambda: True)
        missing = 0
        while True:
            try:
                answer: _Answer = future.result(timeout=_PAUSE)
                return answer
            except TimeoutError:
                missing = 0 if alive() else missing + 1
                if missing > _PAUSES:
                    error = ConnectionError("no workers are left")
                    self._give_up(error)
                    raise error from None

    def _finished(self, task: Callable[..., R], pending: _Pending, shared: Sequence[Shared[Any]]) -> R:
        for attempt in range(_TRIES + 1):
            if pending.future is None or self._lost:
                break
            try:
                answer = self._answer(pending.future)
            except BaseException as error:  # the worker died or is cut off: executors raise errors of their own
                if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
                    raise
                if isinstance(error, ImportError) or "No module named" in str(error):
                    what = _in_a_line(error)
                    raise WorkerError(
                        f"a worker cannot import what it needs ({what}); install onnxcop {__version__} there"
                    ) from error
                if "deserialization of the task graph" in str(error):  # so says the scheduler of Dask
                    raise WorkerError(
                        f"the scheduler cannot read tasks; install onnxcop {__version__} on its machine too"
                    ) from error
                log.info("a worker is lost (%s); another one repeats its task", _in_a_line(error))
                pending.future, pending.lost = None, True
                self._submit(task, pending, shared)
                continue
            if answer.versions is not None:
                raise WorkerError(_other_versions(answer))
            if answer.unseen:
                if pending.inline:
                    raise WorkerError(f"the worker at {answer.host} cannot read what it was sent; look at its log")
                pending.inline = True
                self._submit(task, pending, shared)
                continue
            if answer.error is not None and _lacks_memory(answer.error):
                log.info("the worker at %s has too little memory; another one repeats its task", answer.host)
                pending.home = 1 + (attempt if pending.home is None else pending.home)
                self._submit(task, pending, shared)
                continue
            if answer.error is not None:
                raise _named(answer.error, answer.host)
            return answer.result  # type: ignore[no-any-return]
        if not self._lost:
            log.warning("a task was lost with %d workers; this process carries it out", _TRIES)
        result = self._here(task, pending.item, shared)
        if pending.note is not None:
            pending.note(result)
        return result


def _forget(path: Path, carried: dict[Path, Any]) -> None:
    """Remove a packed value that no task reads any more."""
    carried.pop(path, None)
    removed(path)


def _lacks_memory(error: BaseException) -> bool:
    """Whether a task failed because its worker has too little memory."""
    lacking = isinstance(error, OSError) and error.errno == errno.ENOMEM
    unloaded = isinstance(error, ImportError) and "failed to map segment" in str(error)
    return lacking or unloaded or isinstance(error, MemoryError | OutOfMemory)


@dataclass
class _Pending:
    """A task that was given to a worker."""

    item: Any
    home: int | None = None
    future: Future[Any] | None = None
    inline: bool = False
    lost: bool = False
    carried: list[Any] = field(default_factory=list)
    note: Callable[[Any], object] | None = None


def _noted(note: Callable[[Any], object], future: Future[Any]) -> None:
    """Pass on the result of a task; what went wrong is for those who wait for it."""
    with contextlib.suppress(BaseException):
        answer: _Answer = future.result()
        if answer.error is None and answer.versions is None and not answer.unseen:
            note(answer.result)


HERE = Crew()
"""No workers: tasks run in this thread."""

_held = threading.local()


def _value_of(digest: str, source: Path | bytes) -> Any:
    """A shared value, unpacked once by every thread: tasks may change it as long as they restore it."""
    values: Recent[str, Any] = _held.__dict__.setdefault("values", Recent(_HELD))
    return values.get(digest, lambda: unpack(source))


def _perform(
    task: Callable[..., Any], item: Any, tickets: Sequence[_Ticket], wanted: dict[str, str], origin: tuple[str, int],
    *payloads: Any,
) -> _Answer:  # fmt: skip
    """Carry out a task in a worker.

    Args:
        task: The function.
        item: Its first argument.
        tickets: Its other arguments.
        wanted: Versions that the worker must have.
        origin: Host and number of the process that asks.
        payloads: What the executor carried, by ticket.
    """
    host = _host()
    if (host, os.getpid()) != origin:
        _with_one_thread()
    if worker_versions() != wanted:
        return _Answer(host, versions=worker_versions())
    try:
        values = []
        for ticket, payload in zip(tickets, payloads, strict=True):
            source: Path | bytes = Path(ticket.path) if payload is None else bytes(payload)
            known = ticket.digest in _held.__dict__.get("values", {})
            if isinstance(source, Path) and not known and not source.is_file():
                return _Answer(host, unseen=True)
            values.append(_value_of(ticket.digest, source))
        return _Answer(host, result=task(item, *values))
    except Exception as error:
        return _Answer(host, error=_portable(error))


def _portable(error: Exception) -> Exception:
    """An error that can be sent: itself, or its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(_in_a_line(error))
    return error


@cache
def _with_one_thread() -> None:
    """Let linear algebra run in one thread in this process, as it does in the process that asks."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=1, user_api="blas")


@cache
def worker_versions() -> dict[str, str]:
    """The versions that decide what a task computes."""
    import numpy as np
    import onnxruntime

    return {"onnxcop": __version__, "ONNX Runtime": onnxruntime.__version__, "NumPy": np.__version__}


def _other_versions(answer: _Answer) -> str:
    own, there = worker_versions(), answer.versions or {}
    name = next(name for name in own if own[name] != there.get(name))
    return (
        f"the worker at {answer.host} has {name} {there.get(name)}, this process {own[name]}; results would differ, so "
        "install the same version"
    )


@cache
def _host() -> str:
    return socket.gethostname()


def _named(error: BaseException, host: str) -> BaseException:
    """An error of the user's input, with the worker's host if that is another machine."""
    if isinstance(error, OnnxcopError) and host != _host():
        error.args = (f"{error.args[0]} (on the worker at {host})", *error.args[1:])
    return error


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
