"""How a run would scale: records its tasks with time and bytes, and replays them on simulated workers.

A run without workers is traced: every task with its CPU seconds and the bytes that go and come, every shared value
with its bytes, and what the process does alone. The replay gives each list of tasks to N workers in order, as soon as
one is free, with a latency for each message and one link of a bandwidth that all share. Lists are barriers.

    python tools/bench_scaling.py models/digits_resnet.onnx models/digits_calib.npz -o trace.json
    python tools/bench_scaling.py --replay trace.json
    python tools/bench_scaling.py models/digits_resnet.onnx models/digits_calib.npz --measure 2
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import pickle
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, ClassVar

import onnxcop
from onnxcop.parallel.crew import Crew, Shared
from onnxcop.parallel.local import LocalWorkers
from onnxcop.pipeline import prune as pipeline

WORKERS = (1, 2, 4, 8, 16, 64)
LATENCY, BANDWIDTH = 1e-3, 1.25e9  # seconds of a message; bytes a second (10 Gbit/s)


class _Inline(Executor):
    """Carries tasks out at once and records them."""

    width = 1

    def __init__(self) -> None:
        self.tasks: list[dict[str, float]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        start = time.thread_time()
        answer = fn(*args)
        seconds = time.thread_time() - start
        out = len(pickle.dumps(answer))
        self.tasks.append({"seconds": seconds, "bytes": len(pickle.dumps(args)) + out})
        future.set_result(answer)
        return future


class _Recorder(Crew):
    """Notes every list of tasks."""

    lists: ClassVar[list[dict[str, Any]]] = []

    def run(self, task: Any, items: Iterable[Any], *shared: Shared[Any], **settings: Any) -> Generator[Any]:
        executor: Any = self._executor
        executor.tasks = tasks = []
        entry = {
            "task": task.__name__, "began": time.thread_time(), "tasks": tasks,
            "shared": {one.digest: 0 if one.path is None else one.path.stat().st_size for one in shared},
        }  # fmt: skip
        self.lists.append(entry)
        yield from super().run(task, items, *shared, **settings)


def traced(model: str, data: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Carry out a run here, and return its trace."""
    pipeline.Crew = _Recorder  # type: ignore[misc, attr-defined]
    start = time.thread_time()
    onnxcop.prune(model, data=data, executor=_Inline(), options=onnxcop.EngineOptions("cpu", 1), **settings)
    total = time.thread_time() - start
    lists = [{key: value for key, value in entry.items() if key != "began"} for entry in _Recorder.lists]
    inside = sum(task["seconds"] for entry in lists for task in entry["tasks"])
    return {"model": Path(model).name, "seconds": total, "alone": total - inside, "lists": lists}


def replayed(trace: dict[str, Any], workers: int, latency: float = LATENCY, bandwidth: float = BANDWIDTH) -> float:
    """Seconds of a traced run on a number of workers."""
    total, known = float(trace["alone"]), set[str]()
    for entry in trace["lists"]:
        fresh = sum(size for digest, size in entry["shared"].items() if digest not in known)
        known |= entry["shared"].keys()
        sent = fresh * workers + sum(task["bytes"] for task in entry["tasks"])
        free = [fresh / bandwidth] * workers
        heapq.heapify(free)
        for task in entry["tasks"]:
            heapq.heappush(free, heapq.heappop(free) + task["seconds"] + 2 * latency + task["bytes"] / bandwidth)
        total += max(*free, sent / bandwidth)
    return total


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
    shares: dict[str, float] = {}
    for entry in trace["lists"]:
        shares[entry["task"]] = shares.get(entry["task"], 0.0) + sum(task["seconds"] for task in entry["tasks"])
    lines += ["", *(f"- `{name}`: {seconds:.1f} s in tasks" for name, seconds in shares.items())]
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
