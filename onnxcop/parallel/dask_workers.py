"""Workers of a Dask cluster (extra `dask`)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import Executor
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from onnxcop._version import __version__
from onnxcop.parallel.crew import WorkerError

PATIENCE = 10.0  # seconds that a cluster has to answer
_SLOWEST = 5e6  # bytes in a second that a network carries at least
_LOOK = 2.0  # seconds between two looks at who is left


class DaskWorkers(Executor):
    """The workers of a scheduler.

    Args:
        client: A client of the scheduler; :func:`connected` makes one of an address.
        address: The scheduler, for messages.

    Attributes:
        width: Threads of all workers.
        keeps: Whether each worker has one thread, so that what a task leaves behind is there for the next.

    Raises:
        WorkerError: There are no workers, or one of them lacks the package.
    """

    def __init__(self, client: Any, address: str = "Dask") -> None:
        self.client = client
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError:
            raise WorkerError(f"{address}: the scheduler has no workers; start some with `dask worker`") from None
        _require_package(client)
        threads: dict[str, int] = client.nthreads()
        self.width = max(1, sum(threads.values()))
        self.keeps = set(threads.values()) == {1}
        self._homes = sorted(threads)
        self._looked = time.monotonic()

    def carry(self, path: Path) -> Any:
        """Give a packed value to one worker, from which the others get it.

        Dask's own broadcast never ends if a worker dies during it, as of 2026.8.

        Raises:
            TimeoutError: The worker does not answer.
        """
        data = path.read_bytes()

        async def scattered() -> Any:
            return await self.client.scatter(data, hash=False, asynchronous=True)

        return self.client.sync(scattered, callback_timeout=PATIENCE + len(data) / _SLOWEST)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Give a task to any worker."""
        if self.client.status not in ("running", "connecting"):
            raise ConnectionError("the scheduler is gone")
        return self.client.submit(fn, *args, **kwargs, pure=False)

    def submit_to(self, home: int, fn: Callable[..., Any], /, *args: Any) -> Any:
        """Give a task to the worker of a number, or to any if that one is lost."""
        if time.monotonic() > self._looked + _LOOK:
            self._replace_lost()
        place = self._homes[home % len(self._homes)]
        return self.submit(fn, *args, workers=[place], allow_other_workers=True)

    def _replace_lost(self) -> None:
        """Let the workers that are left have the numbers of those that are not."""
        with contextlib.suppress(Exception):  # of any kind: the scheduler may be going away
            left = sorted(self.client.scheduler_info()["workers"])
            spare = itertools.cycle(left)
            self._homes = [place if place in left else next(spare) for place in self._homes]
        self._looked = time.monotonic()

    def alive(self) -> bool:
        """Whether the scheduler answers and has workers."""
        try:
            return self.client.status == "running" and bool(self.client.scheduler_info()["workers"])
        except Exception:  # of any kind: the scheduler may be going away
            return False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster; it keeps running."""
        with contextlib.suppress(Exception):
            self.client.close(timeout=PATIENCE if wait else 1)


def connected(address: str) -> DaskWorkers:
    """The workers of the scheduler at `dask://HOST:PORT`.

    Raises:
        WorkerError: dask.distributed is missing, the address does not answer, or there are no workers.
    """
    try:
        import dask
        from distributed import Client
    except ImportError:
        raise WorkerError("--workers dask://… needs dask.distributed; install onnxcop[dask]") from None
    require_answer(address)
    _require_scheduler(address)
    for name in ("distributed", "distributed.client", "distributed.comm"):  # whose messages are ours to word
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with dask.config.set({"distributed.comm.timeouts.connect": f"{PATIENCE:g}s"}):
            client: Any = Client(address.replace("dask://", "tcp://"), timeout=PATIENCE, set_as_default=False)
    except Exception as error:
        raise WorkerError(
            f"{address}: no Dask scheduler of a version like this one answers ({type(error).__name__}); "
            "start one with `dask scheduler`"
        ) from error
    try:
        return DaskWorkers(client, address)
    except WorkerError:
        client.close(timeout=1)
        raise


def _require_scheduler(address: str) -> None:
    """Try whether what listens at an address speaks as Dask does: a client of anything else waits for long.

    Raises:
        WorkerError: It does not, within ten seconds.
    """
    from distributed.comm import connect

    async def greeted() -> None:
        comm = await asyncio.wait_for(connect(address.replace("dask://", "tcp://"), timeout=PATIENCE), PATIENCE)
        await comm.close()

    try:
        asyncio.run(greeted())
    except Exception as error:
        raise WorkerError(
            f"{address}: what listens there does not answer as a Dask scheduler does, in {PATIENCE:g} s; start one "
            "with `dask scheduler`"
        ) from error


def _require_package(client: Any) -> None:
    """Try whether all workers can import the package: one that cannot would end when it gets its first task.

    Raises:
        WorkerError: One of them cannot.
    """
    found = client.run(import_module, "onnxcop._version", on_error="return")
    failed = [(place, error) for place, error in found.items() if isinstance(error, Exception)]
    if failed:
        place, error = failed[0]
        raise WorkerError(
            f"the worker at {place} cannot import what it needs ({type(error).__name__}: {error}); install onnxcop "
            f"{__version__} there"
        )


def require_answer(address: str) -> None:
    """Try whether anything listens at an address.

    Raises:
        WorkerError: Nothing does, within ten seconds.
    """
    place = urlsplit(address)
    try:
        socket.create_connection((place.hostname or "", place.port or 0), PATIENCE).close()
    except OSError as error:
        cause = f"no answer in {PATIENCE:g} s" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise WorkerError(
            f"{address} does not answer ({cause}); check the address, and that the cluster runs"
        ) from None
