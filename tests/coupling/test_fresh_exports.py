"""Exports that the frameworks' exporters write here and now, beside those in tests/exports.

The exporters need gigabytes of packages, so they run before the tests, in environments of their own:
`python tools/make_exports.py --environments ENVIRONMENTS --out FOLDER`. ONNXCOP_FRESH_EXPORTS names that folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
from test_exports import BUDGET, EXPORTS, OLD, border, groups, run

import onnxcop


def _fresh(name: str) -> onnx.ModelProto:
    """The export of this name that was made here."""
    folder = os.environ.get("ONNXCOP_FRESH_EXPORTS")
    if not folder:
        pytest.skip("no exporter was run: tools/make_exports.py runs them, ONNXCOP_FRESH_EXPORTS names their folder")
    path = Path(folder) / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"the exporter of {name} could not be installed here")
    return onnx.load(path)


@pytest.mark.parametrize("name", sorted({path.stem for path in EXPORTS.glob("*.onnx")} - set(OLD)))
def test_an_export_made_here_is_pruned_as_the_stored_one(name: str) -> None:
    fresh, stored = _fresh(name), onnx.load(EXPORTS / f"{name}.onnx")
    assert (fresh.producer_name, len(fresh.graph.node)) == (stored.producer_name, len(stored.graph.node))
    assert groups(fresh) == groups(stored)
    result = onnxcop.prune(fresh, macs=BUDGET, criterion="l2", recover="none", limits=onnxcop.Limits(multiple_of=1))
    checked = result.report.verification
    assert checked is not None
    assert checked.max_difference is not None
    assert checked.max_difference < 1e-5
    assert result.report.after.macs <= BUDGET * result.report.before.macs
    assert border(result.model) == border(fresh)
    for before, after in zip(run(fresh, 3), run(result.model, 3), strict=True):
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
