"""The memory that a run needs, and whether that much is available.

A run that does not fit is killed without a message, or makes the machine swap for hours. So a warning comes first.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 1 << 60  # bytes; control groups of version 1 report about 2^63 if there is no limit
# Measured with tools/bench_memory.py: bytes that every run takes, those that recovery takes beside (its live tensors,
# sums and inverses are bounded), and the peak over the size of the weights of both.
_BASE, _RECOVERY = 250e6, 1600e6
_TIMES, _RECOVERY_TIMES = 4.2, 5.0


@dataclass(frozen=True, slots=True)
class Need:
    """Approximate peak memory of a run.

    Attributes:
        weights: Bytes of the model.
        recovers: Whether weights are recovered, which needs several copies of the network.
    """

    weights: int
    recovers: bool = False

    @property
    def bytes(self) -> float:
        """The estimate."""
        extra, times = (_RECOVERY, _RECOVERY_TIMES) if self.recovers else (0.0, _TIMES)
        return _BASE + extra + times * self.weights

    def shortage(self, available: float | None = None) -> str:
        """One line on the shortage and what to do; empty if the run fits or the available memory is unknown.

        Args:
            available: Available bytes; by default read from the system.
        """
        free = available_memory() if available is None else available
        if free is None or self.bytes <= free:
            return ""
        advice, less = "close other programs, or raise the limit of the container", Need(self.weights)
        if self.recovers:
            advice += f"; --criterion l2 --recover none needs about {_gigabytes(less.bytes)}"
        return (
            f"this run needs about {_gigabytes(self.bytes)} of memory, but only {_gigabytes(free)} are available, and "
            f"the system may stop it: {advice}"
        )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def available_memory() -> int | None:
    """Bytes that this process may still allocate: system, control groups and its own limit; None if unknown."""
    limits = [*_of_system(), *_of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), *_of_process()]
    return min(limits, default=None)


def _of_system() -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield 1024 * int(line.split()[1])
                return
    if sys.platform != "win32":
        with contextlib.suppress(OSError, ValueError):
            yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(table: Path, root: Path) -> Iterator[int]:
    """Bytes left in each control group of this process; file pages that can be dropped count as free."""
    with contextlib.suppress(OSError):
        for line in table.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            top = root / controllers
            names = ("memory.max", "memory.current") if not controllers else (
                "memory.limit_in_bytes", "memory.usage_in_bytes"
            )  # fmt: skip
            inner = top / path.lstrip("/")
            # Inside a container the path may be that of the host, with only the top mounted.
            for folder in {inner, *inner.parents, top}:
                if folder == top or top in folder.parents:
                    yield from _left(folder, *names)


def _left(folder: Path, limit_name: str, used_name: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
        if limit < _NO_LIMIT:
            yield max(0, limit - used + _droppable(folder / "memory.stat"))


def _droppable(statistics: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        entries = dict(line.split()[:2] for line in statistics.read_text().splitlines())
        return int(entries.get("inactive_file", entries.get("total_inactive_file", 0)))
    return 0


def _of_process() -> Iterator[int]:
    """Bytes left below the limit of this process's address space (ulimit -v)."""
    if sys.platform == "win32":
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit >= _NO_LIMIT:
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        yield max(0, limit - taken)
