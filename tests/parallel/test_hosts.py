"""Hosts in network namespaces of this machine: their workers have addresses, names and files of their own.

Slow tests, for root on Linux: `pytest -m slow tests/parallel/test_hosts.py`, with the extra `dask`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_clusters import dask_scheduler, ended, pruned, wait_for_workers

from onnxcop.errors import OnnxcopError
from onnxcop.parallel.workers import WorkersWish, opened
from onnxcop.recovery import rounds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed"),
]
QUICK = {  # seconds after which the scheduler gives up a worker that is cut off
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "10s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "15s",
}


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces on a bridge, which has the address 10.213.77.1 here; skipped where that is impossible."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root, ip and unshare")
    bridge, names = f"oc{os.getpid() % 10**6}", [f"onnxcop-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("address", "add", "10.213.77.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names, start=1):
            ip("netns", "add", name)
            ip("link", "add", f"{bridge}{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{bridge}{number}", "master", bridge, "up")
            ip("-n", name, "address", "add", f"10.213.77.{number + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        remove(bridge, names)
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    try:
        yield names
    finally:
        remove(bridge, names)


def remove(bridge: str, names: list[str]) -> None:
    for number, name in enumerate(names, start=1):
        ip("link", "delete", f"{bridge}{number}", check=False)  # a worker that is ending may hold its namespace
        ip("netns", "delete", name, check=False)
    ip("link", "delete", bridge, check=False)


def worker_on(host: str, port: int, hidden: Path | None = None) -> subprocess.Popen[bytes]:
    """A Dask worker in a namespace, under a name of its own; `hidden` is empty there."""
    begin = f"hostname {host}; {f'mount -t tmpfs none {hidden};' if hidden else ''} exec"
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://10.213.77.1:{port}", "--nthreads", "1",
              "--no-nanny", "--no-dashboard"]  # fmt: skip
    return subprocess.Popen(
        ["ip", "netns", "exec", host, "unshare", "--uts", "--mount", "sh", "-c", f'{begin} "$@"', "sh", *worker],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


@contextlib.contextmanager
def cluster(hosts: list[str], hidden: Path | None = None) -> Iterator[Any]:
    with dask_scheduler("10.213.77.1", **QUICK) as port, ended([worker_on(host, port, hidden) for host in hosts]):
        wait_for_workers("10.213.77.1", port, len(hosts))
        with opened(WorkersWish.of(f"dask://10.213.77.1:{port}")) as executor:
            yield executor


@pytest.fixture(autouse=True)
def any_network_is_refined_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "FEWEST_MACS", 0.0)


def test_a_host_is_cut_off(models_dir: Path, hosts: list[str]) -> None:
    cut: list[str] = []

    def cut_off(stage: str, done: float, total: float | None = None) -> None:
        if stage.startswith("refinement") and not cut:
            ip("-n", hosts[0], "link", "set", "eth0", "down")
            cut.append(stage)

    with cluster(hosts) as executor:
        assert pruned(models_dir, executor, cut_off) == pruned(models_dir, None)
        assert cut and len(executor.client.scheduler_info()["workers"]) == 1


def test_data_that_a_host_does_not_see(models_dir: Path, hosts: list[str], tmp_path: Path) -> None:
    data = Path(shutil.copytree(models_dir, tmp_path / "data"))
    with cluster(hosts[:1], hidden=data) as executor, pytest.raises(OnnxcopError, match=hosts[0]) as raised:
        pruned(data, executor)
    assert "digits_calib.npz" in str(raised.value)
