"""How a run would scale: records its tasks with time and bytes, and replays them on simulated workers.

A run without workers is traced: every task with its CPU seconds and the bytes that go and come, every shared value
with its bytes, and what the process does alone. The replay gives each list of tasks to N workers in order, as soon as
one is free, or to the worker that keeps the batch, with a latency for each message and one link of a bandwidth that all
share. Messages of a list overlap with its tasks, save the first and the last. Lists are barriers. What each worker does
for itself (loading pieces, reading shared values) is measured apart, and every worker of a list spends it. Points of
curves are recorded batch by batch, each with its own pieces: with fewer workers than batches that is too much, since a
worker loads the pieces of its batches once. Speed-up is relative to a run without workers, which is measured before.

    python tools/bench_scaling.py models/digits_resnet.onnx models/digits_calib.npz -o trace.json
    python tools/bench_scaling.py --replay trace.json
    python tools/bench_scaling.py models/digits_resnet.onnx models/digits_calib.npz --measure 2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, ClassVar

import onnxcop
from onnxcop.parallel import crew as crew_module
from onnxcop.parallel.crew import Crew, Shared
from onnxcop.parallel.local import LocalWorkers
from onnxcop.pipeline import prune as pipeline
from onnxcop.reconstruction.refine_batches import homes_of
from onnxcop.runtime.segments import Prefixes
from onnxcop.runtime.session import Session

WORKERS = (1, 2, 4, 8, 16, 64)
_BY_BATCH = "measure_point"  # tasks whose batch is their home: what comes before a point is computed for it alone
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
        own, start = _own[0], time.thread_time()
        answer = fn(*args)
        seconds, own = time.thread_time() - start, _own[0] - own
        self.inside += seconds
        size = len(pickle.dumps(args)) + len(pickle.dumps(answer))
        self.tasks.append({"seconds": seconds - own, "own": own, "bytes": size, "home": home})
        future.set_result(answer)
        return future


_own = [0.0]  # seconds so far that every worker spends for itself


def _apart(place: Any, name: str) -> None:
    """Add the seconds of a function to those that every worker spends for itself; calls inside it count once."""
    real, inside = getattr(place, name), _inside

    def timed(*args: Any, **kwargs: Any) -> Any:
        start, outer = time.thread_time(), inside[0]
        inside[0] = True
        try:
            return real(*args, **kwargs)
        finally:
            inside[0] = outer
            _own[0] += 0.0 if outer else time.thread_time() - start

    setattr(place, name, timed)


_inside = [False]


class _Recorder(Crew):
    """Notes every list of tasks."""

    lists: ClassVar[list[dict[str, Any]]] = []

    def shares(self, count: int) -> int:
        """As many as there can be: the replay puts them together."""
        return count

    def run(self, task: Any, items: Iterable[Any], *shared: Shared[Any], **settings: Any) -> Generator[Any]:
        executor: Any = self._executor
        executor.tasks = tasks = []
        entry = {
            "task": task.__name__, "alone": time.thread_time() - executor.inside, "tasks": tasks,
            "shared": {one.digest: 0 if one.path is None else one.path.stat().st_size for one in shared},
        }  # fmt: skip
        self.lists.append(entry)
        yield from super().run(task, items, *shared, **settings)


def traced(model: str, data: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Carry out a run here without workers, for its CPU time, then once more in tasks, and return its trace."""
    options = onnxcop.EngineOptions("cpu", 1)
    start = time.thread_time()
    onnxcop.prune(model, data=data, options=options, **settings)
    without = time.thread_time() - start
    pipeline.Crew = _Recorder  # type: ignore[misc, attr-defined]
    for place, name in ((Session, "__init__"), (crew_module, "_value_of"), (Prefixes, "at")):
        _apart(place, name)
    start = time.thread_time()
    executor = _Inline()
    onnxcop.prune(model, data=data, executor=executor, options=options, **settings)
    total = time.thread_time() - start
    lists = _Recorder.lists
    ends = [*(entry["alone"] for entry in lists[1:]), start + total - executor.inside]
    for entry, end in zip(lists, ends, strict=True):  # what follows a list, or is done with its results
        entry["alone"] = end - entry["alone"]
    inside = sum(task["seconds"] + task["own"] for entry in lists for task in entry["tasks"])
    return {"model": Path(model).name, "seconds": without, "alone": total - inside, "lists": lists}


def replayed(trace: dict[str, Any], workers: int, latency: float = LATENCY, bandwidth: float = BANDWIDTH) -> float:
    """Seconds of a traced run on a number of workers."""
    total, known = float(trace["alone"]), set[str]()
    for entry in _side_by_side(trace["lists"], workers):
        fresh = sum(size for digest, size in entry["shared"].items() if digest not in known)
        known |= entry["shared"].keys()
        sent = fresh * workers + sum(task["bytes"] for task in entry["tasks"])
        busy, tasks = [0.0] * workers, entry["tasks"]
        parts = 1 + max((int(task["home"]) for task in tasks), default=-1) if entry["task"] == _BY_BATCH else 0
        for number, task in enumerate(tasks):
            home = int(task["home"]) + (number // parts % max(1, workers // parts) * parts if parts else 0)
            place = home % workers if home >= 0 else busy.index(min(busy))
            busy[place] += task["seconds"] + task["bytes"] / bandwidth + (task["own"] if parts else 0.0)
        own = 0.0 if parts else sum(task["own"] for task in tasks)
        own += fresh / bandwidth + 2 * latency
        total += max(*(seconds + own for seconds in busy if seconds), sent / bandwidth) if any(busy) else 0.0
    return total


def _side_by_side(lists: Sequence[dict[str, Any]], workers: int) -> Iterator[dict[str, Any]]:
    """The lists, with candidates for a layer side by side where batches have several homes."""
    waiting: list[dict[str, Any]] = []
    for entry in [*lists, {"task": ""}]:
        if entry["task"] == "score_batch":
            waiting.append(entry)
            continue
        homes = homes_of(len(waiting[0]["tasks"]), workers) if waiting else []
        if any(len(one) > 1 for one in homes):
            tasks = [
                {**task, "home": homes[place][number % len(homes[place])]}
                for number, one in enumerate(waiting)
                for place, task in enumerate(one["tasks"])
            ]
            apart = min(len(one) for one in homes)  # candidates that no worker has both of
            late = waiting[-1]["tasks"][:workers] if len(waiting) < 3 else []  # begun, and no longer wanted
            tasks += [{**task, "home": home, "own": 0.0} for home, task in enumerate(late)]
            tasks = [{**task, "own": task["own"] / min(apart, len(waiting))} for task in tasks]
            waiting = [{**waiting[0], "tasks": tasks}]
        yield from waiting
        waiting = []
        if entry["task"]:
            yield entry


def table(trace: dict[str, Any], workers: Sequence[int] = WORKERS) -> str:
    """Predicted seconds and speed-up by number of workers, and what bounds them, as Markdown."""
    bound = trace["seconds"] / trace["alone"]
    share = trace["alone"] / trace["seconds"]
    lines = [f"{trace['model']}: {trace['seconds']:.1f} s of CPU time, {share:.0%} of it in "
             f"the process that asks, so at most {bound:.1f} times as fast.",
             "", "| workers | seconds | times as fast |", "|---|---|---|"]  # fmt: skip
    for count in workers:
        seconds = replayed(trace, count)
        lines.append(f"| {count} | {seconds:.1f} | {trace['seconds'] / seconds:.2f} |")
    lines += ["", "| tasks | lists | seconds in tasks | that each worker spends | that the asking process spends |",
              "|---|---|---|---|---|"]  # fmt: skip
    for name in dict.fromkeys(entry["task"] for entry in trace["lists"]):
        mine = [entry for entry in trace["lists"] if entry["task"] == name]
        seconds, own = (sum(task[key] for entry in mine for task in entry["tasks"]) for key in ("seconds", "own"))
        alone = sum(entry.get("alone", 0.0) for entry in mine)
        lines.append(f"| `{name}` | {len(mine)} | {seconds:.1f} | {own:.1f} | {alone:.1f} |")
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
    given = parser.parse_args()
    settings = {"samples": given.samples, "macs": given.macs, "criterion": given.criterion}
    if given.replay:
        print(table(json.loads(given.replay.read_text())))
    elif given.measure:
        print(measured(given.model, given.data, settings, given.measure))
    else:
        trace = traced(given.model, given.data, settings)
        if given.output:
            given.output.write_text(json.dumps(trace))
        print(table(trace))


if __name__ == "__main__":
    main()
