"""Times of another device: the script that measures them there, the table, and models pruned by it here."""

from __future__ import annotations

import ast
import copy
import itertools
import json
import platform
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import REPO_ROOT
from executors import AnyOrder, Homes
from onnx import numpy_helper
from small_models import chain, shapes, times_in_blocks, written

import onnxcop
from onnxcop._base import cache
from onnxcop.analysis.time_model import TimedOperator
from onnxcop.analysis.timing import time_model
from onnxcop.cli import main as cli
from onnxcop.errors import BudgetError, EngineError, ModelError, PlanMismatchError
from onnxcop.parallel.crew import WorkerError
from onnxcop.pipeline import finish, timing, widths
from onnxcop.pipeline.profile import entries_of, plain, profile, profile_script, times_from
from onnxcop.runtime import kernel_times, on_device, time_table, turns
from onnxcop.runtime.device_table import DeviceTable
from onnxcop.runtime.machine import Machine
from onnxcop.runtime.staircase import Staircase
from onnxcop.runtime.time_table import TimeTable

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
BARE: dict[str, Any] = {"recover": "none", "criterion": "l2"}
WIDE = (64, 96)
WHOLE = 9.0 * (3 * WIDE[0] + WIDE[0] * WIDE[1])
DIGITS = REPO_ROOT / "models" / "digits_resnet.onnx"


def blocks(width: int) -> int:
    return -(-width // 16) * 16


def made_up_times(model: bytes, *_: Any) -> dict[int, float]:
    return times_in_blocks(model, blocks)


def fail(*_: Any, **__: Any) -> Any:
    raise AssertionError("this machine was timed")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose times are made up, while this machine must not be timed."""

    monkeypatch.setattr(on_device, "kernel_times", made_up_times)
    monkeypatch.setattr(on_device, "_stairs", lambda *_: [2.0, 2.0, 1.0, 1.0, 0.75])
    for module, name in ((time_table, "kernel_times"), (timing, "measure_times"), (widths, "staircase_of")):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(finish, "timed", fail)


@pytest.fixture
def table(device: None, tmp_path: Path) -> Path:
    """A table of a chain of two layers, on the made-up device; it holds no whole models."""
    written(chain(widths=WIDE), tmp_path / "net.onnx")
    path = tmp_path / "times.json"
    profile(tmp_path / "net.onnx", path, options=CPU, seconds=1e-3)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"cuts": [], "machine": document["machine"] | {"processor": "Abacus 3"}}))
    return path


def share(model: onnx.ModelProto) -> float:
    """Share of the time on the simulated device."""
    found = shapes(model)
    one, two = (blocks(found[name][0]) for name in ("w1", "w2"))
    return 9.0 * (3 * one + one * two) / WHOLE


# Pruning by a table


@pytest.mark.parametrize("bound", [0.9, 0.6, 0.3])
def test_the_time_of_the_device_is_spent(table: Path, bound: float) -> None:
    result = onnxcop.prune(table.with_name("net.onnx"), latency=bound, latency_table=table, latency_seconds=1.0, **BARE)
    assert bound - 0.26 < share(result.model) <= bound
    expected = result.report.expected
    assert expected is not None
    assert expected.ratio == pytest.approx(share(result.model), abs=1e-6)
    assert result.report.latency is None
    assert [shapes(result.model)[name][0] % 16 for name in ("w1", "w2")] == [0, 0]


def test_the_summary_names_the_timed_device(table: Path) -> None:
    result = onnxcop.prune(table.with_name("net.onnx"), macs=0.7, latency_table=table, **BARE)
    width, times = result.report.choices
    assert width == "widths: multiples of 16, of 4 in narrow layers, as that device computes them"
    assert times.startswith(f"latency: expected from {table}, measured on Abacus 3 (ONNX Runtime ")
    assert times.endswith("CPU, threads: 1), not here")
    (row,) = [line for line in str(result).splitlines() if "latency (expected)" in line]
    assert f"{100 * share(result.model):.0f}%" in row


def test_with_data_a_drop_of_quality_bounds_the_cut_as_well(table: Path) -> None:
    samples = np.random.default_rng(1).standard_normal((40, 3, 8, 8)).astype(np.float32)
    model, given = table.with_name("net.onnx"), {"latency_table": table, "data": samples, "options": CPU}
    given["limits"] = onnxcop.Limits(multiple_of=16)
    assert share(onnxcop.prune(model, latency=0.6, divergence=10.0, **given).model) <= 0.6
    with pytest.raises(BudgetError, match=r"--latency 0\.6 and --divergence 1e-09 cannot both hold"):
        onnxcop.prune(model, latency=0.6, divergence=1e-9, **given)


def test_a_time_that_the_device_cannot_reach_is_an_error(table: Path) -> None:
    limits = onnxcop.Limits(min_filters=32)
    with pytest.raises(BudgetError, match=r"--latency 0\.1 cannot be reached: .* ask for --latency 0\.1\d+ or more"):
        onnxcop.prune(table.with_name("net.onnx"), latency=0.1, latency_table=table, limits=limits, **BARE)


def test_a_sweep_takes_a_table(table: Path) -> None:
    points = list(onnxcop.sweep(table.with_name("net.onnx"), [0.8, 0.5], latency_table=table, options=CPU, **BARE))
    kept = [point.row()["latency_expected"] for point in points]
    assert kept == [pytest.approx(share(point.result.model), abs=1e-6) for point in points]
    assert kept[1] < kept[0] < 1.0


def test_whole_models_correct_the_sum_of_operators(table: Path) -> None:
    document = json.loads(table.read_text())
    analysis = onnxcop.analyze(chain(widths=WIDE))
    half = [size if size == 3 else size // 2 for size in document["axes"]]
    bare = times_from(DeviceTable.load(table), analysis, "finest")
    table.write_text(json.dumps(document | {"cuts": [{"kept": half, "ratio": 0.6, "error": 0.01}]}))
    corrected = times_from(DeviceTable.load(table), analysis, "finest")
    far, near = bare.fraction(np.array(half)), corrected.fraction(np.array(half))
    assert far < 0.4
    assert 0.6 - 0.3 * (0.6 - far) < near < 0.6
    assert corrected.fraction(np.array(document["axes"])) == 1.0


def test_a_table_predicts_what_live_times_predict(
    device: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = profile(DIGITS, options=CPU, seconds=1e-3)
    monkeypatch.setattr(time_table, "kernel_times", made_up_times)
    analysis = onnxcop.analyze(DIGITS, keep_initializer_inputs=False)
    live = time_model(analysis, TimeTable(Machine.of(CPU), {}), Staircase(4, 16), CPU)
    there = times_from(found, analysis, "finest")
    rng = np.random.default_rng(0)
    for _ in range(20):
        kept = rng.integers(1, analysis.structure.axis_sizes + 1)
        assert there.seconds(kept) == pytest.approx(live.seconds(kept), rel=1e-9)


@pytest.mark.parametrize("width", [32, 64, 96])
def test_half_a_block_is_timed_and_not_taken_for_half_the_time(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(time_table, "kernel_times", made_up_times)
    analysis = onnxcop.analyze(chain(widths=(width, width)))
    times = time_model(analysis, TimeTable(Machine.of(CPU), {}), Staircase(4, 16), CPU)
    kept = np.where(analysis.structure.axis_sizes == width, 8, 3)
    assert times.seconds(kept) == pytest.approx(9.0 * 16 * (3 + 16), rel=1e-3)  # as with a whole block


def test_what_timing_takes_is_taken_off() -> None:
    def event(number: int, microseconds: int) -> dict[str, Any]:
        return {"name": f"timed_{number}_kernel_time", "cat": "Node", "dur": microseconds}

    runs = [event(number, took) for number, took in ((0, 9), (1, 2), (kernel_times.REFERENCE, 3)) for _ in range(4)]
    found = kernel_times.from_events(runs, 4)
    assert found == {0: pytest.approx(6e-6), 1: pytest.approx(0.05 * 2.5e-6)}
    assert kernel_times.from_events(runs[:4], 4) == {0: pytest.approx(9.5e-6)}


def test_narrower_than_all_that_was_timed_is_not_slower() -> None:
    noisy = TimedOperator((0,), (np.array([16, 32, 64]),), np.array([1.2, 1.0, 2.0]))
    assert [noisy.at([width]) for width in (1, 16, 32, 48, 64)] == pytest.approx([1.2, 1.2, 1.0, 1.5, 2.0])
    steady = TimedOperator((0,), (np.array([16, 32, 64]),), np.array([1.0, 2.0, 4.0]))
    assert steady.at([8]) == pytest.approx(0.5)


def test_the_command_line(device: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(chain(widths=WIDE), tmp_path / "net.onnx"), tmp_path / "small.onnx"
    assert cli.run(["profile", str(path), "--threads", "1", "--provider", "cpu", "--seconds", "0.001"]) == 0
    assert "cuts on " in capsys.readouterr().out
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"latency: 0.8\nmachine:\n  latency-table: {tmp_path / 'net.times.json'}\n")
    assert cli.run([str(path), "-o", str(out), "--recipe", str(recipe), "--recover", "none", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["expected"]["ratio"] <= 0.8
    assert document["latency"] is None
    table = tmp_path / "net.times.json"
    assert cli.run([str(path), "-o", str(table), "--latency-table", str(table)]) == 1
    assert "net.times.json" in capsys.readouterr().err
    assert cli.run(["profile", str(path), "-o", "a.json", "--script", "a.py"]) == 2
    assert cli.run(["profile", str(path), "--workers", "2", "--script", "a.py"]) == 2


@pytest.mark.parametrize("target", ["net.onnx", "missing/times.json"])
def test_a_table_that_cannot_be_written_is_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(on_device, "kernel_times", fail)
    path = written(chain(widths=WIDE), tmp_path / "net.onnx")
    before = path.read_bytes()
    with pytest.raises(ModelError, match=r"input model|does not exist"):
        profile(path, tmp_path / target, options=CPU)
    assert path.read_bytes() == before


# On workers


def test_workers_time_the_parts_of_a_table(device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "TOGETHER", 4)
    monkeypatch.setattr(on_device.TimedSet, "_cut", lambda self, number: ([2.0, 1.0, 4.0], 0.9 - 0.2 * number, 0.01))

    def found(executor: Executor | None) -> DeviceTable:
        return profile(chain(widths=WIDE), options=CPU, executor=executor)

    expected = found(None)
    assert expected.seconds == 2.0
    assert [cut.ratio for cut in expected.cuts] == pytest.approx([0.9, 0.7, 0.5, 0.3])
    with Homes(2) as homes, AnyOrder() as shuffled:
        assert found(homes) == found(shuffled) == expected
    assert shuffled.order != sorted(shuffled.order)
    assert sum(homes.tasks_of) == len(shuffled.order) == 3 + -(-len(expected.operators) // 4) + 4
    assert min(homes.tasks_of) >= 4


def test_processes_time_a_model(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    written(chain(), path)
    assert cli.run(["profile", str(path), "--provider", "cpu", "--seconds", "0.01", "--workers", "2", "-q"]) == 0
    found = DeviceTable.load(tmp_path / "net.times.json")
    assert found.machine == Machine.of(CPU)
    assert found.seconds > 0 and len(found.cuts) > 1 and None not in found.operators.values()


def test_workers_of_two_kinds_are_refused(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"processor": "Abacus 3", "runtime": "1.0", "provider": "CPUExecutionProvider", "threads": 1}
    kinds = itertools.chain([facts, facts], itertools.repeat({**facts, "processor": "Abacus 4"}))
    monkeypatch.setattr(on_device, "machine", lambda *_: next(kinds))
    with Homes(2) as homes, pytest.raises(WorkerError) as caught:
        profile(chain(widths=WIDE), options=CPU, seconds=1e-3, executor=homes)
    host = platform.node()
    assert str(caught.value) in {  # which of them asks first is a matter of threads
        f"the workers at {host} and {host} are of different kinds (processor: Abacus {one}, Abacus {7 - one}), and a "
        "table holds times of one; give --workers machines of one kind"
        for one in (3, 4)
    }


# The script


def test_the_script_runs_with_numpy_and_onnx_runtime_alone(tmp_path: Path) -> None:
    script, table = tmp_path / "times.py", tmp_path / "table.json"
    script.write_text(profile_script(DIGITS, options=CPU))
    assert script.stat().st_size < 100_000
    barred = (
        "import runpy, sys\n"
        "class Bar:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] not in {'numpy', 'onnxruntime'} | sys.stdlib_module_names:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Bar())\n"
        f"sys.argv = ['times.py', '-o', {str(table)!r}, '--threads', '1', '--seconds', '0.02']\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", barred], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"wrote {table}" in done.stdout
    found = DeviceTable.load(table)
    assert found.machine == Machine.of(CPU)
    assert len(found.cuts) == 4
    assert found.seconds > 0
    assert len(found.operators) > 50
    assert None not in found.operators.values()
    result = onnxcop.prune(DIGITS, macs=0.7, latency_table=table, **BARE)
    assert result.report.expected is not None
    assert found.device in result.report.choices[1]


def test_the_script_says_in_a_line_what_fails(tmp_path: Path) -> None:
    script = tmp_path / "times.py"
    script.write_text(profile_script(chain()))
    command = [sys.executable, "-I", str(script), "-o", str(tmp_path / "t.json"), "--provider", "Abacus"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ONNX Runtime here has no Abacus, but ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "t.json").exists()


def test_the_script_is_python_of_devices() -> None:
    ast.parse(profile_script(chain()), feature_version=(3, 8))
    names: Counter[str] = Counter()
    for module in (kernel_times, turns, on_device):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        names += Counter(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
        assigned = (target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets)
        names += Counter(name.id for target in assigned for name in ast.walk(target) if isinstance(name, ast.Name))
    names.pop("log", None)
    assert [name for name, count in names.items() if count > 1] == []


def test_the_script_subscripts_no_type_that_old_python_cannot() -> None:
    def run(node: ast.AST) -> list[ast.AST]:
        """Every node that is evaluated: annotations are not."""
        kept: list[ast.AST] = []
        for name, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            kept += [one for one in children if isinstance(one, ast.AST) and name not in {"annotation", "returns"}]
        return [node, *(found for child in kept for found in run(child))]

    tree = ast.parse(profile_script(chain()))
    abstract = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "collections.abc"
        for alias in node.names
    }  # fmt: skip
    assert "Callable" in abstract
    subscripted = {
        node.value.id for node in run(tree) if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
    }
    assert not subscripted & (abstract | {"list", "dict", "tuple", "set", "frozenset", "type"})


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (["--provider-option", "fast"], "--provider-option fast is not of the form KEY=VALUE"),
        (["--threads", "0"], "--threads is 0; give 1 or more"),
        (["-o", "{tmp}/nowhere/t.json"], "No such file or directory"),
    ],
)
def test_the_script_refuses_wrong_options_before_it_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: list[str], line: str
) -> None:
    monkeypatch.setattr(on_device, "kernel_times", fail)
    text = entries_of(onnxcop.analyze(chain(widths=WIDE)), "finest", None)
    given = [part.replace("{tmp}", str(tmp_path)) for part in wrong]
    monkeypatch.setattr(sys, "argv", ["t.py", "-o", str(tmp_path / "t.json"), *given])
    assert on_device.run_script(text) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and line in said
    assert list(tmp_path.iterdir()) == []


def test_a_provider_that_does_not_start_is_not_replaced_by_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = entries_of(onnxcop.analyze(chain(widths=WIDE)), "finest", None)
    monkeypatch.setattr(on_device, "_chosen", lambda *_: ["CUDAExecutionProvider", kernel_times.CPU])
    monkeypatch.setattr(sys, "argv", ["t.py", "-o", str(tmp_path / "t.json")])
    assert on_device.run_script(text) == 1
    assert "CUDAExecutionProvider does not start here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_times_with_settings_of_the_provider_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_table, "kernel_times", made_up_times)
    tuned = onnxcop.EngineOptions(provider="cpu", threads=1, provider_options=(("arena", "0"),))
    assert Machine.of(tuned).settings == {"arena": "0"}
    assert Machine.of(tuned) != Machine.of(CPU)
    times = TimeTable.here(CPU)
    time_model(onnxcop.analyze(chain(widths=WIDE)), times, Staircase(4, 16), CPU)
    assert TimeTable.here(CPU).seconds and not TimeTable.here(tuned).seconds


def test_a_table_for_fewer_classes_and_one_with_weights_as_inputs(device: None, tmp_path: Path) -> None:
    def table(model: onnx.ModelProto | Path, **given: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        profile(model, path, options=CPU, seconds=1e-3, **given)
        return path

    few: dict[str, Any] = {"macs": 0.7, "classes": "0,3,5", **BARE}
    assert onnxcop.prune(DIGITS, latency_table=table(DIGITS, classes="0,3,5"), **few).report.expected
    with pytest.raises(PlanMismatchError, match=r"another model.* run `onnxcop profile \S+ --classes \S+:0,3,5` on"):
        onnxcop.prune(DIGITS, latency_table=table(DIGITS), **few)
    model = chain(widths=WIDE)
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    listed: dict[str, Any] = {"macs": 0.7, "keep_initializer_inputs": True, **BARE}
    assert onnxcop.prune(model, latency_table=table(model, keep_initializer_inputs=True), **listed).report.expected
    with pytest.raises(PlanMismatchError, match=r"times of other inputs, none, not .* more; .*--keep-initializer"):
        onnxcop.prune(model, latency_table=table(model), **listed)


def test_a_model_of_equal_weights_has_the_shapes_of_the_original_and_packs_small() -> None:
    model = onnx.load(DIGITS)
    found = onnx.load_from_string(plain(model))
    assert shapes(found) == shapes(model)
    assert [node.op_type for node in found.graph.node] == [node.op_type for node in model.graph.node]
    large = [numpy_helper.to_array(tensor) for tensor in found.graph.initializer if np.prod(tensor.dims) > 64]
    assert large
    assert all(np.unique(values).size == 1 for values in large)
    text = on_device.packed({}, [plain(model)])
    assert len(text) < 0.1 * model.ByteSize()
    assert on_device.unpacked(text) == ({}, [plain(model)])


def test_a_model_that_does_not_run_cannot_be_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(on_device.TimedSet, "_cut", fail)
    monkeypatch.setattr(on_device, "_stairs", lambda *_: None)
    with pytest.raises(EngineError, match="the model could not be timed: no kernel"):
        profile(chain(), options=CPU, seconds=1e-3)


# Bad tables


def told(path: Path, model: Path, **given: Any) -> str:
    with pytest.raises(PlanMismatchError) as caught:
        onnxcop.prune(model, latency=0.7, latency_table=path, **BARE | given)
    (line,) = str(caught.value).splitlines()
    return line


def test_tables_of_something_else_say_what_differs_and_what_to_run(table: Path, tmp_path: Path) -> None:
    model, other = table.with_name("net.onnx"), written(chain(widths=(32, 32)), tmp_path / "other.onnx")
    assert f"{table} holds times of another model, net.onnx" in told(table, other)
    assert f"run `onnxcop profile {other}` on the device" in told(table, other)
    cuda = json.loads(table.read_text())
    cuda["machine"]["provider"] = "CUDAExecutionProvider"
    table.write_text(json.dumps(cuda))
    line = told(table, model, options=CPU)
    assert "times of the provider CUDAExecutionProvider, not of CPUExecutionProvider; leave --provider out" in line
    onnxcop.prune(model, macs=0.7, latency_table=table, **BARE)
    for change, expected in (
        ({"version": 2}, "is a table of times of version 2, this release reads 1; `onnxcop profile MODEL"),
        (
            {"format": "onnxcop-plan"},
            "is not a table of times; `onnxcop profile MODEL -o TABLE.json` makes one",
        ),
        ({"operators": {}}, "operators; run `onnxcop profile "),
        ({"operators": {}, "onnxcop": "0.0.9"}, f"it was made by onnxcop 0.0.9, this is {onnxcop.__version__}; run"),
        ({"axes": [3, 5]}, f"made by onnxcop {onnxcop.__version__}, which finds other widths in the model"),
        ({"model": cuda["model"] | {"policy": "coarsest"}}, "times of --policy coarsest, not of finest"),
        ({"model": cuda["model"] | {"input_shapes": {"x": [1, 3, 9, 9]}}}, "times of other inputs, x:1,3,9,9, not x:"),
    ):
        table.write_text(json.dumps(cuda | change))
        assert expected in told(table, model), change


def test_a_table_and_a_target_exclude_each_other(table: Path) -> None:
    with pytest.raises(BudgetError, match="--target and --latency-table exclude each other"):
        onnxcop.prune(chain(), latency_table=table, target="arm64")


def test_garbage_is_an_error_of_one_line(table: Path) -> None:
    document = json.loads(table.read_text())
    document["cuts"] = [{"kept": document["axes"], "ratio": 0.9, "error": 0.01}]
    rng, refused = random.Random(0), 0
    junk = [None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**400, "x", [], {}, [None], {"a": 1}, [[[]]]]
    for _ in range(400):
        broken = copy.deepcopy(document)
        place: Any = broken
        while True:
            key = rng.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.3:
                break
            place = place[key]
        place[key] = rng.choice(junk)
        try:
            found = DeviceTable.of(broken, "t.json")
            times_from(found, onnxcop.analyze(chain(widths=WIDE)), "finest")
        except PlanMismatchError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused > 200
    for text in ("", "{", "[]", "null", "[" * 100_000, table.read_text()[:-40]):
        table.write_text(text)
        with pytest.raises(PlanMismatchError, match=r"is not a table of times"):
            DeviceTable.load(table)
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanMismatchError, match="is not a table of times"):
        DeviceTable.load(table)
    with pytest.raises(PlanMismatchError, match="cannot be read"):
        DeviceTable.load(table.with_name("nowhere.json"))
