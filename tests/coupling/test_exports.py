"""Small networks as nine exporters write them; tools/make_exports.py makes the files again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxcop

EXPORTS = Path(__file__).parents[1] / "exports"
BUDGET = 0.6


@dataclass(frozen=True)
class Export:
    """Description of a file, and the share of it that must be prunable.

    Attributes:
        producer: Name that the exporter writes into it.
        opset: Its version of the standard operators.
        filters: Filters of all layers.
        output: How many of them make the output or enter a Softmax of classes, and so must stay.
    """

    producer: str
    opset: int
    filters: int
    output: int = 10


CASES = {
    "torchscript_convolutional": Export("pytorch", 17, 114),
    "torchscript_transformer": Export("pytorch", 17, 202),
    "torchexport_convolutional": Export("pytorch", 20, 114),
    "torchexport_transformer": Export("pytorch", 20, 202),
    "tf2onnx_keras": Export("tf2onnx", 17, 162),
    "tf2onnx_tflite": Export("tf2onnx", 17, 162),
    "paddle2onnx": Export("", 13, 138),
    "jax2onnx_flax": Export("jax2onnx", 21, 114),
    "skl2onnx_classifier": Export("skl2onnx", 16, 66),
    "skl2onnx_regressor": Export("skl2onnx", 16, 48, 8),
    "opset07_convolutional": Export("pytorch", 7, 114),
    "opset07_decoder": Export("pytorch", 7, 43, 1),
    "opset08_attention": Export("pytorch", 8, 202),
    "opset09_convolutional": Export("pytorch", 9, 114),
    "opset09_decoder": Export("pytorch", 9, 43, 1),
    "opset10_decoder": Export("pytorch", 10, 43, 1),
    "opset11_attention": Export("pytorch", 11, 202),
    "opset11_decoder": Export("pytorch", 11, 43, 1),
    "opset12_convolutional": Export("pytorch", 12, 114),
}
OLD = [name for name in CASES if name.startswith("opset")]
# jax2onnx 0.17.1 notes the shapes of some tensors for another layout; the checker refuses its file too.
REFUSED = {"jax2onnx_flax"}
# Looks up the name of the winning class, after all layers.
DECLINED = {"skl2onnx_classifier": ["no rule for operator ai.onnx.ml.ArrayFeatureExtractor"]}


def load(name: str) -> onnx.ModelProto:
    """The export of a name."""
    return onnx.load(EXPORTS / f"{name}.onnx")


def prune(name: str, exact_only: bool = False, keep_initializer_inputs: bool = False) -> onnxcop.PruneResult:
    """The export, pruned by weights alone and not made up for."""
    limits = onnxcop.Limits(exact_only=exact_only, multiple_of=1)  # odd widths test the rewriter hardest
    return onnxcop.prune(
        load(name), macs=BUDGET, criterion="l2", recover="none", limits=limits,
        keep_initializer_inputs=keep_initializer_inputs,
    )  # fmt: skip


def groups(model: onnx.ModelProto) -> list[tuple[int, int, bool]]:
    """Width, number of units and exactness of every group."""
    structure = onnxcop.analyze(model).structure
    return sorted((group.width, len(group.units), group.exact) for group in structure.groups)


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operators."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def border(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs that are not stored, and outputs."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored] + list(model.graph.output)


def run(model: onnx.ModelProto, batch: int) -> list[np.ndarray]:
    """Outputs on seeded random samples; the sizes of the other axes are the model's own."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # initializers as inputs are warned about
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    shape = [axis if isinstance(axis, int) else batch for axis in given.shape]
    samples = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return session.run(None, {given.name: samples})


def test_every_file_is_a_case() -> None:
    assert {path.stem for path in EXPORTS.glob("*.onnx")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_all_that_the_output_does_not_fix_is_prunable(name: str) -> None:
    case, model = CASES[name], load(name)
    assert (model.producer_name, opset(model)) == (case.producer, case.opset)
    report = prune(name).report
    assert report.filters == case.filters
    assert round(report.filters * (1 - report.prunable)) == case.output
    assert sum(report.frozen.values()) == case.output
    assert [reason.split(" (")[0] for reason in report.declined] == DECLINED.get(name, [])


@pytest.mark.parametrize("exact_only", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_pruned_and_proven(name: str, exact_only: bool) -> None:
    original, result = load(name), prune(name, exact_only)
    report, pruned = result.report, result.model
    assert report.after.macs <= BUDGET * report.before.macs
    assert report.after.params < report.before.params
    assert sum(group.width - group.kept for group in report.groups) > 0
    checked = report.verification
    assert checked is not None
    assert checked.max_difference is not None
    assert checked.max_difference < 1e-5
    assert checked.exact_units > 0
    assert exact_only <= (checked.inexact_units == 0)
    assert bool(checked.notes) == (name in REFUSED)
    assert border(pruned) == border(original)
    assert opset(pruned) == opset(original)
    for before, after in zip(run(original, 3), run(pruned, 3), strict=True):
        assert (after.shape, after.dtype) == (before.shape, before.dtype)


@pytest.mark.parametrize("network", ["convolutional", "transformer"])
def test_both_exporters_of_pytorch_give_the_same_groups(network: str) -> None:
    assert groups(load(f"torchscript_{network}")) == groups(load(f"torchexport_{network}"))


def test_weights_in_constant_nodes_shrink() -> None:
    original, pruned = load("paddle2onnx"), prune("paddle2onnx").model
    assert not original.graph.initializer

    def kernels(model: onnx.ModelProto) -> list[int]:
        made = {node.output[0]: node for node in model.graph.node if node.op_type == "Constant"}
        tensors = [made[node.input[1]].attribute[0].t for node in model.graph.node if node.op_type == "Conv"]
        return [int(np.prod(tensor.dims)) for tensor in tensors]

    pairs = list(zip(kernels(original), kernels(pruned), strict=True))
    assert all(after < before for before, after in pairs)


def test_layouts_turn_around_layers() -> None:
    for name in ("tf2onnx_keras", "tf2onnx_tflite", "jax2onnx_flax"):
        model = load(name)
        assert border(model)[0].type.tensor_type.shape.dim[3].dim_value == 3
        assert sum(node.op_type == "Transpose" for node in model.graph.node) >= 2


@pytest.mark.parametrize("name", OLD)
def test_initializers_stay_inputs_with_their_new_shapes(name: str) -> None:
    original, pruned = load(name), prune(name, keep_initializer_inputs=True).model
    listed = {tensor.name for tensor in original.graph.initializer}
    for model in (original, pruned):
        declared = {value.name: value.type.tensor_type.shape for value in model.graph.input}
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        assert declared.keys() >= (stored.keys() if model.ir_version < 4 else stored.keys() & listed)
        for shared in declared.keys() & stored.keys():
            assert [dim.dim_value for dim in declared[shared].dim] == list(stored[shared].dims)
    assert listed <= {value.name for value in original.graph.input}
