"""The judge of tools/peers_zoo.py finds what was removed, and sees what is wrong."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def judge() -> ModuleType:
    """The module, which is outside the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        return import_module("peers_zoo")


@pytest.fixture(scope="module")
def pair(judge: ModuleType, models_dir: Path) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A network and what is left of it."""
    model = onnx.load(models_dir / "digits_resnet.onnx")
    return model, judge.ours(model, 0.7)[0]


def changed(model: onnx.ModelProto, node: int, values: np.ndarray) -> onnx.ModelProto:
    """The model with other weights in one layer."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    name = result.graph.node[node].input[1]
    (tensor,) = (tensor for tensor in result.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))
    return result


def test_origins_are_found_whatever_the_order(judge: ModuleType) -> None:
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((12, 8, 9)).astype(np.float32)
    whole[3, 5] = 0  # ambiguous, and so of no use, but no obstacle
    rows, columns = rng.permutation(12)[:7], rng.permutation(8)[:5]
    found = judge.origins(whole, whole[rows][:, columns])
    assert found is not None
    np.testing.assert_array_equal(found[0], rows)
    np.testing.assert_array_equal(found[1], np.tile(columns, (7, 1)))
    assert judge.origins(whole, whole[rows][:, columns] + 1) is None
    assert judge.origins(np.zeros_like(whole), np.zeros((7, 5, 9), np.float32)) is None


def test_a_right_result_is_equal(judge: ModuleType, pair: tuple[onnx.ModelProto, onnx.ModelProto]) -> None:
    model, pruned = pair
    row = judge.Row("digits_resnet", "onnxcop")
    judge.tally(row, model, pruned)
    assert judge.verdict(model, pruned) == "equal"
    assert row.convs_cut == row.convs == sum(node.op_type == "Conv" for node in model.graph.node)
    assert row.filters_cut > 0


@pytest.mark.parametrize("axis", [0, 1])
def test_filters_or_channels_in_the_wrong_order_are_seen(
    judge: ModuleType, pair: tuple[onnx.ModelProto, onnx.ModelProto], axis: int
) -> None:
    model, pruned = pair
    layer = next(layer for layer in judge.layers(pruned)[2:] if layer.op == "Conv")
    shuffled = np.flip(layer.weights, axis).reshape(layer.shape)
    assert judge.verdict(model, changed(pruned, layer.node, shuffled)) == "differs"


def test_weights_that_are_not_the_originals_are_unknown(
    judge: ModuleType, pair: tuple[onnx.ModelProto, onnx.ModelProto]
) -> None:
    model, pruned = pair
    layer = judge.layers(pruned)[2]
    assert judge.verdict(model, changed(pruned, layer.node, 1.5 * layer.weights.reshape(layer.shape))) == "unknown"


def test_a_model_is_behind_only_if_another_result_is_correct(judge: ModuleType) -> None:
    def row(tool: str, cut: int, verdict: str) -> object:
        return judge.Row("m", tool, convs=9, convs_cut=cut, layers=9, layers_cut=cut, loads=True, verdict=verdict)

    ahead = {"onnxcop": row("onnxcop", 5, "equal"), "onnxsim-l2": row("onnxsim-l2", 6, "differs")}
    assert judge.shortfall(ahead) == ""
    behind = {"onnxcop": row("onnxcop", 5, "equal"), "onnxsim-l2": row("onnxsim-l2", 6, "equal")}
    assert judge.shortfall(behind) == "onnxsim-l2 cuts 6 convs, onnxcop 5"
