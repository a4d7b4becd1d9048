"""The blocks of docs/howto/cluster.md, line by line, on clusters of this machine; `pytest -m slow` runs them.

Names are replaced: the machine `head` by this one, model and data by files that are there, and numbers of workers by 2.
Instead of Slurm, a command `sbatch` starts jobs as processes.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from doc_pages import body_of
from test_clusters import answers, ray, wait_for_workers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
SBATCH = """#!/bin/sh
script="$JOBS.$$"
cp "$1" "$script"  # as Slurm does: whoever submits a job deletes its script as soon as this command ends
setsid sh "$script" > /dev/null 2>&1 &
echo "Submitted batch job $!"
echo $! >> "$JOBS"
"""


@pytest.fixture
def environment(tmp_path: Path, models_dir: Path) -> dict[str, str]:
    """A folder with `dask`, `ray`, `onnxcop` and `sbatch` among the commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    scripts = {"dask": "dask", "ray": "ray.scripts.scripts", "onnxcop": "onnxcop"}
    texts = {name: f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n' for name, module in scripts.items()}
    for name, text in {**texts, "sbatch": SBATCH, "scancel": "#!/bin/sh\n"}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "model.onnx").symlink_to(models_dir / "digits_resnet.onnx")
    (tmp_path / "images.npz").symlink_to(models_dir / "digits_calib.npz")
    paths = os.pathsep.join([str(commands), os.environ["PATH"]])
    return os.environ | {
        "PATH": paths, "PYTHONPATH": os.pathsep.join(sys.path), "JOBS": str(tmp_path / "jobs"),
        "RAY_AUTH_MODE": "disabled",
    }  # fmt: skip


def lines(body: str) -> Iterator[str]:
    """Commands of a shell block that this machine can carry out."""
    for line in body.splitlines():
        command = line.partition("#")[0].strip()
        if command and not command.startswith("pip install"):
            known = command.replace("//head:", "//127.0.0.1:").replace(" head:", " 127.0.0.1:")
            known = known.replace("--data /shared/images", "--data images.npz --samples 48 --macs 0.8")
            yield re.sub(r"(--nworkers) \d+", r"\1 2", known)


@contextlib.contextmanager
def begun(command: str, folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process with its children, for the time of a block."""
    process = subprocess.Popen(
        command, shell=True, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def carried_out(command: str, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def wait_for(port: int) -> None:
    until = time.monotonic() + 90
    while not answers("127.0.0.1", port) and time.monotonic() < until:
        time.sleep(0.2)


@pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed")
def test_the_block_about_dask(tmp_path: Path, environment: dict[str, str]) -> None:
    if answers("127.0.0.1", 8786):
        pytest.skip("something listens at port 8786")
    scheduler, workers, prune = lines(body_of("howto/cluster.md", "dask"))
    with begun(scheduler, tmp_path, environment):
        wait_for(8786)
        with begun(workers, tmp_path, environment):
            wait_for_workers("127.0.0.1", 8786, 2)
            carried_out(prune, tmp_path, environment)
    assert (tmp_path / "small.onnx").stat().st_size > 0


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_the_block_about_ray(tmp_path: Path, environment: dict[str, str]) -> None:
    if answers("127.0.0.1", 10001) or answers("127.0.0.1", 6379):
        pytest.skip("something listens at a port of Ray")
    head, node, prune = lines(body_of("howto/cluster.md", "ray"))
    try:
        for command in (head, node):
            carried_out(f"{command} --num-cpus 1 --disable-usage-stats", tmp_path, environment)
        wait_for(10001)
        time.sleep(10)  # its agents begin after its ports
        carried_out(prune, tmp_path, environment)
    finally:
        ray("stop", "--force", check=False)
    assert (tmp_path / "small.onnx").stat().st_size > 0


@pytest.mark.skipif(find_spec("dask_jobqueue") is None, reason="dask-jobqueue is not installed")
def test_the_block_about_slurm(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "slurm.py").write_text(body_of("howto/cluster.md", "slurm").replace("jobs=16", "jobs=2"))
    with begun(f"{sys.executable} -u slurm.py", tmp_path, environment) as script:
        assert script.stdout is not None and script.stdin is not None
        printed = next((line.strip() for line in script.stdout if line.startswith("dask://")), "")
        assert printed
        host, port = printed.removeprefix("dask://").split(":")
        try:
            wait_for_workers(host, int(port), 2)
            prune = next(line for line in lines(body_of("howto/cluster.md", "dask")) if line.startswith("onnxcop"))
            carried_out(prune.replace("dask://127.0.0.1:8786", printed), tmp_path, environment)
            script.stdin.write("\n")
            script.stdin.flush()
            script.wait(timeout=120)
        finally:
            for job in (tmp_path / "jobs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(job), signal.SIGKILL)
    assert (tmp_path / "small.onnx").stat().st_size > 0
