"""Memory that a run may use, and the warning if it is too little."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import onnx
import pytest
from small_models import chain

import onnxcop
from onnxcop._base import memory
from onnxcop._base.memory import Need, available_memory
from onnxcop.data.input_files import bytes_of_model
from onnxcop.runtime.session import EngineOptions

GB = 10**9


def test_what_fits_needs_no_word() -> None:
    assert Need(2 * GB).shortage(16 * GB) == ""
    assert Need(2 * GB).shortage(available=2 * GB) != ""
    assert Need(10**6, recovers=True).shortage(2 * GB) == ""


def test_the_line_says_how_much_and_what_to_do() -> None:
    line = Need(3 * GB, recovers=True).shortage(8 * GB)
    assert "8.0 GB" in line
    assert f"{Need(3 * GB, recovers=True).bytes / GB:.1f} GB" in line
    assert f"--criterion l2 --recover none needs about {Need(3 * GB).bytes / GB:.1f} GB" in line
    assert "--criterion" not in Need(3 * GB).shortage(8 * GB)  # that is what it does already


def test_recovery_takes_more() -> None:
    assert Need(GB, recovers=True).bytes > Need(GB).bytes > 2 * GB


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of memory")
def test_this_machine_has_memory() -> None:
    found = available_memory()
    assert found is not None
    assert 0 < found <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def group(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")
    return folder


def test_control_groups_of_the_second_version(tmp_path: Path) -> None:
    table = tmp_path / "cgroup"
    table.write_text("0::/outer/inner\n")
    root = group(tmp_path / "fs")
    group(root / "outer", memory__max=6 * GB, memory__current=2 * GB, memory__stat=f"anon 5\ninactive_file {GB}")
    group(root / "outer" / "inner", memory__max="max", memory__current=GB, memory__stat="inactive_file 0")
    assert list(memory._of_groups(table, root)) == [5 * GB]  # what is left of six, with the pages that can be dropped
    group(root / "outer" / "inner", memory__max=3 * GB)
    assert sorted(memory._of_groups(table, root)) == [2 * GB, 5 * GB]


def test_control_groups_of_the_first_version_and_of_a_container(tmp_path: Path) -> None:
    table = tmp_path / "cgroup"
    table.write_text("9:pids:/\n4:memory:/docker/of-the-host\n")
    group(tmp_path / "memory", memory__limit_in_bytes=4 * GB, memory__usage_in_bytes=GB)  # only the top is mounted
    assert list(memory._of_groups(table, tmp_path)) == [3 * GB]
    group(tmp_path / "memory", memory__limit_in_bytes=2**63 - 4096)
    assert list(memory._of_groups(table, tmp_path)) == []
    assert list(memory._of_groups(tmp_path / "no such file", tmp_path)) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_a_limit_of_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    assert list(memory._of_process()) == [] or available_memory() is not None
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 50, 1 << 50))
    if sys.platform == "linux":
        (left,) = memory._of_process()
        assert 0 < left < 1 << 50


def test_weights_count_for_the_graph_that_stores_them(tmp_path: Path) -> None:
    model = chain()
    inside = bytes_of_model(model)
    assert 0 < inside <= len(model.SerializeToString())
    onnx.save(model, tmp_path / "whole.onnx")
    assert bytes_of_model(tmp_path / "whole.onnx") == (tmp_path / "whole.onnx").stat().st_size
    onnx.save(model, tmp_path / "light.onnx", save_as_external_data=True, location="data", size_threshold=0)
    both = sum((tmp_path / name).stat().st_size for name in ("light.onnx", "data"))
    assert bytes_of_model(str(tmp_path / "light.onnx")) == both >= inside
    assert bytes_of_model(tmp_path / "none.onnx") == 0


@pytest.mark.parametrize("free", [10**8, 10**12])
def test_a_run_that_will_not_fit_says_so_before_it_starts(
    free: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    with caplog.at_level(logging.WARNING, "onnxcop"):
        onnxcop.prune(chain(), macs=0.8, criterion="l2", recover="none", options=EngineOptions(provider="cpu"))
    lines = [record.getMessage() for record in caplog.records if "of memory" in record.getMessage()]
    assert len(lines) == (free < GB)
    assert all("only 0.1 GB are available" in line for line in lines)


def test_recovery_is_skipped_if_not_requested_and_too_large(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = EngineOptions(provider="cpu", threads=1)
    monkeypatch.setattr(memory, "available_memory", lambda: GB)
    with caplog.at_level(logging.WARNING, "onnxcop"):
        found = onnxcop.prune(chain(), macs=0.8, criterion="l2", options=cpu)
    assert found.plan.settings["recover"] == "none"
    assert sum("weights are not compensated" in record.getMessage() for record in caplog.records) == 1
    asked = onnxcop.prune(chain(), macs=0.8, criterion="l2", recover="merge", options=cpu)
    assert asked.plan.settings["recover"] == "merge"
    monkeypatch.setattr(memory, "available_memory", lambda: 100 * GB)
    assert onnxcop.prune(chain(), macs=0.8, criterion="l2", options=cpu).plan.settings["recover"] == "full"
