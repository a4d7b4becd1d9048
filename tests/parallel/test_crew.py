"""Independent tasks: the same results on any executor, whatever happens to its workers."""

import errno
import gc
import logging
import os
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executors import AnyOrder, Homes, Lossy

from onnxcop.errors import CalibrationError
from onnxcop.parallel import crew as module
from onnxcop.parallel.crew import Crew, WorkerError
from onnxcop.parallel.local import LocalWorkers

ITEMS = list(range(20))


def scaled(item: int, weights: Any) -> Any:
    weights += 1  # a task may change its values as long as it restores them
    weights -= 1
    return weights * item


def refused(item: int) -> int:
    if item == 3:
        raise CalibrationError("item 3 holds NaN; leave it out")
    return item


def hungry(item: int) -> int:
    raise MemoryError(f"item {item}")


def died_once(item: int, marks: Path) -> tuple[int, int]:
    """End the process the first time that an item is met."""
    mark = marks / str(item)
    if item % 3 == 1 and not mark.exists():
        mark.touch()
        os._exit(9)
    return item, os.getpid()


CRAMPED: list[int] = []  # threads


def cramped(item: int) -> int:
    if threading.get_ident() in CRAMPED:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    return item


def process(item: int) -> int:
    return os.getpid()


def results(executor: Executor | None) -> list[list[float]]:
    crew = Crew(executor)
    return [one.tolist() for one in crew.run(scaled, ITEMS, crew.share(np.arange(2000.0)))]


def test_results_come_in_the_order_of_the_items() -> None:
    expected = results(None)
    assert expected[2][3] == 6.0
    shuffled = AnyOrder()
    with ThreadPoolExecutor(3) as threads, shuffled, LocalWorkers(2) as processes:
        assert results(threads) == results(shuffled) == results(processes) == expected
    assert shuffled.order != sorted(shuffled.order)


def test_a_value_is_shared_once() -> None:
    with ThreadPoolExecutor(1) as threads:
        crew, value = Crew(threads), np.zeros(3)
        assert crew.share(value, keep=True) is crew.share(value, keep=True)
        assert crew.share(value) is not crew.share(value)


def test_the_file_of_a_value_goes_with_it() -> None:
    with ThreadPoolExecutor(1) as pool:
        crew = Crew(pool)
        first, other = crew.share([1]), crew.share([2])
        assert first.path is not None and other.path is not None
        gone, stays = first.path, other.path
        del first
        gc.collect()
        assert not gone.exists() and stays.is_file()
        del crew
        gc.collect()
        assert stays.is_file()
        del other
        gc.collect()
        assert not stays.parent.exists()


def test_tasks_of_a_home_go_to_one_worker() -> None:
    with LocalWorkers(2) as processes:
        crew = Crew(processes)
        places = list(crew.run(process, ITEMS, homes=[item % 2 for item in ITEMS]))
    assert len(set(places[::2])) == len(set(places[1::2])) == 1
    assert places[0] != places[1] and os.getpid() not in places


def test_a_dead_worker_costs_its_task(tmp_path: Path) -> None:
    with LocalWorkers(2) as processes:
        crew = Crew(processes)
        done = list(crew.run(died_once, range(8), crew.share(tmp_path)))
        assert crew.spread
    assert [item for item, _ in done] == list(range(8))
    assert os.getpid() not in {place for _, place in done}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4", "7"]


@pytest.mark.parametrize(
    ("executor", "said"),
    [
        (Lossy(lambda number: number % 3 == 0), ""),
        (Lossy(lambda number: True), "this process carries it out"),
        (Lossy(lambda number: False, refuses=7), "the workers are lost (ConnectionError: the scheduler is gone)"),
        (Lossy(lambda number: False, refuses=0), "the workers are lost"),
    ],
)
def test_lost_tasks_are_repeated(executor: Executor, said: str, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "onnxcop"):
        assert results(executor) == results(None)
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_a_task_that_lacks_memory_goes_to_another_worker(caplog: Any) -> None:
    for given in (None, [0] * len(ITEMS)):
        with Homes(2) as homes, caplog.at_level(logging.WARNING, "onnxcop"):
            CRAMPED[:] = [homes.submit_to(0, threading.get_ident).result()]
            assert list(Crew(homes).run(cramped, ITEMS, homes=given)) == ITEMS
    assert not caplog.text  # none is carried out here


def test_a_reader_that_stops_early_leaves_few_tasks() -> None:
    for most, given in ((1, 2), (4, 5), (None, 10)):
        with Homes(3) as homes:
            reading = Crew(homes).run(process, ITEMS, most=most)
            next(reading)
            next(reading)
            reading.close()
        assert homes.given == given


def test_an_error_of_a_task_is_raised_here() -> None:
    with LocalWorkers(1) as processes:
        with pytest.raises(CalibrationError, match=r"^item 3 holds NaN; leave it out$"):
            list(Crew(processes).run(refused, ITEMS))
        with pytest.raises(MemoryError, match="item 0"):  # not even this process has enough
            list(Crew(processes).run(hungry, [0]))


def test_a_worker_without_the_files_gets_the_bytes(monkeypatch: Any) -> None:
    with ThreadPoolExecutor(2) as threads:
        crew = Crew(threads)
        shared = crew.share(np.arange(2000.0))
        monkeypatch.setattr(Path, "is_file", lambda self: self != shared.path and os.path.isfile(self))
        assert [one[1] for one in crew.run(scaled, [5, 6], shared)] == [5.0, 6.0]


def test_the_host_of_another_machine_is_named(monkeypatch: Any) -> None:
    real = module._perform

    def elsewhere(*arguments: Any) -> Any:
        answer = real(*arguments)
        return module._Answer("node7", answer.result, answer.error, answer.unseen, answer.versions)

    monkeypatch.setattr(module, "_perform", elsewhere)
    with ThreadPoolExecutor(1) as threads, pytest.raises(CalibrationError, match=r"on the worker at node7"):
        list(Crew(threads).run(refused, [3]))


def test_another_version_is_refused(monkeypatch: Any) -> None:
    real, other = module.worker_versions(), {**module.worker_versions(), "ONNX Runtime": "1.2.3"}
    answers = iter([real, other, other])  # here, then there
    monkeypatch.setattr(module, "worker_versions", lambda: next(answers, real))
    with (
        ThreadPoolExecutor(1) as threads,
        pytest.raises(WorkerError, match=r"has ONNX Runtime 1\.2\.3, this process"),
    ):
        list(Crew(threads).run(refused, [1]))


def test_a_task_of_no_module_is_refused() -> None:
    with ThreadPoolExecutor(1) as threads, pytest.raises(WorkerError, match="cannot be sent to workers"):
        Crew(threads).share(lambda: 0)


def test_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="give 1 or more"):
        LocalWorkers(0)
