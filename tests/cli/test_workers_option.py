"""`--workers`: processes here, or the address of a cluster."""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from small_models import chain

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.parallel.dask_workers import connected
from onnxcop.parallel.workers import WorkersWish


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "net.onnx"
    path.write_bytes(chain().SerializeToString())
    return str(path)


@pytest.mark.parametrize("text", ["0", "-1", "many", "dask://host", "tcp://host:1", "ray://host:port"])
def test_what_are_no_workers_is_a_usage_error(model: str, text: str, capsys: Any) -> None:
    assert cli.run([model, "--workers", text]) == 2
    assert "is neither a number of processes from 1 nor an address" in " ".join(capsys.readouterr().err.split())


def test_descriptions_are_read() -> None:
    assert WorkersWish.of("3") == WorkersWish(count=3)
    for address in ("ray", "ray://10.0.0.1:10001", "dask://head:8786"):
        assert WorkersWish.of(address) == WorkersWish(address=address)


def test_processes_write_the_same_model(model: str, tmp_path: Path) -> None:
    written = []
    for workers in ([], ["--workers", "2"]):
        target = tmp_path / f"{len(workers)}.onnx"
        assert cli.run([model, "-o", str(target), "--threads", "1", "--latency-seconds", "0", "-q", *workers]) == 0
        written.append(target.read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_an_address_that_does_not_answer(model: str, kind: str, capsys: Any, monkeypatch: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("dask", "distributed", "ray"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sys.modules["distributed"].Client = None  # type: ignore[attr-defined]
    assert cli.run([model, "--workers", f"{kind}://127.0.0.1:{port}"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {kind}://127.0.0.1:{port} does not answer (Connection refused); check the address")


@pytest.mark.parametrize(("address", "missing"), [("dask://h:1", "distributed"), ("ray", "ray")])
def test_a_package_that_is_missing(model: str, address: str, missing: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.run([model, "--workers", address]) == 1
    assert f"install onnxcop[{address.partition(':')[0]}]" in capsys.readouterr().err


def test_an_address_that_is_silent_is_given_up(monkeypatch: Any) -> None:
    for name in ("dask", "distributed"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sys.modules["distributed"].Client = None  # type: ignore[attr-defined]

    def silent(address: object, patience: float) -> None:
        assert patience == 10
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(onnxcop.errors.OnnxcopError, match=r"does not answer \(no answer in 10 s\)"):
        connected("dask://10.255.255.1:8786")
