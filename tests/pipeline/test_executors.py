"""A run on workers writes the same bytes as a run without."""

import logging
import resource
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from executors import AnyOrder, Homes, Lossy, Mortal

import onnxcop
from onnxcop.allocation.points import CurvePoint
from onnxcop.allocation.sensitivity import _divided
from onnxcop.parallel.local import LocalWorkers

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def pruned(models_dir: Path, executor: Executor | None, **options: Any) -> bytes:
    settings = {"macs": 0.7, "samples": 48, "batch_size": 8, "options": CPU} | options
    data = models_dir / "digits_calib.npz"
    result = onnxcop.prune(models_dir / "digits_resnet.onnx", data=data, executor=executor, **settings)
    return result.model.SerializeToString()


@pytest.fixture(scope="module")
def expected(models_dir: Path) -> bytes:
    return pruned(models_dir, None)


def test_threads_in_any_order(models_dir: Path, expected: bytes) -> None:
    with AnyOrder() as shuffled:
        assert pruned(models_dir, shuffled) == expected
    assert shuffled.order != sorted(shuffled.order)
    with ThreadPoolExecutor(3) as threads:
        assert pruned(models_dir, threads) == expected


class Noted(Homes):
    """Notes the batches that points of curves are measured on, with the home of each task."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.parts: set[tuple[int, tuple[int, ...] | None]] = set()

    def submit_to(self, home: int, fn: Any, /, *args: Any) -> Any:
        if isinstance(args[1], CurvePoint):
            self.parts.add((home % self.width, args[1].places))
        return super().submit_to(home, fn, *args)


def test_points_are_measured_on_batches_of_their_home(models_dir: Path) -> None:
    with Noted(3) as homes:
        found = pruned(models_dir, homes, batch_size=5)  # the last of four held-out batches is smaller
    assert found == pruned(models_dir, None, batch_size=5)
    measured = {(home, place) for home, places in homes.parts for place in places or ()}
    assert measured == {(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3)}


@pytest.mark.parametrize(("workers", "batches", "most"), [(1, 3, 3), (2, 10, 5), (4, 10, 3), (8, 10, 3), (16, 10, 2)])
def test_workers_measure_equally_much_on_few_batches(workers: int, batches: int, most: int) -> None:
    points, done = 200, [0] * workers
    for number in range(points):
        tasks = _divided(CurvePoint(0, 1), number, workers, batches)
        assert [place for _, task in tasks for place in task.places or ()] == list(range(batches))
        for worker, task in tasks:
            assert set(task.places or ()) <= set(task.kept) and len(task.kept) <= most
            done[worker] += len(task.places or ())
    assert max(done) - min(done) <= 0.02 * points * batches / workers + 3


def test_processes_that_are_killed(models_dir: Path, expected: bytes) -> None:
    with Mortal(2) as workers:
        assert pruned(models_dir, workers) == expected
    assert workers.killed >= 2


def limited(megabytes: int) -> None:
    """Let this process have little more memory than it has."""
    import onnxruntime  # noqa: F401 - which a worker loads before it can be short of memory

    import onnxcop.pipeline.prune  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_a_worker_with_too_little_memory(models_dir: Path, expected: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with LocalWorkers(2) as workers, caplog.at_level(logging.INFO, "onnxcop"):
        workers.submit_to(0, limited, 4).result()
        assert pruned(models_dir, workers) == expected
    assert "too little memory" in caplog.text or "a worker is lost" in caplog.text


def test_workers_that_are_lost(models_dir: Path, expected: bytes) -> None:
    assert pruned(models_dir, Lossy(lambda number: number % 5 == 0, refuses=40)) == expected
