"""A stopped run leaves nothing behind; anything that it could not remove is removed by the next run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from cli_runs import BARE

from onnxcop._base import scratch

WAITING = """
import signal, sys, time
import onnxcop.runtime.session as session
from onnxcop.cli import main
from onnxcop.pipeline import finish

for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # nohup and background jobs ignore some
    signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
session.LARGEST_IN_MEMORY = 1  # every session goes through a file

def wait(model, *_):
    held = session.Session(model, session.EngineOptions(provider="cpu"))
    print("waiting", flush=True)
    while True:
        time.sleep(0.05)

finish.verify = wait
main.main()
"""


def waiting_run(model: Path, temporary: Path) -> subprocess.Popen[str]:
    """A run that has written temporary files and waits."""
    run = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(model), *BARE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == "waiting\n"
    assert list(temporary.glob("onnxcop-*/*/weights.bin")) != []
    return run


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_as_ctrl_c_does(number: int, code: int, model: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = sorted(tmp_path.iterdir())
    run = waiting_run(model, temporary)
    run.send_signal(number)
    _, shown = run.communicate(timeout=60)
    assert run.returncode == code
    assert shown.splitlines()[-1] == "stopped; no file is partly written"
    assert list(temporary.glob("onnxcop-*")) == []
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_folders_of_killed_runs_are_removed_by_the_next(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    killed, alive = waiting_run(model, temporary), waiting_run(model, temporary)
    try:
        killed.kill()
        killed.communicate(timeout=60)
        (temporary / "onnxcop-of-a-stranger").mkdir()
        (temporary / "onnxcop-of-a-stranger" / "weights.bin").touch()
        (temporary / "onnxcop-a-file").touch()
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        assert scratch.remove_leftovers() == 0  # too young to be told from one that is just being made
        for lock in temporary.glob("*/.onnxcop-lock"):
            os.utime(lock, (time.time() - 3600,) * 2)
        assert len(list(temporary.glob("onnxcop-*"))) == 4
        assert scratch.remove_leftovers() == 1
        assert len(list(temporary.glob("onnxcop-*"))) == 3
        assert list(temporary.glob("onnxcop-*/*/weights.bin")) != []  # of the run that lives
    finally:
        alive.terminate()
        alive.communicate(timeout=60)
    assert {path.name for path in temporary.glob("onnxcop-*")} == {"onnxcop-of-a-stranger", "onnxcop-a-file"}
