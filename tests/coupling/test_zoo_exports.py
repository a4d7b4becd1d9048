"""Both of PyTorch's exporters give the same network, so both exports must have the same groups."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from conftest import REPO_ROOT

from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.analysis.census import census

QUICK = ("mobilenetv2_100", "resnet18", "tv_shufflenet_v2_x1_0", "ul_yolov8n", "vit_tiny_patch16_224")


def _tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO_ROOT / "tools"))
        return import_module("zoo")


def _analysed(zoo: Path, tool: ModuleType, name: str) -> Analysis:
    return analyze(tool.fill(zoo, onnx.load(zoo / "skeletons" / f"{name}.onnx")))


def _partition(analysis: Analysis) -> Counter[tuple[int, int, bool]]:
    """Groups by width, number of layers, and whether they are exact."""
    return Counter((group.width, len(group.producers), group.exact) for group in analysis.structure.groups)


def _layers(analysis: Analysis) -> Counter[tuple[int, int, int]]:
    """Layers by filters, prunable ones, and those that the model's purpose fixes."""
    return Counter((layer.filters, layer.prunable, layer.given) for layer in census(analysis))


def _compare(zoo: Path, name: str) -> None:
    tool = _tool()
    legacy, dynamo = (_analysed(zoo, tool, f"{name}.{kind}") for kind in ("legacy", "dynamo"))
    assert _partition(legacy) == _partition(dynamo)
    assert _layers(legacy) == _layers(dynamo)


@pytest.mark.zoo
@pytest.mark.parametrize("name", QUICK)
def test_two_exports_of_one_network_have_the_same_groups(zoo: Path, name: str) -> None:
    _compare(zoo, name)


@pytest.mark.zoo
@pytest.mark.slow
def test_all_pairs_of_exports_have_the_same_groups(zoo: Path) -> None:
    pairs = {path.name.removesuffix(".legacy.onnx") for path in (zoo / "skeletons").glob("*.legacy.onnx")}
    pairs &= {path.name.removesuffix(".dynamo.onnx") for path in (zoo / "skeletons").glob("*.dynamo.onnx")}
    assert pairs
    for name in sorted(pairs):
        _compare(zoo, name)
