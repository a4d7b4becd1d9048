"""Workers of a Ray cluster (extra `ray`)."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from onnxcop.parallel.crew import WorkerError
from onnxcop.parallel.dask_workers import PATIENCE, require_answer


class RayWorkers(Executor):
    """The processors of a Ray cluster.

    Args:
        address: `ray://HOST:PORT`, that of its client server, or `ray` for the cluster that this machine belongs to; if
            it belongs to none, one is started here.

    Attributes:
        width: Processors of the cluster that are free.

    Raises:
        WorkerError: Ray is missing, or nothing answers.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise WorkerError("--workers ray needs Ray; install onnxcop[ray]") from None
        self._ray: Any = ray
        if "://" in address:
            require_answer(address)
            _require_client_server(address)
        settings = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": False}
        try:
            self._began = not ray.is_initialized()
            if self._began:
                ray.init(address if "://" in address else None, **settings)
            self.width = max(1, int(ray.available_resources().get("CPU", 1)))
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0][:200]
            way_out = "start one with `ray start`; if it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            raise WorkerError(f"{address}: no Ray cluster can be used ({text}); {way_out}") from error
        kept = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0)(_Worker)
        self._workers = [kept.remote() for _ in range(self.width)]
        self._load = [0] * self.width

    def carry(self, path: Path) -> Any:
        """Put a packed value where all workers find it."""
        return self._ray.put(path.read_bytes())

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Give a task to the worker with the fewest."""
        return self._given(self._load.index(min(self._load)), fn, args, kwargs)

    def submit_to(self, home: int, fn: Callable[..., Any], /, *args: Any) -> Any:
        """Give a task to the worker of a number."""
        return self._given(home % self.width, fn, args, {})

    def _given(self, place: int, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        future = self._workers[place].call.remote(fn, *args, **kwargs).future()
        self._load[place] += 1
        future.add_done_callback(lambda _: self._done(place))
        return future

    def _done(self, place: int) -> None:
        self._load[place] -= 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster; one that was started here ends."""
        for worker in self._workers:
            with contextlib.suppress(Exception):  # of any kind: the cluster may be gone
                self._ray.kill(worker)
        if self._began:
            self._ray.shutdown()


def _require_client_server(address: str) -> None:
    """Try whether what listens at an address speaks as Ray's client server does: Ray itself waits for longer.

    Raises:
        WorkerError: It does not, within ten seconds.
    """
    import grpc

    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    channel = grpc.insecure_channel(address.removeprefix("ray://"))
    try:
        grpc.channel_ready_future(channel).result(timeout=PATIENCE)
    except grpc.FutureTimeoutError:
        raise WorkerError(
            f"{address}: what listens there does not answer as a Ray cluster does, in {PATIENCE:g} s; give the port of "
            "its client server"
        ) from None
    finally:
        channel.close()


class _Worker:
    """A process of the cluster that lasts as long as the run."""

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)
