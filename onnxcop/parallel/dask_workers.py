"""Workers of a Dask cluster (extra `dask`)."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from onnxcop.parallel.crew import WorkerError

PATIENCE = 10.0  # seconds that a cluster has to answer


class DaskWorkers(Executor):
    """The workers of a scheduler.

    Args:
        address: `dask://HOST:PORT`, that of the scheduler.

    Attributes:
        width: Threads of all workers.

    Raises:
        WorkerError: dask.distributed is missing, or nothing answers, or there are no workers.
    """

    def __init__(self, address: str) -> None:
        try:
            import dask
            from distributed import Client
        except ImportError:
            raise WorkerError("--workers dask://… needs dask.distributed; install onnxcop[dask]") from None
        require_answer(address)
        for name in ("distributed", "distributed.client", "distributed.comm"):  # whose messages are ours to word
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            with dask.config.set({"distributed.comm.timeouts.connect": f"{PATIENCE:g}s"}):
                self.client: Any = Client(address.replace("dask://", "tcp://"), timeout=PATIENCE, set_as_default=False)
        except Exception as error:
            raise WorkerError(
                f"{address}: no Dask scheduler of a version like this one answers ({type(error).__name__}); "
                "start one with `dask scheduler`"
            ) from error
        try:
            self.client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError:
            self.client.close(timeout=1)
            raise WorkerError(f"{address}: the scheduler has no workers; start some with `dask worker`") from None
        self.width = max(1, sum(self.client.nthreads().values()))

    def carry(self, path: Path) -> Any:
        """Give a packed value to all workers, once."""
        return self.client.scatter(path.read_bytes(), broadcast=True, hash=False)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Give a task to any worker."""
        if self.client.status not in ("running", "connecting"):
            raise ConnectionError("the scheduler is gone")
        return self.client.submit(fn, *args, **kwargs, pure=False)

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
