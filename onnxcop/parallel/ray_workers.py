"""Workers of a Ray cluster (extra `ray`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from onnxcop.parallel.crew import WorkerError
from onnxcop.parallel.dask_workers import require_answer


class RayWorkers(Executor):
    """The processors of a Ray cluster.

    Args:
        address: `ray://HOST:PORT`, that of its client server, or `ray` for the cluster that this machine belongs to; if
            it belongs to none, one is started here.

    Attributes:
        width: Processors of the cluster.

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
        settings = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": False}
        try:
            self._began = not ray.is_initialized()
            if self._began:
                ray.init(address if "://" in address else None, **settings)
            self.width = max(1, int(ray.cluster_resources().get("CPU", 1)))
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0][:200]
            raise WorkerError(f"{address}: no Ray cluster can be used ({text}); start one with `ray start`") from error
        self._task = ray.remote(num_cpus=1, max_retries=0)(_called)

    def carry(self, path: Path) -> Any:
        """Put a packed value where all workers find it."""
        return self._ray.put(path.read_bytes())

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Give a task to any worker."""
        return self._task.remote(fn, *args, **kwargs).future()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._began:
            self._ray.shutdown()


def _called(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return function(*arguments, **keywords)
