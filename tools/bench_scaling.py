"""How a run would scale: records its tasks with time and bytes, and replays them on simulated workers.

A run without workers is traced: every task with its CPU seconds and the bytes that go and come, every shared value
with its bytes, and what the process does alone. The replay gives each list of tasks to N workers in order, as soon as
one is free, or to the worker that keeps the batch, with a latency for each message and one link of a bandwidth that all
share. Messages of a list overlap with its tasks, save the first and the last. So does what is done with results while
others are computed, save that of one. Lists are barriers. Loading of pieces and of shared values is measured apart:
every worker of a list spends it, once for each piece. Points of curves are recorded batch by batch; a worker computes
the weights of a point once, and what comes before it for all batches that it keeps. Batches of a candidate that are
begun before it is beaten are charged too. Speed-up is relative to a run without workers, which is measured before.

    python tools/bench_scaling.py models/digits_resnet.onnx models/digits_calib.npz -o trace.json
    python tools/bench_scaling.py --replay trace.json
    python tools/bench_scaling.py models/digits_resnet.onnx models/digits_calib.npz --measure 2

`--points 20` measures three budgets of a sweep (`onnxcop sweep --independent`), and replays so many; budgets between
them take what a line between them says. `--images 1200000` measures the statistics of the samples that are there, and
replays the tasks of so many.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import onnxcop
from onnxcop.allocation import points, sensitivity
from onnxcop.allocation.points import CurvePoint
from onnxcop.allocation.sensitivity import _divided, _kept_by
from onnxcop.calibration.calibrate import gather_statistics
from onnxcop.data.open import open_data
from onnxcop.data.options import DataOptions
from onnxcop.parallel import crew as crew_module
from onnxcop.parallel import workers as workers_module
from onnxcop.parallel.crew import Crew, Shared
from onnxcop.parallel.local import LocalWorkers
from onnxcop.pipeline.family.jobs import FamilyJob, carry_out
from onnxcop.reconstruction.spread import CANDIDATES, homes_of
from onnxcop.runtime.segments import GraphPartition, Prefixes
from onnxcop.runtime.session import Session

WORKERS = (1, 2, 4, 8, 16, 64)
_BY_BATCH, _SCORED = "measure_point", "score_batch"  # tasks
KINDS = ("load", "cut", "way")  # seconds for loading, for the weights of a point, for what comes before it
Task = dict[str, float]
_RANGE = (0.95, 0.4)  # multiply-accumulates to keep, of a sweep
LATENCY, BANDWIDTH = 1e-3, 1.25e9  # seconds of a message; bytes a second (10 Gbit/s)


class _Inline(Executor):
    """Carries tasks out at once and records them."""

    width = 1

    def __init__(self) -> None:
        self.tasks: list[dict[str, float]] = []
        self.inside = 0.0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.submit_to(-1, fn, *args)

    def submit_to(self, home: int, fn: Any, /, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        before, start = dict(_meter.seconds), time.thread_time()
        answer = fn(*args)
        seconds = time.thread_time() - start
        parts = {kind: _meter.seconds[kind] - before[kind] for kind in KINDS}
        self.inside += seconds
        size = len(pickle.dumps(args)) + len(pickle.dumps(answer))
        own = seconds - sum(parts.values())
        self.tasks.append({"seconds": own, **parts, "bytes": size, "home": home})
        future.set_result(answer)
        return future


class _Meter:
    """Adds up CPU seconds by kind; those of a call inside another count for the inner one alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*KINDS, ""), 0.0)
        self._kinds, self._mark = [""], time.thread_time()

    def _turn(self) -> None:
        now = time.thread_time()
        self.seconds[self._kinds[-1]] += now - self._mark
        self._mark = now

    def apart(self, place: Any, name: str, kind: str) -> None:
        """Count the seconds of a function as of a kind."""
        real = getattr(place, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._kinds.append(kind)
            try:
                return real(*args, **kwargs)
            finally:
                self._turn()
                self._kinds.pop()

        setattr(place, name, timed)


_meter = _Meter()


def _by_batch(point: CurvePoint, number: int, workers: int, batches: int) -> list[tuple[int, CurvePoint]]:
    """A task for every batch of a point: the replay puts those of a worker together."""
    return _divided(point, 0, batches, batches)


class _Recorder(Crew):
    """Notes every list of tasks."""

    lists: ClassVar[list[dict[str, Any]]] = []

    def shares(self, count: int) -> int:
        """As many as there can be: the replay puts them together."""
        return count

    def run(self, task: Any, items: Iterable[Any], *shared: Shared[Any], **settings: Any) -> Generator[Any]:
        executor: Any = self._executor
        tasks: list[Task] = []
        executor.tasks = tasks
        entry = {
            "task": task.__name__, "alone": time.thread_time() - executor.inside, "tasks": tasks,
            "shared": {one.digest: 0 if one.path is None else one.path.stat().st_size for one in shared},
        }  # fmt: skip
        self.lists.append(entry)
        yield from super().run(task, items, *shared, **settings)
        entry["reading"] = time.thread_time() - executor.inside - entry["alone"]  # absent if the reader stopped early


def traced(model: str, data: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Carry out a run here without workers, for its CPU time, then once more in tasks, and return its trace."""
    options = onnxcop.EngineOptions("cpu", 1)
    start = time.thread_time()
    onnxcop.prune(model, data=data, options=options, **settings)
    without = time.thread_time() - start
    workers_module.Crew = _Recorder  # type: ignore[misc]
    sensitivity._divided = _by_batch
    for place, name, kind in (
        (Session, "__init__", "load"), (crew_module, "_value_of", "load"), (GraphPartition, "piece", "load"),
        (points, "_cut", "cut"),
        (Prefixes, "at", "way"),
    ):  # fmt: skip
        _meter.apart(place, name, kind)
    start = time.thread_time()
    executor = _Inline()
    onnxcop.prune(model, data=data, executor=executor, options=options, **settings)
    total = time.thread_time() - start
    lists = _Recorder.lists
    ends = [*(entry["alone"] for entry in lists[1:]), start + total - executor.inside]
    for entry, end in zip(lists, ends, strict=True):  # what follows a list, or is done with its results
        entry["alone"] = end - entry["alone"]
    inside = sum(sum(task[kind] for kind in ("seconds", *KINDS)) for entry in lists for task in entry["tasks"])
    return {"model": Path(model).name, "seconds": without, "alone": total - inside, "lists": lists}


def traced_sweep(model: str, data: str, settings: dict[str, Any], points: int) -> dict[str, Any]:
    """The jobs of a sweep: three are measured, at the loosest budget, the middle one and the tightest."""
    budgets = np.linspace(*_RANGE, points)
    measured = sorted({0, points // 2, points - 1})
    plain = {name: value for name, value in settings.items() if name != "macs"}
    options = onnxcop.PruneOptions(data=data, options=onnxcop.EngineOptions("cpu", 1), **plain)
    seconds, sizes = [], []
    for place in measured:
        start = time.thread_time()
        result = carry_out(FamilyJob(Path(model), float(budgets[place]), "", Path("small.onnx")), options)
        seconds.append(time.thread_time() - start)
        sizes.append(len(pickle.dumps(result)))
        print(f"{budgets[place]:.0%}: {seconds[-1]:.1f} s {result.record.error}", flush=True)
    each = [np.interp(range(points), measured, values).tolist() for values in (seconds, sizes)]
    tasks = [
        {"seconds": own, **dict.fromkeys(KINDS, 0.0), "bytes": size, "home": -1}
        for own, size in zip(*each, strict=True)
    ]
    entry = {"task": "carry_out", "shared": {}, "tasks": tasks, "alone": 0.0}
    return {"model": f"{Path(model).name}, {points} budgets of which {len(measured)} are measured",
            "seconds": sum(each[0]), "alone": 0.0, "lists": [entry]}  # fmt: skip


def traced_statistics(model: str, data: str, settings: dict[str, Any], images: int) -> dict[str, Any]:
    """The batches of a pass for statistics: those that are measured stand for those of so many images."""
    options = onnxcop.EngineOptions("cpu", 1)
    analysis = onnxcop.analyze(model, options=options)
    known = {field.name for field in fields(DataOptions)}
    given = {name: value for name, value in settings.items() if name in known and value is not None}
    source = open_data(analysis, DataOptions(data=data, **given))
    assert source is not None
    for place, name, kind in ((Session, "__init__", "load"), (crew_module, "_value_of", "load")):
        _meter.apart(place, name, kind)
    start = time.thread_time()
    gather_statistics(analysis, source, options)
    without, executor, start = time.thread_time() - start, _Inline(), time.thread_time()
    gather_statistics(analysis, source, options, crew=_Recorder(executor))
    alone = time.thread_time() - start - executor.inside
    (entry,) = _Recorder.lists
    count, own = images // (source.count // len(entry["tasks"])), entry["tasks"]
    tasks = [{**own[number % len(own)], "load": 0.0} for number in range(count)]
    tasks[0] = {**tasks[0], "load": sum(task["load"] for task in own)}
    more = count / len(own)
    own_start, reading = alone - entry["reading"], entry["reading"] * more
    alone += reading - entry["reading"]
    return {"model": f"{Path(model).name}, statistics of {images:,} images, replayed from {len(own)} batches of "
            f"{source.count} images that are measured",
            "seconds": own_start + (without - own_start) * more, "alone": alone,
            "lists": [{**entry, "tasks": tasks, "alone": reading, "reading": reading}]}  # fmt: skip


def replayed(trace: dict[str, Any], workers: int, latency: float = LATENCY, bandwidth: float = BANDWIDTH) -> float:
    """Seconds of a traced run on a number of workers."""
    total, known = float(trace["alone"]) - sum(entry.get("reading", 0.0) for entry in trace["lists"]), set[str]()
    for entry in _by_layer(trace["lists"], workers):
        fresh = sum(size for digest, size in entry["shared"].items() if digest not in known)
        known |= entry["shared"].keys()
        sent = fresh * workers + sum(task["bytes"] for task in entry["tasks"])
        by_batch = entry["task"] == _BY_BATCH and len(entry["tasks"])
        busy = (_of_points if by_batch else _of_tasks)(entry["tasks"], workers, bandwidth)
        done, reading = 0.0, entry.get("reading", 0.0)
        if any(busy):
            done = max(max(busy) + fresh / bandwidth + 2 * latency, sent / bandwidth)
        total += max(done, reading) + min(done, reading) / max(len(entry["tasks"]), 1)
    return total


def _of_tasks(tasks: Sequence[Task], workers: int, bandwidth: float) -> list[float]:
    """Seconds of every worker: its tasks, and all pieces that they need."""
    busy = [0.0] * workers
    for task in tasks:
        place = int(task["home"]) % workers if task["home"] >= 0 else busy.index(min(busy))
        busy[place] += task["seconds"] + task["cut"] + task["way"] + task["bytes"] / bandwidth
    load = sum(task["load"] for task in tasks)
    return [seconds + load if seconds else 0.0 for seconds in busy]


def _of_points(tasks: Sequence[Task], workers: int, bandwidth: float) -> list[float]:
    """The same for points of curves, a task for every batch: workers load a piece once for all their batches of it."""
    busy, batches = [0.0] * workers, 1 + max(int(task["home"]) for task in tasks)
    for number in range(len(tasks) // batches):
        own = tasks[number * batches : (number + 1) * batches]
        for worker, point in _divided(CurvePoint(0, 0), number, workers, batches):
            mine = [own[place] for place in point.places or ()]
            busy[worker] += sum(task["seconds"] + task["bytes"] / bandwidth for task in mine)
            busy[worker] += max(task["load"] + task["cut"] for task in mine)
    for worker in (worker for worker, seconds in enumerate(busy) if seconds):
        kept = _kept_by(worker, workers, batches)
        busy[worker] += sum(task["way"] for number, task in enumerate(tasks) if number % batches in kept)
    return busy


def _by_layer(lists: Sequence[dict[str, Any]], workers: int) -> Iterator[dict[str, Any]]:
    """The lists as so many workers get them: the candidates for a layer, with batches that are begun in vain.

    Candidates are one list if batches have several homes, else one after the other.
    """
    judges = max((len(entry["tasks"]) for entry in lists if entry["task"] == _SCORED), default=0)
    homes = homes_of(judges, workers) if judges else []
    copies = min((len(one) for one in homes), default=1)  # candidates that no worker has both of
    waiting: list[dict[str, Any]] = []
    for entry in [*lists, {"task": ""}]:
        if entry["task"] == _SCORED:
            number = len(waiting)
            begun = [dict(task) for task in entry["tasks"]]
            usual = {**begun[-1], "load": 0.0}
            begun += [{**usual, "home": place} for place in range(len(begun), min(judges, len(begun) + workers - 1))]
            for place, task in enumerate(begun):
                task["home"] = homes[place][number % len(homes[place])]
            waiting.append({**entry, "tasks": begun})
            continue
        if waiting and any(len(one) > 1 for one in homes):
            following = waiting[-1]["tasks"] if len(waiting) < CANDIDATES else []  # begun, and no longer wanted
            spare = following[: max(0, workers - judges % workers)] if judges % workers else []
            shared = min(copies, len(waiting))
            tasks = [{**task, "load": task["load"] / shared} for one in waiting for task in one["tasks"]]
            together = tasks + [{**task, "load": 0.0} for task in spare]
            reading = sum(one.get("reading", 0.0) for one in waiting)
            waiting = [{**waiting[0], "tasks": together, "reading": reading}]
        yield from waiting
        waiting = []
        if entry["task"]:
            yield entry


def table(trace: dict[str, Any], workers: Sequence[int] = WORKERS) -> str:
    """Predicted seconds and speed-up by number of workers, and what bounds them, as Markdown."""
    alone, reading = trace["alone"], sum(entry.get("reading", 0.0) for entry in trace["lists"])
    sent = sum(task["bytes"] for entry in trace["lists"] for task in entry["tasks"]) / BANDWIDTH
    longest = max(task["seconds"] for entry in trace["lists"] for task in entry["tasks"])
    lines = [f"{trace['model']}: {trace['seconds']:.1f} s of CPU time without workers. The process that asks takes "
             f"{alone:.1f} s, {reading:.1f} s of them for results while workers go on; results take {sent:.1f} s on "
             f"the link, the longest task {longest:.1f} s.",
             "", "| workers | seconds | times as fast |", "|---|---|---|"]  # fmt: skip
    for count in workers:
        seconds = replayed(trace, count)
        lines.append(f"| {count} | {seconds:.1f} | {trace['seconds'] / seconds:.2f} |")
    lines += ["", "| tasks | lists | seconds in tasks | loading | weights | before points | alone after them |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in dict.fromkeys(entry["task"] for entry in trace["lists"]):
        mine = [entry for entry in trace["lists"] if entry["task"] == name]
        parts = [sum(task[key] for entry in mine for task in entry["tasks"]) for key in ("seconds", *KINDS)]
        parts.append(sum(entry.get("alone", 0.0) for entry in mine))
        lines.append(f"| `{name}` | {len(mine)} | " + " | ".join(f"{seconds:.1f}" for seconds in parts) + " |")
    return "\n".join(lines)


def measured(model: str, data: str, settings: dict[str, Any], workers: int) -> str:
    """Wall seconds of a run without and with workers, and whether both wrote the same model."""
    rows = []
    for count in (0, workers):
        start = time.perf_counter()
        executor = LocalWorkers(count) if count else None
        options = onnxcop.EngineOptions("cpu", 1)
        result = onnxcop.prune(model, data=data, executor=executor, options=options, **settings)
        if executor is not None:
            executor.shutdown()
        digest = hashlib.sha256(result.model.SerializeToString()).hexdigest()[:16]
        rows.append(f"| {count or 'none'} | {time.perf_counter() - start:.1f} | {digest} |")
    return "\n".join(["| workers | wall seconds | SHA-256 of the model |", "|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--criterion", default="auto")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--measure", type=int)
    parser.add_argument("--points", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--preprocess")
    given = parser.parse_args()
    settings = {"samples": given.samples, "macs": given.macs, "criterion": given.criterion}
    settings |= {"preprocess": given.preprocess} if given.preprocess else {}
    if given.replay:
        print(table(json.loads(given.replay.read_text())))
    elif given.measure:
        print(measured(given.model, given.data, settings, given.measure))
    else:
        if given.points:
            trace = traced_sweep(given.model, given.data, settings, given.points)
        elif given.images:
            trace = traced_statistics(given.model, given.data, settings, given.images)
        else:
            trace = traced(given.model, given.data, settings)
        if given.output:
            given.output.write_text(json.dumps(trace))
        print(table(trace))


if __name__ == "__main__":
    main()
