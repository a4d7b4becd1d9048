"""Reports: their contents in each format, without a browser."""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_models import chain, shapes, written

import onnxcop
from onnxcop.analysis.layers import layer_weights, layers_of
from onnxcop.cli import main as cli
from onnxcop.criteria.cop import activation_correlation, weight_correlation
from onnxcop.errors import ModelError
from onnxcop.graph.constants import Weights
from onnxcop.reconstruction.divergence import Reference, Waypoint
from onnxcop.recovery.rounds import RecoverySettings
from onnxcop.report.charts import TIME, meter, way_chart
from onnxcop.report.correlations import MOST_CHANNELS, correlations
from onnxcop.report.document import FORMAT, VERSION, ReportData
from onnxcop.report.formats import SUFFIXES, rendered
from onnxcop.report.layers import layer_changes
from onnxcop.runtime.latency import Latency, Timing
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions(provider="cpu", threads=1)
QUICK = RecoverySettings(rounds=1, held_out_samples=16, refine_samples=32, curve_passes=2)
HOSTILE = ("</script><img src=x onerror=\"document.title='owned'\">", "a|b`c``d*e_f<!--", "\u202egnp.exe & 'q'")


def samples(count: int = 48) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.random.default_rng(0).random((count, 3, 8, 8), np.float32)}


@pytest.fixture(scope="module")
def result() -> onnxcop.PruneResult:
    """A small network with hostile names, pruned by measurement."""
    model = chain()
    for node, name in zip((model.graph.node[i] for i in (0, 2, 6)), HOSTILE, strict=True):
        node.name = name
    return onnxcop.prune(model, macs=0.6, data=samples(), settings=QUICK, options=CPU)


@pytest.fixture(scope="module")
def data(result: onnxcop.PruneResult) -> ReportData:
    return result.report_data(f"onnxcop {shlex.quote(HOSTILE[0])} --macs 0.6")


class Text(HTMLParser):
    """Text of a page, with its elements and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.addresses, self.policy = "", list[str](), list[str](), ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "action", "data"}]
        assert not any(name.startswith("on") or name == "style" for name, _ in attrs)
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""

    def handle_data(self, data: str) -> None:
        self.text += data


# What a report is made of


def test_layers_are_those_of_the_files(result: onnxcop.PruneResult, data: ReportData) -> None:
    before, after = shapes(chain()), shapes(result.model)
    layers = [layer for layer in data.layers if layer.width is not None]
    assert [layer.name for layer in layers] == list(HOSTILE)
    assert [(layer.width, layer.kept) for layer in layers] == [
        (before[name][0], after[name][0]) for name in ("w1", "w2", "w3")
    ]
    assert [layer.params_after for layer in layers] == [
        float(np.prod(after[weight]) + after[bias][0]) for weight, bias in (("w1", "b1"), ("w2", "b2"), ("w3", "b3"))
    ]


def test_costs_of_the_layers_add_up(data: ReportData) -> None:
    report = data.report
    assert sum(layer.macs for layer in data.layers) == pytest.approx(report.before.macs)
    assert sum(layer.macs_after for layer in data.layers) == pytest.approx(report.after.macs)
    assert sum(layer.params for layer in data.layers) == report.before.params
    assert sum(layer.params_after for layer in data.layers) == report.after.params


def test_the_way_leads_to_the_result(data: ReportData) -> None:
    last = data.way[-1]
    assert last.macs == pytest.approx(data.report.after.macs / data.report.before.macs)
    assert last.divergence == pytest.approx(data.report.held_out["divergence"], rel=1e-6)
    assert all(0 < point.macs <= 1 for point in data.way)


def test_matrices_are_those_of_the_criterion(result: onnxcop.PruneResult, data: ReportData) -> None:
    evidence = result.evidence
    assert evidence is not None and evidence.stats is not None
    analysis = evidence.analysis
    weights = Weights.of(analysis.model)
    for layer in layers_of(analysis.model, analysis.structure):
        name = analysis.model.graph.node[layer.node].name
        found = {m.measure: m for m in data.correlations if m.layer == name}
        values, moments = layer_weights(weights, layer), evidence.stats.moments(layer)
        assert values is not None and moments is not None
        expected = {"weights": weight_correlation(values), "activations": activation_correlation(moments.covariance)[0]}
        assert found.keys() == expected.keys()
        for measure, matrix in expected.items():
            np.testing.assert_allclose(found[measure].matrix(), matrix, atol=0.5 / 255 + 1e-9)
            gone = np.flatnonzero(np.isin(layer.units, evidence.removed))
            assert found[measure].removed == tuple(gone)


def test_wide_layers_and_many_layers_are_cut_short_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = onnxcop.analyze(chain(widths=(MOST_CHANNELS + 40, 8)))
    removed = np.arange(5)
    found, notes = correlations(analysis, removed, None)
    assert [len(m.channels) for m in found] == [MOST_CHANNELS, 8]
    assert found[0].width == MOST_CHANNELS + 40
    assert found[0].channels[0] == 0 and found[0].channels[-1] == MOST_CHANNELS + 39
    assert any(str(MOST_CHANNELS) in note for note in notes)
    monkeypatch.setattr("onnxcop.report.correlations._MOST_BYTES", 100)
    found, notes = correlations(analysis, removed, None)
    assert [m.width for m in found] == [8]
    assert any("1 layer:" in note for note in notes)


def test_layers_of_one_name_are_distinguished() -> None:
    model = chain()
    for node in model.graph.node:
        node.name = "same"
    found, _ = correlations(onnxcop.analyze(model), np.arange(2), None)
    assert [m.layer for m in found] == ["same", "same (2)"]


def test_parameters_count_for_the_layer_that_works_with_them() -> None:
    model = chain()
    model.graph.node.insert(2, helper.make_node("Identity", ["w2"], ["w2_out"]))
    model.graph.node[3].input[1] = "w2_out"
    scale = numpy_helper.from_array(np.ones((16, 1, 1), np.float32), "scale")
    model.graph.initializer.append(scale)
    model.graph.node[4].input[0] = "scaled"
    model.graph.node.insert(4, helper.make_node("Mul", ["c2", "scale"], ["scaled"], "scaling"))
    changes = {layer.name: layer for layer in layer_changes(onnxcop.analyze(model), np.array([8, 9]))}
    assert changes["conv2"].params == 16 * 8 * 9 + 16
    assert (changes["Mul"].width, changes["Mul"].params, changes["Mul"].params_after) == (None, 16, 14)
    assert "Identity" not in changes


# The forms


def test_json_is_the_data(data: ReportData) -> None:
    document = json.loads(rendered(data, Path("r.json")))
    assert (document["format"], document["version"]) == (FORMAT, VERSION)
    assert document["summary"]["after"]["params"] == data.report.after.params
    assert [layer["name"] for layer in document["layers"]] == [layer.name for layer in data.layers]
    matrix = document["correlations"][0]
    assert len(base64.b64decode(matrix["values"])) == math.comb(len(matrix["channels"]), 2)
    assert document["command"] == data.command


def test_numbers_that_json_lacks_become_null(data: ReportData) -> None:
    endless = replace(data, report=replace(data.report, quality={"divergence": math.inf}))
    assert json.loads(endless.to_json())["summary"]["quality"] == {"divergence": None}
    assert '<svg class="curve"' not in rendered(endless, Path("r.html")).decode()


def test_the_page_shows_hostile_names_as_text_and_loads_nothing(data: ReportData) -> None:
    page = rendered(data, Path("r.html")).decode()
    found = Text(page)
    assert "img" not in found.tags
    assert found.tags.count("script") == 2
    for name in HOSTILE:
        assert name in found.text
    assert found.addresses and all(address.startswith("#") for address in found.addresses)
    assert found.policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in found.policy


def test_the_page_shows_everything(data: ReportData) -> None:
    text = Text(rendered(data, Path("r.html")).decode()).text
    words = ("MACs", "parameters", "file size", "divergence", "reaches a graph output (y)", "arrays in memory",
             "masked original")  # fmt: skip
    for word in (*words, data.sha256, data.command, onnx.__version__, onnxcop.__version__):
        assert word in text
    cut = next(layer for layer in data.layers if layer.kept is not None and layer.kept < (layer.width or 0))
    assert f"{cut.width} → {cut.kept}" in text


def test_what_is_bad_is_said_and_marked(data: ReportData) -> None:
    scores = np.eye(4)[np.arange(40) % 4] * 9
    times = Latency(Timing(1e-3, 9e-4, 1.1e-3), Timing(2e-3, 1.9e-3, 2.1e-3), ratio=2.0, error=0.01, turns=9,
                    provider="CPUExecutionProvider")  # fmt: skip
    figures = Reference([{"y": scores}]).figures([{"y": np.roll(scores, [0, 1], axis=[0, 1])}])
    bad = replace(data, report=replace(data.report, latency=times, figures=figures))
    page = rendered(bad, Path("r.html")).decode()
    cards = {name: worse for worse, name in re.findall(r'<div class="card( worse)?"><span>([^<]*)</span>', page)}
    assert {name for name, worse in cards.items() if worse} == {"latency", "top-1 agreement"}
    told = Text(page).text
    assert "slower: 1.00\u00a0ms" in told and "too low" in told and "kept: " in told
    assert f"{times.share}, slower" in rendered(bad, Path("r.md")).decode()
    good = rendered(data, Path("r.html")).decode()
    assert "slower: " not in Text(good).text


@pytest.mark.parametrize("name", ["cop", "cop-paper"])
def test_histograms_hold_the_importance_of_every_unit(name: str) -> None:
    """By correlation alone and with the cost terms, at the widths before anything goes."""
    criterion = onnxcop.criterion_named(name, alpha=2.0, beta=3.0, gamma=0.5)
    result = onnxcop.prune(chain(), macs=0.6, criterion=criterion, recover="none", options=CPU)
    found = result.report_data().importance
    assert found is not None and found.decided and found.weights == (2.0, 3.0, 0.5)
    assert result.evidence is not None
    analysis, gone = result.evidence.analysis, set(result.evidence.removed.tolist())
    ranking = criterion.rank(onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost))
    kept = analysis.structure.axis_sizes
    wanted = {"correlation": 2.0 * ranking.terms(kept)["correlation"], "regularized": ranking.importance(kept)}
    for which, values in wanted.items():
        shown = getattr(found, which)
        assert (shown.low, shown.high) == (values.min(), values.max())
        assert sum(shown.removed) == len(gone) and sum(shown.kept) == len(values) - len(gone)
        middle = (shown.low + shown.high) / 2
        half = len(shown.kept) // 2
        assert sum(shown.kept[:half]) + sum(shown.removed[:half]) == (values < middle).sum()
    page = rendered(result.report_data(), Path("r.html")).decode()
    assert page.count('<svg class="curve histogram"') == 2
    assert f"{name} chose the filters" in Text(page).text


def test_a_measured_run_shows_cop_for_comparison(data: ReportData) -> None:
    assert data.importance is not None and not data.importance.decided
    assert "cop did not choose the filters" in Text(rendered(data, Path("r.html")).decode()).text
    document = json.loads(data.to_json())
    assert sum(document["importance"]["correlation"]["kept"]) == sum(data.importance.correlation.kept)


def test_dead_filters_are_reported_and_not_counted() -> None:
    model = chain()
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if values.ndim == 4 and values.shape[1] > 3:
            values[:, 2] *= 1e-9
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    found = onnxcop.prune(model, macs=0.7, criterion="cop", recover="none", options=CPU).report_data()
    assert found.importance is not None and found.importance.dead == 1
    assert found.importance.regularized.low > 0
    assert "1 with outgoing weights near zero" in Text(rendered(found, Path("r.html")).decode()).text


def test_without_data_the_page_says_what_is_missing() -> None:
    found = onnxcop.prune(chain(), macs=0.7, recover="none", options=CPU).report_data()
    assert {m.measure for m in found.correlations} == {"weights"}
    for suffix in (".html", ".md"):
        text = rendered(found, Path(f"r{suffix}")).decode()
        assert "--data" in text
        assert "no data was given" in text
        assert '<svg class="curve"' not in text


@pytest.mark.parametrize("how", [{}, {"criterion": "l2"}], ids=["measured", "by criterion"])
def test_without_data_the_story_names_the_inputs_that_were_made_up(how: dict[str, str]) -> None:
    result = onnxcop.prune(chain(), macs=0.7, options=CPU, **how)  # type: ignore[arg-type]
    assert result.report.calibration == "192 synthetic inputs: no data was given"
    assert "calibrated on 192 synthetic inputs: no data was given" in str(result)
    text = Text(rendered(result.report_data(), Path("r.html")).decode()).text
    assert "Calibrated on 192 synthetic inputs: no data was given." in text
    assert "Not calibrated" not in text


def test_statistics_of_an_earlier_run_are_named_and_shown(tmp_path: Path) -> None:
    first = onnxcop.prune(
        chain(), data=samples(), criterion="cop-activation", recover="none", options=CPU, stats_out=tmp_path / "s.npz"
    )
    again = onnxcop.prune(chain(), stats=tmp_path / "s.npz", criterion="cop-activation", recover="none", options=CPU)
    assert again.report.calibration == "statistics of 48 samples, gathered earlier"
    assert again.report_data().correlations == first.report_data().correlations
    text = Text(rendered(again.report_data(), Path("r.html")).decode()).text
    assert "Calibrated on statistics of 48 samples, gathered earlier." in text


def test_markdown_keeps_names_out_of_its_markup(data: ReportData) -> None:
    lines = rendered(data, Path("r.md")).decode().splitlines()
    heads = [place for place, line in enumerate(lines) if line.startswith("|---")]
    assert len(heads) == 5
    for place in heads:
        columns = lines[place].count("|")
        row = place + 1
        while row < len(lines) and lines[row].startswith("|"):
            assert lines[row].replace("\\|", "").count("|") == columns
            row += 1
    assert "``` a\\|b`c``d*e_f<!-- ```" in "\n".join(lines)


def test_a_page_of_a_big_network_stays_small() -> None:
    model = chain(widths=(400, 400))
    page = onnxcop.prune(model, macs=0.5, recover="none", options=CPU, criterion="l1").report_data()
    assert len(rendered(page, Path("r.html"))) < 300_000


# Charts


def test_bars_show_what_is_left() -> None:
    bar = meter(50, 20, 200)
    assert 'class="before" width="25.00"' in bar
    assert 'class="after" width="10.00"' in bar
    assert 'width="0.00"' in meter(0, 0, 0)
    assert meter(900, 900, 200) == meter(200, 200, 200)


@pytest.mark.parametrize("values", [(0.5, 0.9), (1e-6, 0.2), (0.0, 0.0), (2.0, 2.0), (-1e-17, -1e-17)])
def test_points_of_the_curve_are_in_the_order_of_their_values(values: tuple[float, float]) -> None:
    way = [Waypoint("one", 0.8, values[0]), Waypoint("two & <b>", 0.6, values[1]), Waypoint("lost", 0.5, math.inf)]
    drawn = way_chart(way, (0.6, values[1]), 0.6, None)
    assert "&lt;b&gt;" in drawn and "<b>" not in drawn and "lost" not in drawn
    found = [part.split('"')[:4] for part in drawn.split('class="point" cx="')[1:]]
    (x1, _, y1, _), (x2, _, y2, _) = found
    assert float(x1) > float(x2)
    assert (float(y1) > float(y2)) == (values[0] < values[1])
    assert all(0 <= float(number) <= 420 for number in (x1, x2, y1, y2))


def test_the_curve_over_time_leaves_out_steps_of_unknown_time() -> None:
    way = [Waypoint("one", 0.8, 0.1, time=0.9), Waypoint("two", 0.6, 0.2)]
    drawn = way_chart(way, (0.7, 0.3), 0.75, None, TIME)
    assert "time left" in drawn and "one: 90.0% of the time" in drawn and "two" not in drawn
    assert 'class="bound"' in drawn


# Writing


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_python_writes_each_form(result: onnxcop.PruneResult, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"report{suffix.upper()}"
    result.save_report(path)
    assert path.stat().st_size > 1000
    assert len(list(tmp_path.iterdir())) == 1


def test_unknown_forms_are_refused(result: onnxcop.PruneResult, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\.html, \.md, \.json"):
        result.save_report(tmp_path / "report.pdf")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_writes_reports_with_its_own_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(chain(), tmp_path / "my net.onnx")
    reports = [tmp_path / f"r{suffix}" for suffix in SUFFIXES]
    options = ["--provider", "cpu", "--recover", "none", "--latency-seconds", "0"]
    arguments = [str(model), "-o", str(tmp_path / "o.onnx"), *options]
    for path in reports:
        arguments += ["--report", str(path)]
    assert cli.run(arguments) == 0
    assert json.loads(reports[-1].read_text())["command"] == shlex.join(["onnxcop", *arguments])
    shown = capsys.readouterr().out
    assert all(str(path) in shown and path.is_file() for path in reports)


def test_a_report_of_another_suffix_is_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(chain(), tmp_path / "net.onnx")
    assert cli.run([str(model), "--report", str(tmp_path / "r.pdf")]) == 2
    assert "does not end in .html, .md, .json" in capsys.readouterr().err


def test_a_run_that_fails_writes_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(chain(), tmp_path / "net.onnx")
    command = [str(model), "--provider", "cpu", "--macs", "0.001", "--report", str(tmp_path / "r.html")]
    assert cli.run(command) == 1
    assert cli.run([str(model), "-o", str(tmp_path / "r.md"), "--report", str(tmp_path / "r.md")]) == 1
    assert "two results at once" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
