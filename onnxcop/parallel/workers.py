"""Workers by their description: a number of processes here, or the address of a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

from onnxcop.parallel.crew import HERE, Crew

_ADDRESS = re.compile(r"(dask|ray)://[^\s/:]+:\d{1,5}")


@dataclass(frozen=True, slots=True)
class WorkersWish:
    """Which workers the user asks for.

    Attributes:
        count: Processes on this machine; 0 for those of a cluster.
        address: `dask://HOST:PORT`, `ray://HOST:PORT`, or `ray` for the cluster that this machine belongs to.
    """

    count: int = 0
    address: str = ""

    @classmethod
    def of(cls, text: str) -> WorkersWish:
        """Read a description.

        Raises:
            ValueError: It is neither a number from 1 nor an address.
        """
        if text.isdecimal() and int(text) > 0:
            return cls(count=int(text))
        if text == "ray" or _ADDRESS.fullmatch(text):
            return cls(address=text)
        raise ValueError(
            f"{text!r} is neither a number of processes from 1 nor an address; "
            "give 4, dask://HOST:PORT, ray://HOST:PORT or ray"
        )


def adapted(executor: Executor) -> Executor:
    """The executor of a Dask client as workers that keep what tasks leave behind; any other as it is."""
    client = getattr(executor, "_client", None)
    if client is None or not type(executor).__module__.startswith("distributed."):
        return executor
    from onnxcop.parallel.dask_workers import DaskWorkers

    return DaskWorkers(client)


def crew_for(executor: Executor | None) -> Crew:
    """Those who carry out the tasks of a run: the workers of an executor, or this process without one."""
    return HERE if executor is None else Crew(adapted(executor))


@contextmanager
def opened(wish: WorkersWish | None) -> Iterator[Executor | None]:
    """Workers for the time of a block; None without a wish.

    Raises:
        WorkerError: The address does not answer, there are no workers, or a package is missing.
    """
    if wish is None:
        yield None
        return
    executor = _made(wish)
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _made(wish: WorkersWish) -> Executor:
    if wish.count:
        from onnxcop.parallel.local import LocalWorkers

        return LocalWorkers(wish.count)
    if wish.address.startswith("dask"):
        from onnxcop.parallel.dask_workers import connected

        return connected(wish.address)
    from onnxcop.parallel.ray_workers import RayWorkers

    return RayWorkers(wish.address)
