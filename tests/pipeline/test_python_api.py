"""The package from Python: three lines, the stages one by one, and one's own criterion."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import REPO_ROOT
from small_models import chain, nothing_to_prune, outputs, shapes, written

import onnxcop
from onnxcop.criteria.base import StaticRanking

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def test_three_lines(models_dir: Path, tmp_path: Path) -> None:
    result = onnxcop.prune(models_dir / "digits_resnet.onnx", macs=0.7)
    result.save(tmp_path / "small.onnx")
    assert result.report.after.macs <= 0.7 * result.report.before.macs
    assert isinstance(result.plan, onnxcop.PruningPlan)
    assert onnx.load(tmp_path / "small.onnx") == result.model
    onnx.checker.check_model(result.model, full_check=True)


def test_paths_and_models_give_the_same(tmp_path: Path) -> None:
    model = chain()
    path = written(model, tmp_path / "net.onnx")
    results = [onnxcop.prune(source, macs=0.6, recover="none", options=CPU) for source in (model, path, str(path))]
    assert results[0].model == results[1].model == results[2].model
    assert results[1].report.model == str(path)


def test_stages_one_by_one() -> None:
    from onnxcop.criteria.registry import criterion_named

    analysis = onnxcop.analyze(chain(), options=CPU)
    context = onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost)
    ranking = criterion_named("cop").rank(context)
    selection = onnxcop.choose(context, ranking, onnxcop.Budget(macs=0.6), onnxcop.Limits(multiple_of=1))
    small = onnxcop.apply(analysis.model, analysis.structure, np.sort(selection.removed))
    checked = onnxcop.verify(analysis.model, small, analysis.structure, np.sort(selection.removed), CPU)
    assert checked.max_difference is not None
    assert checked.max_difference <= 1e-4
    assert checked.exact_units == len(selection.removed)
    whole = onnxcop.prune(
        chain(), macs=0.6, criterion="cop", recover="none", options=CPU, metadata=False,
        limits=onnxcop.Limits(multiple_of=1),
    )  # fmt: skip
    assert small == whole.model


@dataclass(frozen=True)
class LastFirst:
    """Removes the units with the largest numbers."""

    name: str = "last-first"
    needs_stats: bool = False

    def rank(self, context: onnxcop.PruningContext) -> onnxcop.Ranking:
        return StaticRanking(-np.arange(len(context.structure.unit_class), dtype=np.float64))

    def parameters(self) -> dict[str, Any]:
        return {"order": "descending"}


def test_a_criterion_of_ones_own() -> None:
    criterion: onnxcop.Criterion = LastFirst()
    result = onnxcop.prune(chain(), macs=0.8, criterion=criterion, recover="none", options=CPU)
    assert result.plan.criterion == {"name": "last-first", "order": "descending"}
    assert result.report.criterion == "last-first"
    (cut,) = result.plan.cuts
    width = shapes(result.model)["w2"][0]
    assert (cut.tensor, cut.axis, cut.indices) == ("w2", 0, tuple(range(width, 16)))


def test_what_is_pruned_computes_the_masked_original() -> None:
    """Removing channels is setting what reads them to zero, seen from outside."""
    model = chain()
    result = onnxcop.prune(model, macs=0.5, criterion="l1", recover="none", options=CPU)
    masked = onnx.ModelProto()
    masked.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in masked.graph.initializer}
    readers = {"w1": ("w2", 1), "w2": ("w3", 1)}
    for cut in result.plan.cuts:
        name, axis = readers[cut.tensor]
        values = onnx.numpy_helper.to_array(tensors[name]).copy()
        np.moveaxis(values, axis, 0)[list(cut.indices)] = 0
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    x = np.random.default_rng(3).standard_normal((4, 3, 8, 8)).astype(np.float32)
    expected = outputs(masked, x)
    np.testing.assert_allclose(outputs(result.model, x), expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(outputs(model, x) - expected).max() > 1e-3


def test_errors_have_one_base() -> None:
    for error in (
        "ModelError",
        "BudgetError",
        "PlanMismatchError",
        "CalibrationError",
        "EngineError",
    ):
        assert issubclass(getattr(onnxcop.errors, error), onnxcop.OnnxcopError)
    with pytest.raises(onnxcop.OnnxcopError, match="nothing to prune"):
        onnxcop.prune(nothing_to_prune(), options=CPU)
    with pytest.raises(onnxcop.OnnxcopError, match="does not exist"):
        onnxcop.prune("missing.onnx")
    with pytest.raises(onnxcop.OnnxcopError, match="'abacus'"):
        onnxcop.prune(chain(), options=onnxcop.EngineOptions(provider="abacus"))
    with pytest.raises(onnxcop.OnnxcopError, match="'best'"):
        onnxcop.prune(chain(), criterion="best", options=CPU)


@pytest.mark.parametrize("value", [1.5, 0, -1.0, "170%", "most", float("nan"), np.float32(2), True])
def test_a_budget_that_is_no_fraction_is_named(value: Any) -> None:
    with pytest.raises(onnxcop.errors.BudgetError, match=f"--macs is a fraction to keep.*, not {value}"):
        onnxcop.prune(chain(), macs=value, options=CPU)


def test_budgets_are_understood_as_on_the_command_line() -> None:
    plans = [onnxcop.prune(chain(), options=CPU, recover="none", macs=macs).plan for macs in (0.7, "70%", "0.7")]
    assert plans[0] == plans[1] == plans[2]
    assert onnxcop.Budget(macs="70%", size="5MB") == onnxcop.Budget(macs=0.7, size=5_000_000)
    assert onnxcop.Budget(size="2KiB").size == 2048
    assert onnxcop.prune(chain(), options=CPU, recover="none", size="5kB").report.after.bytes <= 5000
    with pytest.raises(onnxcop.errors.BudgetError, match="--size: '5 apples' is not a size; write 5MB"):
        onnxcop.prune(chain(), size="5 apples")
    with pytest.raises(onnxcop.errors.BudgetError, match="--size: '0' is less than a byte"):
        onnxcop.prune(chain(), size=0)


def test_the_options_are_the_keyword_arguments_of_prune() -> None:
    names = {entry.name for entry in dataclasses.fields(onnxcop.PruneOptions)}
    signature = inspect.signature(onnxcop.prune)
    assert list(signature.parameters)[:2] == ["model", "macs"]
    assert {*signature.parameters} == {"model", *names}
    assert len(str(signature)) < 700  # names and defaults; types are in the text
    documentation = str(onnxcop.prune.__doc__)
    assert all(f"\n    {name} (" in documentation for name in names)
    for line in ("\n    policy ('finest' | 'coarsest'): ", "\n    size (float | str): ", "\n    limits (Limits): "):
        assert line in documentation
    assert "asked" not in documentation
    with pytest.raises(TypeError, match=r"prune\(\) got an unexpected keyword argument 'mac'; did you mean 'macs'\?"):
        onnxcop.prune("net.onnx", mac=0.7)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"sweep\(\) got an unexpected keyword argument 'mac'"):
        onnxcop.sweep("net.onnx", [0.7], mac=0.7)  # type: ignore[call-arg]
    assert str(onnxcop.sweep.__doc__).count("\n    macs") == 1
    with pytest.raises(TypeError, match=r"prune\(\) missing a required argument: 'model'"):
        onnxcop.prune(macs=0.7)  # type: ignore[call-arg]


def test_what_the_documents_import_is_exported() -> None:
    pages = [REPO_ROOT / "README.md", *(REPO_ROOT / "docs").rglob("*.md")]
    imports = {
        match[1]
        for page in pages
        for match in re.finditer(r"^\s*(?:from|import) (onnxcop\S*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    others = {"onnxcop", "onnxcop.errors", "onnxcop.ops", "onnxcop.training"}
    assert {name for name in imports - others if not name.startswith("onnxcop.integrations.")} == set()
    assert others <= imports


def test_all_that_the_package_exports_is_listed() -> None:
    assert {*onnxcop.__all__} <= {*dir(onnxcop)}
    assert all(getattr(onnxcop, name) is not None for name in onnxcop.__all__)


def test_a_preprocessing_may_be_given_by_its_name(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{number}.png")
    seen = {
        name: onnxcop.prune(chain(), data=tmp_path, preprocess=name, criterion="l2", recover="merge", options=CPU)
        for name in ("imagenet", "none")
    }
    assert " to 255" in str(seen["none"].report.inputs[0])
    assert " to 2." in str(seen["imagenet"].report.inputs[0])
    with pytest.raises(onnxcop.OnnxcopError, match="unknown preprocessing 'imagnet'; choose one of"):
        onnxcop.prune(chain(), data=tmp_path, preprocess="imagnet", options=CPU)


def test_the_report_is_plain_data() -> None:
    import json

    result = onnxcop.prune(chain(), macs=0.7, recover="none", options=CPU)
    document = json.loads(json.dumps(result.report.to_dict(), allow_nan=False))
    assert document["before"]["params"] == sum(int(np.prod(s)) for s in shapes(chain()).values())
    assert document["kept"]["macs"] <= 0.7
    assert [group["width"] for group in document["groups"]] == [8, 16]


@pytest.mark.parametrize("name", onnxcop.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(onnxcop, name) is not None


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="prume"):
        _ = onnxcop.prume


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    """`onnxcop.verify` is the function, whichever module was imported first."""
    script = (
        "import onnxcop.verification.verify, onnxcop.verification.recheck, onnxcop, types;"
        "assert not isinstance(onnxcop.verify, types.ModuleType), onnxcop.verify"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_import_is_light() -> None:
    script = (
        "import sys, onnxcop;"
        "heavy = {'numpy', 'onnx', 'scipy', 'click', 'rich', 'onnxruntime'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
