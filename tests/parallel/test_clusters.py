"""Real clusters on this machine: a worker is killed in each phase, and the result stays the same.

They start processes, kill them and wait for time-outs, so they are among the slow tests: `pytest -m slow
tests/parallel/test_clusters.py` in an environment with the extras `dask` and `ray`. One of them belongs to every run of
the tests, in a process of its own: what goes wrong with a cluster can end the process that uses it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import chain, disturbed

import onnxcop
from onnxcop._base.progress import silent
from onnxcop.data.open import open_source
from onnxcop.parallel.crew import Crew, WorkerError
from onnxcop.parallel.workers import WorkersWish, crew_for, opened
from onnxcop.recovery import rounds
from onnxcop.runtime.session import Session
from onnxcop.training import shards
from onnxcop.training.distill import DistillOptions, distill
from onnxcop.training.schedule import Effort

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
PHASES = ("statistics (fit)", "statistics (held-out)", "curves", "refinement", "distillation")
APART = 480  # seconds for a test in a process of its own

pytestmark = pytest.mark.filterwarnings("default")  # those of the cluster's packages
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def any_network_is_refined_and_trained_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "FEWEST_MACS", 0.0)
    monkeypatch.setattr(shards, "FEWEST_MACS", 1.0)


def in_a_process_of_its_own(name: str) -> str:
    """Run a test of this file in another process and session; returns its output, or the reason why it was stopped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", f"{__file__}::{name}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    stopped = ""
    try:
        output, _ = process.communicate(timeout=APART)
    except subprocess.TimeoutExpired:
        stopped = f"{name} was stopped after {APART} s\n"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and all that it has started
    return stopped + (process.communicate()[0] if stopped else output)


@pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed")
def test_a_dask_cluster_in_a_process_of_its_own() -> None:
    output = in_a_process_of_its_own("test_a_dask_cluster_that_loses_workers")
    assert "1 passed" in output, output


def pruned(models_dir: Path, executor: Executor | None, progress: Any = None) -> bytes:
    result = onnxcop.prune(
        models_dir / "digits_resnet.onnx", data=models_dir / "digits_calib.npz", executor=executor, macs=0.7,
        samples=48, batch_size=8, options=CPU, progress=progress,
    )  # fmt: skip
    return result.model.SerializeToString() + distilled(executor, progress)


def distilled(executor: Executor | None, progress: Any = None) -> bytes:
    """A student that learns from what the workers compute."""
    values = np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32)
    with Session(chain(), CPU) as session:
        source = open_source({"x": values}, session.inputs, samples=96, batch_size=16)
    options = DistillOptions(effort=Effort(epochs=6), rate=3e-3, batch_size=16, engine=CPU)
    found = distill(disturbed(), chain(), source, options, progress or silent, crew=crew_for(executor))
    assert found.kept
    return found.model.SerializeToString()


class Killer:
    """Kills a worker in every phase of a run."""

    def __init__(self, victims: Callable[[], list[int]]) -> None:
        self.victims, self.killed = victims, list[str]()

    def __call__(self, stage: str, done: float, total: float | None = None) -> None:
        phase = next((phase for phase in PHASES if stage.startswith(phase)), None)
        if phase is not None and phase not in self.killed:
            os.kill(self.victims()[0], signal.SIGKILL)
            self.killed.append(phase)


def pids_of(*words: str) -> list[int]:
    """Processes whose command lines contain all of some words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
            if all(word in line for word in words):
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def dask(port: int, workers: int = 1) -> Iterator[Any]:
    """A cluster's workers as soon as all of them are there."""
    for _ in range(12):  # a busy machine starts a worker in more time than a user is made to wait
        with contextlib.suppress(WorkerError), opened(WorkersWish.of(f"dask://127.0.0.1:{port}")) as executor:
            executor.client.wait_for_workers(workers, timeout=120)
            break
    with opened(WorkersWish.of(f"dask://127.0.0.1:{port}")) as executor:
        yield executor


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def answers(host: str, port: int) -> bool:
    with socket.socket() as place:
        return not place.connect_ex((host, port))


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


def started(module: str, *arguments: str, cwd: Path | None = None, **changes: str) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=quiet, stderr=quiet, cwd=cwd,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | changes)  # fmt: skip


def dask_worker(port: int, cwd: Path | None = None, **changes: str) -> subprocess.Popen[bytes]:
    return started(
        "distributed.cli.dask_worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1", "--no-nanny", "--no-dashboard",
        cwd=cwd, **changes,
    )  # fmt: skip


@contextlib.contextmanager
def dask_scheduler(host: str = "127.0.0.1", cwd: Path | None = None, **changes: str) -> Iterator[int]:
    port = free_port()
    process = started("distributed.cli.dask_scheduler", "--host", host, "--port", str(port), "--no-dashboard",
                      cwd=cwd, **changes)  # fmt: skip
    with ended([process]):
        until = time.monotonic() + 60
        while not answers(host, port) and time.monotonic() < until:
            time.sleep(0.2)
        yield port


@pytest.fixture
def scheduler() -> Iterator[int]:
    with dask_scheduler() as port:
        yield port


@slow
@pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed")
def test_a_dask_cluster_that_loses_workers(models_dir: Path, scheduler: int) -> None:
    expected, workers = pruned(models_dir, None), [dask_worker(scheduler) for _ in range(6)]
    with ended(workers), dask(scheduler, 6) as executor:
        killer = Killer(lambda: [worker.pid for worker in workers if worker.poll() is None])
        assert pruned(models_dir, executor, killer) == expected
        assert killer.killed == [*PHASES]
        assert len(executor.client.scheduler_info()["workers"]) == 1  # the run did not go on here
        for worker in workers:
            worker.kill()
        crew = Crew(executor)
        assert list(crew.run(abs, [-1, -2])) == [1, 2]
        assert not crew.spread


@slow
@pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed")
def test_the_executor_of_a_client(models_dir: Path, scheduler: int) -> None:
    with ended([dask_worker(scheduler) for _ in range(2)]), dask(scheduler, 2) as executor:
        stages: list[str] = []
        found = pruned(models_dir, executor.client.get_executor(), lambda stage, done, total=None: stages.append(stage))
    assert found == pruned(models_dir, None) and "refinement" in stages


@slow
@pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed")
def test_a_scheduler_that_goes_away(scheduler: int) -> None:
    with ended([dask_worker(scheduler)]), dask(scheduler) as executor:
        crew = Crew(executor)
        results = crew.run(abs, range(-30, 0))
        assert next(results) == 30
        os.kill(next(one for one in pids_of("dask_scheduler", str(scheduler))), signal.SIGKILL)
        assert list(results) == list(range(29, 0, -1))


@slow
@pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed")
def test_a_dask_worker_without_the_package(scheduler: int, tmp_path: Path) -> None:
    (tmp_path / "onnxcop.py").write_text("raise ModuleNotFoundError(\"No module named 'onnxcop'\")")
    with (
        ended([dask_worker(scheduler, tmp_path, PYTHONPATH=str(tmp_path))]),
        pytest.raises(WorkerError, match=r"the worker at tcp:.* cannot import what it needs .*onnxcop"),
    ):
        wait_for_workers("127.0.0.1", scheduler)
        with opened(WorkersWish.of(f"dask://127.0.0.1:{scheduler}")):
            pass


@slow
@pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed")
def test_a_dask_scheduler_without_the_package(tmp_path: Path) -> None:
    (tmp_path / "onnxcop.py").write_text("raise ModuleNotFoundError(\"No module named 'onnxcop'\")")
    with (
        dask_scheduler(cwd=tmp_path, PYTHONPATH=str(tmp_path)) as port,
        ended([dask_worker(port)]),
        dask(port) as executor,
        pytest.raises(WorkerError, match="the scheduler cannot read tasks; install onnxcop"),
    ):
        list(Crew(executor).run(abs, [-1]))


@slow
@pytest.mark.parametrize(("package", "scheme"), [("distributed", "dask"), ("grpc", "ray")])
def test_an_address_where_something_else_listens(package: str, scheme: str) -> None:
    if find_spec(package) is None or find_spec(package if scheme == "dask" else "ray") is None:
        pytest.skip(f"{package} is not installed")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start, address = time.monotonic(), f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(WorkerError, match="what listens there does not answer"), opened(WorkersWish.of(address)):
            pass
    assert time.monotonic() - start < 30  # ten seconds, on a busy machine


def wait_for_workers(host: str, port: int, count: int = 1) -> None:
    from distributed import Client

    with Client(f"tcp://{host}:{port}", timeout=60, set_as_default=False) as client:
        client.wait_for_workers(count, timeout=120)


@slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_ray_cluster_that_loses_workers(models_dir: Path) -> None:
    expected = pruned(models_dir, None)

    with opened(WorkersWish.of("ray")) as executor:
        # Ray's agents are called ray::DashboardAgent and ray::RuntimeEnvAgent: without them Ray ends this process.
        killer = Killer(lambda: pids_of("ray::_Worker"))
        assert pruned(models_dir, executor, killer) == expected
        assert killer.killed == [*PHASES]


@slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_ray_head_and_another_node_that_lose_workers(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a token that is left from another cluster would be asked for
    expected, port, client_port = pruned(models_dir, None), str(free_port()), str(free_port())
    try:
        ray("start", "--head", "--num-cpus", "1", "--port", port, "--ray-client-server-port", client_port,
            "--include-dashboard", "false", "--disable-usage-stats")  # fmt: skip
        ray("start", "--address", f"127.0.0.1:{port}", "--num-cpus", "2")
        with opened(WorkersWish.of(f"ray://127.0.0.1:{client_port}")) as executor:
            killer = Killer(lambda: pids_of("ray::_Worker"))
            assert pruned(models_dir, executor, killer) == expected
            assert killer.killed == [*PHASES]
    finally:
        ray("stop", "--force", check=False)


def ray(*arguments: str, check: bool = True) -> None:
    """The command `ray`; what it starts can import the package."""
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        check=False, text=True, timeout=180, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout[-2000:]
