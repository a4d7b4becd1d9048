"""Families of models: independent jobs, a journal that outlives a stopped run, a page."""

import csv
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from executors import Lossy
from rich.console import Console
from small_models import chain

import onnxcop
from onnxcop.cli import family
from onnxcop.cli import main as cli
from onnxcop.errors import ModelError
from onnxcop.parallel import crew
from onnxcop.pipeline.family import run
from onnxcop.pipeline.family.journal import Journal
from onnxcop.report.family_page import family_page, marked_fronts, pareto_chart

PLAIN = ["--criterion", "l2", "--recover", "none", "--multiple-of", "1", "--latency-seconds", "0", "--macs", "0.8,0.6"]
ANY_WIDTH = onnxcop.Limits(multiple_of=1)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for widths, path in zip(((8, 16), (12, 16)), paths, strict=True):
        path.write_bytes(chain(widths=widths).SerializeToString())
    return paths


def swept(models: list[Path], *more: str) -> tuple[int, list[dict[str, str]]]:
    table = models[0].parent / "all.csv"
    code = cli.run(["sweep", *map(str, models), *PLAIN, "-o", str(table), *more])
    return code, list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []


def test_every_result_is_that_of_a_single_run(models: list[Path], tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32))
    more = ["--data", str(data), "--threads", "1", "--plot", str(tmp_path / "front.svg")]
    code, rows = swept(models, "--save-models", str(tmp_path / "out"), *more)
    assert code == 0
    assert [(Path(row["model"]).name, float(row["budget"])) for row in rows] == [
        (name, budget) for name in ("a.onnx", "b.onnx") for budget in (1.0, 0.8, 0.6)
    ]
    alone = onnxcop.prune(models[1], macs=0.6, criterion="l2", recover="none", limits=ANY_WIDTH, data=data)
    assert (tmp_path / "out" / "b.macs-0.6.onnx").read_bytes() == alone.model.SerializeToString()
    out = capsys.readouterr().out
    assert "   4 of 4  b.onnx  0.6" in out and "all.html" in out
    page = (tmp_path / "all.html").read_text()
    assert "4 of 4 jobs are done" in page and "<circle" in page and "<script" not in page
    assert (tmp_path / "front.svg").read_text().startswith("<svg")


def test_a_stopped_run_goes_on(models: list[Path], monkeypatch: Any, capsys: Any) -> None:
    real, begun = run.carry_out, list[str]()

    def stopped_at_the_third(job: Any, options: Any) -> Any:
        begun.append(job.key)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return real(job, options)

    monkeypatch.setattr(run, "carry_out", stopped_at_the_third)
    code, rows = swept(models)
    assert code == 130 and len([row for row in rows if row["budget"] != "1.0"]) == 2
    journal = models[0].parent / "all.journal"
    journal.write_bytes(journal.read_bytes() + b'{"job": "cut o')  # a line that was not finished
    monkeypatch.setattr(run, "carry_out", lambda job, options: begun.append(job.key) or real(job, options))
    code, rows = swept(models)
    assert code == 0 and len(rows) == 6
    assert len(begun) == 5 and len(set(begun)) == 4 and begun[2] == begun[3]  # only what was stopped began twice
    assert swept(models)[0] == 0 and len(begun) == 5
    swept(models, "--seed", "1")
    assert len(begun) == 9  # another seed is another job
    assert len(journal.read_text().splitlines()) == 1 + 8


def test_one_model_in_independent_jobs(models: list[Path], tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32))
    common = ["sweep", str(models[0]), "--independent", "--macs", "0.8,0.6", "--data", str(data), "--threads", "1",
              "--latency-seconds", "0", "--multiple-of", "1"]  # fmt: skip
    assert cli.run([*common, "--save-models", str(tmp_path / "out")]) == 0
    assert "   2 of 2  a.onnx  0.6" in capsys.readouterr().out
    alone = onnxcop.prune(models[0], macs=0.6, limits=ANY_WIDTH, data=data, latency_seconds=0.0)
    assert (tmp_path / "out" / "a.macs-0.6.onnx").read_bytes() == alone.model.SerializeToString()
    journal = tmp_path / "a.sweep.journal"
    before = journal.read_bytes()
    assert cli.run([*common, "--save-models", str(tmp_path / "out")]) == 0 and journal.read_bytes() == before


def test_criteria_and_seeds_are_jobs_of_one_list(models: list[Path], tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32))
    out, more = tmp_path / "out", ["--criterion", "l2,l1", "--seed", "0,3", "--plot", str(tmp_path / "front.svg")]
    more += ["--data", str(data), "--threads", "1"]
    code, rows = swept(models[:1], *more, "--save-models", str(out))
    assert code == 0
    assert [(row["criterion"], row["seed"], row["budget"]) for row in rows[1:]] == [
        (criterion, seed, budget) for criterion in ("l2", "l1") for seed in "03" for budget in ("0.8", "0.6")
    ]
    said = capsys.readouterr().out
    assert "   8 of 8  a.onnx  l1 3  0.6" in said
    assert ">l1</td>" in (tmp_path / "all.html").read_text()
    assert "a.onnx l1: macs" in (tmp_path / "front.svg").read_text()
    alone = onnxcop.prune(models[0], macs=0.6, criterion="l1", recover="none", limits=ANY_WIDTH, seed=3, data=data)
    assert (out / "a.l1.seed-3.macs-0.6.onnx").read_bytes() == alone.model.SerializeToString()
    assert swept(models[:1], *more, "--save-models", str(out))[0] == 0  # nothing is done twice
    journal = tmp_path / "all.journal"
    assert len(journal.read_text().splitlines()) == 1 + 8
    assert swept(models[:1], "--criterion", "l2", *more[4:])[0] == 0 and len(journal.read_text().splitlines()) == 1 + 8


def test_measured_sensitivity_among_criteria(models: list[Path], tmp_path: Path) -> None:
    code, rows = swept(models[:1], "--criterion", "measured,l2", "--recover", "auto", "--macs", "0.8", "--samples", "8",
                       "--save-models", str(tmp_path / "out"))  # fmt: skip
    assert code == 0 and [row["criterion"] for row in rows] == ["", "measured", "l2"]
    alone = onnxcop.prune(models[0], macs=0.8, limits=ANY_WIDTH, samples=8, latency_seconds=0.0)
    assert (tmp_path / "out" / "a.measured.macs-0.8.onnx").read_bytes() == alone.model.SerializeToString()


def test_an_unknown_criterion_of_several_is_refused(models: list[Path], capsys: Any) -> None:
    assert swept(models, "--criterion", "l2,nope")[0] == 2 and "unknown criterion 'nope'" in capsys.readouterr().err


def test_changed_weights_beside_a_model_are_another_job(models: list[Path]) -> None:
    onnx.save(chain(), models[0], save_as_external_data=True, location="a.data", size_threshold=0)
    journal = models[0].parent / "all.journal"
    assert swept(models)[0] == 0 == swept(models)[0]
    assert len(journal.read_text().splitlines()) == 1 + 4
    weights = models[0].parent / "a.data"
    before, content = models[0].read_bytes(), bytearray(weights.read_bytes())
    content[:4] = np.float32(0.5).tobytes()
    weights.write_bytes(content)
    assert swept(models)[0] == 0 and models[0].read_bytes() == before
    assert len(journal.read_text().splitlines()) == 1 + 6


def test_names_are_escaped_in_page_and_chart(tmp_path: Path) -> None:
    row = {"model": "<b>&.onnx", "budget": 0.5, "macs": 10, "agreement": 0.9}
    rows = marked_fronts([row, {**row, "macs": 20, "error": "<i>no</i>"}])
    page, chart = family_page(rows, 2), pareto_chart(rows)
    assert "&lt;b&gt;&amp;.onnx" in page and "&lt;b&gt;&amp;.onnx" in chart and "&lt;i&gt;no" in page
    assert "<b>&" not in page + chart and "<i>no" not in page
    assert page.count("<circle") == 2 and "2 of 2 jobs" in page


def test_a_result_that_was_deleted_is_made_again(models: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    swept(models, "--save-models", str(folder))
    before = (folder / "a.macs-0.8.onnx").read_bytes()
    (folder / "a.macs-0.8.onnx").unlink()
    assert swept(models, "--save-models", str(folder))[0] == 0
    assert (folder / "a.macs-0.8.onnx").read_bytes() == before


def test_on_a_terminal_a_table_shows_all_jobs(models: list[Path], monkeypatch: Any) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(family, "terminal", lambda: screen)
    models[1].write_bytes(b"no model")
    assert swept(models)[0] == 1
    frames = screen.file.getvalue().split("model ")  # type: ignore[attr-defined]
    assert len(frames) > 5 and frames[1].count("…") == 4 and "…" not in frames[-1]
    assert frames[-1].count("failed") == 2 and "b.onnx" in frames[-1]


def test_a_job_that_fails_leaves_the_others(models: list[Path], capsys: Any) -> None:
    models[0].write_bytes(b"no model")
    code, rows = swept(models)
    assert code == 1 and [row["error"] != "" for row in rows] == [True, True, False, False, False]
    captured = capsys.readouterr()
    assert "a.onnx  0.8  failed: " in captured.out and "2 of 4 jobs failed" in captured.err
    models[0].write_bytes(chain().SerializeToString())
    assert swept(models)[0] == 0


def test_a_path_that_a_worker_does_not_see_is_named_with_its_host(models: list[Path], monkeypatch: Any) -> None:
    real = crew._perform

    def elsewhere(*arguments: Any) -> Any:
        return replace(real(*arguments), host="node7")

    monkeypatch.setattr(crew, "_perform", elsewhere)
    files = run.FamilyFiles(models[0].parent / "all.csv", None, None, run.InputFiles(models))
    options = onnxcop.PruneOptions(data="/nowhere/x.npz", executor=ThreadPoolExecutor(1))
    with pytest.raises(ModelError, match=r"/nowhere/x\.npz does not exist; .* \(on the worker at node7\)"):
        list(run.family_with(models, [0.6], files, options))


@pytest.mark.parametrize("kind", ["threads", "lossy"])
def test_workers_do_the_jobs(models: list[Path], kind: str, tmp_path: Path) -> None:
    _, expected = swept(models)
    inputs = run.InputFiles(models)
    options = onnxcop.PruneOptions(
        criterion="l2", recover="none", limits=ANY_WIDTH, executor=ThreadPoolExecutor(2) if kind == "threads" else
        Lossy(lambda number: number % 2 == 0, refuses=5),
    )  # fmt: skip
    files = run.FamilyFiles(tmp_path / "other.csv", None, None, inputs)
    records = list(run.family_with(models, [0.6, 0.8], files, options))
    assert len(records) == 4
    rows = list(csv.DictReader((tmp_path / "other.csv").read_text().splitlines()))
    same = ("model", "budget", "macs", "bytes", "pareto")
    assert [[row[name] for name in same] for row in rows] == [[row[name] for name in same] for row in expected]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--stats-out", "x.npz"], "--stats-out"),
        (["--plot", "x.png"], "ends in .svg"),
    ],
)
def test_what_does_not_fit_a_family_is_refused(models: list[Path], more: list[str], said: str, capsys: Any) -> None:
    assert swept(models, *more)[0] == 1
    assert said in capsys.readouterr().err


def test_models_of_one_name_are_refused(models: list[Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "a.onnx"
    twin.write_bytes(models[1].read_bytes())
    assert swept([models[0], twin], "--save-models", str(tmp_path / "out"))[0] == 1
    assert "two models are called a.onnx" in capsys.readouterr().err


def test_a_model_that_is_missing(models: list[Path], capsys: Any) -> None:
    models[1].unlink()
    assert swept(models)[0] == 1
    assert "b.onnx does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}\n", "nothing\n", '{"format": "onnxcop-journal", "version": 1}\n{"job": 3}\n'])
def test_a_file_that_is_no_journal_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.journal"
    path.write_text(text)
    with pytest.raises(ModelError, match="is not from a journal"):
        Journal(path)
    assert path.read_text() == text


def test_json_lists_all_points(models: list[Path], capsys: Any) -> None:
    assert swept(models, "--json")[0] == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "onnxcop-family" and len(document["points"]) == 4


def test_the_front_is_what_no_other_result_beats() -> None:
    figures = [(10, 0.9), (8, 0.95), (5, 0.8), (6, 0.7), (5, 0.8)]
    rows = [{"model": "m", "macs": macs, "agreement": agreement} for macs, agreement in figures]
    assert [row["pareto"] for row in marked_fronts(rows)] == [0, 1, 1, 0, 1]
    assert marked_fronts([{"model": "m", "error": "x"}])[0]["pareto"] == 0
    chart = pareto_chart(marked_fronts(rows))
    assert chart.count("<circle") == 5 and "agreement" in chart
