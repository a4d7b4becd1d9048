"""The report page in a real browser: that its script runs, what it draws, and that it asks for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from small_models import chain

import onnxcop
from onnxcop.recovery.rounds import RecoverySettings
from onnxcop.report.document import ReportData
from onnxcop.report.formats import rendered
from onnxcop.runtime.session import EngineOptions

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
PIXEL = (
    "return [...document.getElementById('heat').getContext('2d').getImageData(arguments[0], arguments[1], 1, 1).data]"
)
MARGIN = 14  # of the matrix on its canvas


@pytest.fixture(scope="module")
def data() -> ReportData:
    model = chain(widths=(8, 24))
    model.graph.node[2].name = HOSTILE
    samples = {"x": np.random.default_rng(0).random((48, 3, 8, 8), np.float32)}
    settings = RecoverySettings(rounds=1, held_out_samples=16, refine_samples=32, curve_passes=2)
    options = EngineOptions(provider="cpu", threads=1)
    return onnxcop.prune(model, macs=0.6, data=samples, settings=settings, options=options).report_data("onnxcop x")


@pytest.fixture(scope="module")
def page(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_bytes(rendered(data, path))
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    try:
        yield found
    finally:
        found.close()


def choose(browser: Browser, element: str, value: str) -> None:
    """Choose an entry of a list as a user would."""
    browser.run(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('change'))",
        element, value,
    )  # fmt: skip


def shown(browser: Browser) -> dict[str, str]:
    """The channels that the heat map shows, by its own text."""
    found = browser.run("return {...document.getElementById('heat').dataset}")
    assert isinstance(found, dict)
    return found


def test_the_page_loads_nothing_and_logs_no_error(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.requested()  # the page that a browser starts with loads a lot
    browser.complaints()
    browser.open(page, "?again")
    assert browser.run("return document.querySelectorAll('svg.meter').length") > 5
    assert browser.requested() == [f"{page.as_uri()}?again"]
    assert browser.complaints() == []
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


def test_hostile_names_stay_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("return document.title") == "the model: pruned"
    assert browser.run("return document.images.length") == 0
    names = browser.run("return [...document.querySelectorAll('#widths tbody th')].map((e) => e.textContent)")
    assert HOSTILE in names
    assert browser.run("return [...document.getElementById('layer').options].some((o) => o.text.includes('onerror'))")


def test_charts_hold_what_the_data_hold(browser: Browser, page: Path, data: ReportData) -> None:
    browser.open(page)
    bars = browser.run(
        "return [...document.querySelectorAll('#widths .meter')].map((m) =>"
        "[...m.querySelectorAll('rect')].map((r) => r.getBoundingClientRect().width))"
    )
    layers = [layer for layer in data.layers if layer.width]
    assert len(bars) == len(layers)
    for (before, after), layer in zip(bars, layers, strict=True):
        assert after / before == pytest.approx((layer.kept or 0) / (layer.width or 1), abs=0.01)
    assert browser.run("return document.querySelectorAll('.curve .point').length") == len(data.way)
    assert browser.run("return document.querySelectorAll('.curve .chosen').length") == 1


def test_the_matrix_is_drawn_and_follows_the_chooser(browser: Browser, page: Path, data: ReportData) -> None:
    browser.open(page)
    names = list(dict.fromkeys(m.layer for m in data.correlations))
    assert len(names) == 2
    pictures = set()
    for place, name in enumerate(names):
        for measure in ("weights", "activations"):
            choose(browser, "layer", str(place))
            choose(browser, "measure", measure)
            found = shown(browser)
            matrix = next(m for m in data.correlations if (m.layer, m.measure) == (name, measure))
            assert (found["layer"], found["measure"]) == (name, measure)
            assert found["removed"] == ",".join(str(matrix.channels[i]) for i in matrix.removed)
            pictures.add(browser.run("return document.getElementById('heat').toDataURL()"))
    assert len(pictures) == 4


def test_removed_channels_are_marked(browser: Browser, page: Path, data: ReportData) -> None:
    browser.open(page)
    name = max(data.correlations, key=lambda m: len(m.removed))
    assert shown(browser)["layer"] == name.layer  # the layer that lost the most is shown first
    cell = (browser.run("return document.getElementById('heat').width") - MARGIN) / len(name.channels)
    for sort in (False, True):
        if sort:
            browser.run("document.getElementById('last').click()")
        order = sorted(range(len(name.channels)), key=lambda i: (sort and i in name.removed, i))
        for row, place in enumerate(order):
            middle = int(MARGIN + (row + 0.5) * cell)
            assert (browser.run(PIXEL, 4, middle)[3] > 0) == (place in name.removed)
            assert (browser.run(PIXEL, middle, 4)[3] > 0) == (place in name.removed)


def test_a_cell_is_read_by_pointing(browser: Browser, page: Path, data: ReportData) -> None:
    browser.open(page)
    found = shown(browser)
    matrix = next(m for m in data.correlations if (m.layer, m.measure) == (found["layer"], found["measure"]))
    text = browser.run(
        "const c = document.getElementById('heat'), b = c.getBoundingClientRect(), k = b.width / c.width;"
        f"const cell = (c.width - {MARGIN}) / arguments[0];"
        f"const at = (i) => ({MARGIN} + (i + 0.5) * cell) * k;"
        "c.dispatchEvent(new PointerEvent('pointermove', {clientX: b.left + at(3), clientY: b.top + at(1)}));"
        "return document.getElementById('reading').textContent",
        len(matrix.channels),
    )
    assert f"channel {matrix.channels[1]}" in text and f"channel {matrix.channels[3]}" in text
    assert float(text.rsplit(":", 1)[1]) == pytest.approx(matrix.matrix()[1, 3], abs=0.006)


def test_the_address_remembers_the_layer(browser: Browser, page: Path, data: ReportData) -> None:
    names = list(dict.fromkeys(m.layer for m in data.correlations))
    for place, name in enumerate(names):
        browser.open(page, f"?{place}#correlation={place}")
        assert shown(browser)["layer"] == name


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out(browser: Browser, page: Path, tmp_path: Path, width: int) -> None:
    model = chain(widths=(300, 1200))
    model.graph.node[0].name = "a_long_name_without_any_joints" * 4
    wide = tmp_path / "wide.html"
    options = EngineOptions(provider="cpu", threads=1)
    onnxcop.prune(model, macs=0.5, criterion="l1", recover="none", options=options).save_report(wide)
    browser.resize(width, 900)
    for shown in (page, wide):
        browser.open(shown)
        assert browser.run("return document.documentElement.scrollWidth") == width


def test_the_dark_page_is_dark(browser: Browser, page: Path) -> None:
    prepared = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    for scheme, is_dark in (("dark", True), ("light", False)):
        browser.prefer(scheme)
        browser.open(page)
        assert (max(browser.run(prepared)) < 100) == is_dark
        assert (max(browser.run(PIXEL, MARGIN + 2, MARGIN + 2)[:3]) > 200) == is_dark  # the diagonal stands out
