"""Where a result comes from, in its own metadata."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import onnx
import pytest
from cli_runs import BARE
from small_models import chain

import onnxcop
from onnxcop._version import __version__
from onnxcop.allocation.resources import PROVENANCE
from onnxcop.cli import main as cli
from onnxcop.graph.io import sha256
from onnxcop.rewrite.provenance import CLASSES, stamp

CPU = onnxcop.EngineOptions("cpu", 1)


def _of(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props if entry.key.startswith("onnxcop")}


def test_the_result_contains_its_provenance(pruned: tuple[Path, Path, Path]) -> None:
    original, small, plan = pruned
    assert _of(small) == {
        "onnxcop.version": __version__, "onnxcop.budget": '{"macs":0.7}',
        "onnxcop.original_sha256": sha256(onnx.load(original)),
        "onnxcop.plan_sha256": hashlib.sha256(plan.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert cli.run(["verify", str(original), str(small), "--plan", str(plan), "-q"]) == 0


def test_no_metadata_leaves_it_out(model: Path, pruned: tuple[Path, Path, Path]) -> None:
    out, (original, _, plan) = model.with_name("bare.onnx"), pruned
    assert cli.run([str(model), "-o", str(out), "-q", "--no-metadata", *BARE]) == 0
    assert _of(out) == {}
    again = ["apply", str(original), str(plan), "-o", str(out), "-q", "--latency-seconds", "0", "--provider", "cpu"]
    assert cli.run([*again, "--no-metadata"]) == 0
    assert _of(out) == {}
    assert cli.run(again) == 0
    assert _of(out)["onnxcop.version"] == __version__


def test_what_others_wrote_stays_and_an_earlier_run_is_replaced() -> None:
    model = chain()
    onnx.helper.set_model_props(model, {"author": "someone", "onnxcop.version": "0", "onnxcop.old": "x"})
    result = onnxcop.prune(model, criterion="l2", recover="none", options=CPU)
    keys = [entry.key for entry in result.model.metadata_props]
    assert keys[0] == "author" and len(keys) == 5 and "onnxcop.old" not in keys


def test_an_entry_about_classes_stays_until_classes_change_again() -> None:
    model, plan = chain(), onnxcop.prune(chain(), criterion="l2", recover="none", options=CPU).plan
    onnx.helper.set_model_props(model, {CLASSES: "of an earlier run"})
    stamp(model, plan)
    assert [entry.value for entry in model.metadata_props if entry.key == CLASSES] == ["of an earlier run"]
    less = onnxcop.prune(chain(), classes="0,2", criterion="l2", recover="none", options=CPU).plan
    assert less.kept is not None
    stamp(model, less)
    (entry,) = (entry for entry in model.metadata_props if entry.key == CLASSES)
    assert json.loads(entry.value)["kept"] == [0, 2]


@pytest.mark.parametrize("share", [0.5, 0.62, 0.8])
def test_a_file_within_its_size_holds_the_metadata_too(share: float, tmp_path: Path) -> None:
    model = chain()
    bound = int(share * len(model.SerializeToString()))
    result = onnxcop.prune(model, size=bound, criterion="l2", recover="none", options=CPU)
    result.save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size <= bound
    bare = onnxcop.prune(model, size=bound, criterion="l2", recover="none", options=CPU, metadata=False)
    stamp(bare.model, result.plan)
    added = len(bare.model.SerializeToString())
    del bare.model.metadata_props[:]
    assert added - len(bare.model.SerializeToString()) <= PROVENANCE
