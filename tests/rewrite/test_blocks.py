"""Blocks: groups that go whole leave a network that computes what the masked original does, without their layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_models import chain, outputs, times_in_blocks, written
from transformer_models import Net

import onnxcop
from onnxcop._base import cache
from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.errors import BudgetError, ModelError, PlanMismatchError
from onnxcop.pipeline import finish, timing, widths
from onnxcop.rewrite.apply import apply
from onnxcop.rewrite.blocks import Blocks, emptied
from onnxcop.rewrite.plan import Cut, PruningPlan, cuts_of, units_of
from onnxcop.runtime import time_table
from onnxcop.runtime.latency import Latency, Measurement, Timing
from onnxcop.runtime.staircase import Staircase
from onnxcop.verification.masked_model import masked

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
SIDE = 8


class Convs(Net):
    """A network of convolutions on `[N, 3, 8, 8]`."""

    def conv(self, x: str, ins: int, outs: int, taps: int = 3, **attributes: Any) -> str:
        """A convolution with a bias that keeps the size."""
        weights = self.weights(outs, ins, taps, taps, scale=(ins * taps * taps) ** -0.5)
        bias = self.weights(outs, scale=0.5)
        return self.add("Conv", x, weights, bias, pads=[taps // 2] * 4, **attributes)

    def branch(self, x: str, width: int, inner: int) -> str:
        """Two convolutions with an activation in between."""
        return self.conv(self.add("Relu", self.conv(x, width, inner)), inner, width)

    def ended(self, x: str, width: int) -> onnx.ModelProto:
        """The model with a linear head."""
        flat = self.add("Flatten", self.add("GlobalAveragePool", x))
        self.output(self.add("Gemm", flat, self.weights(width, 4)), ["N", 4])
        return self.model()


def started() -> tuple[Convs, str]:
    net = Convs()
    return net, net.add("Relu", net.conv(net.input("x", ["N", 3, SIDE, SIDE]), 3, 12))


def behind_activation() -> onnx.ModelProto:
    """A term of a sum whose activation, and the next layer's border, keep its constant where it is."""
    net, x = started()
    x = net.add("Relu", net.add("Add", x, net.branch(x, 12, 6)))
    return net.ended(net.add("Relu", net.conv(x, 12, 12)), 12)


def linear_stream() -> onnx.ModelProto:
    """Two terms of sums that only pointwise layers read: their constants go into several biases."""
    net, x = started()
    x = net.add("Add", x, net.branch(x, 12, 6))
    inner = net.add("Relu", net.conv(x, 12, 20, taps=1))
    x = net.add("Add", x, net.conv(inner, 20, 12, taps=1))
    return net.ended(net.add("Relu", net.conv(x, 12, 16, taps=1)), 16)


def after_layer() -> onnx.ModelProto:
    """A term that is added to what a layer makes for nothing else: its constant goes into that layer's bias."""
    net, x = started()
    x = net.add("Relu", net.add("Add", net.conv(x, 12, 10), net.conv(net.add("Relu", net.conv(x, 12, 6)), 6, 10)))
    return net.ended(x, 10)


def subtracted() -> onnx.ModelProto:
    """A term that is subtracted."""
    net, x = started()
    x = net.add("Sub", x, net.branch(x, 12, 6))
    return net.ended(net.add("Relu", net.conv(x, 12, 16, taps=1)), 16)


def gated() -> onnx.ModelProto:
    """Squeeze-and-excitation: a gate that becomes part of the next weights."""
    net, x = started()
    small = net.add("Relu", net.conv(net.add("GlobalAveragePool", x), 12, 6, taps=1))
    x = net.add("Mul", x, net.add("Sigmoid", net.conv(small, 6, 12, taps=1)))
    return net.ended(net.add("Relu", net.conv(x, 12, 16)), 16)


def joined() -> onnx.ModelProto:
    """Three operands of a Concat, one of them by a normalization."""
    net, x = started()
    one, two = net.add("Relu", net.conv(x, 12, 8, taps=1)), net.add("Relu", net.conv(x, 12, 6))
    scale, shift, mean = (net.weights(5, scale=0.5) for _ in range(3))
    three = net.add("BatchNormalization", net.conv(x, 12, 5, taps=1), scale, shift, mean, net.constant(np.ones(5)))
    return net.ended(net.add("Relu", net.conv(net.add("Concat", one, two, three, axis=1), 19, 16)), 16)


def transformer() -> onnx.ModelProto:
    """Matrix products: their biases stand beside them."""
    net = Net()
    x = net.linear(net.input("x", ["N", 5, 16]), 16, 16)
    x = net.add("Add", x, net.linear(net.gelu(net.linear(x, 16, 32)), 32, 16))
    net.output(net.linear(net.norm(x, 16), 16, 4), ["N", 5, 4])
    return net.model()


def scaled() -> onnx.ModelProto:
    """A branch whose result is scaled for each channel, as in networks with a layer scale."""
    net, x = started()
    made = net.add("Mul", net.branch(x, 12, 6), net.weights(12, 1, 1, scale=1.0))
    x = net.add("Relu", net.add("Add", x, net.add("Div", made, net.constant(3.0))))
    return net.ended(net.add("Relu", net.conv(x, 12, 12)), 12)


def without_biases() -> onnx.ModelProto:
    """Layers that get a bias with the constant of a branch: one that makes a term, and two that read the sum."""
    net, x = started()
    bare = {"pads": [0] * 4}
    made = net.add("Conv", x, net.weights(10, 12, 1, 1, scale=0.3), **bare)
    x = net.add("Add", made, net.conv(net.add("Relu", net.conv(x, 12, 6)), 6, 10))
    x = net.add("Add", net.add("Relu", net.conv(x, 10, 10)), net.branch(x, 10, 6))
    one, two = (net.add("Conv", x, net.weights(8, 10, 1, 1, scale=0.3), *more, **bare) for more in ((), ("",)))
    return net.ended(net.add("Relu", net.add("Mul", one, two)), 8)


def shared_bias() -> onnx.ModelProto:
    """Readers of a sum whose stored bias is one number for all outputs, which cannot absorb a constant for each."""
    net = Net()
    x = net.add("Relu", net.add("Gemm", net.input("x", ["N", 16]), net.weights(16, 12), net.weights(12)))
    inner = net.add("Relu", net.add("Gemm", x, net.weights(12, 6), net.weights(6)))
    x = net.add("Add", x, net.add("Gemm", inner, net.weights(6, 12), net.weights(12)))
    net.output(net.add("Gemm", x, net.weights(12, 4), net.constant([0.5])), ["N", 4])
    return net.model()


MODELS = (
    behind_activation, linear_stream, after_layer, subtracted, gated, joined, transformer, scaled, without_biases,
    shared_bias,
)  # fmt: skip


def analysed(model: onnx.ModelProto) -> Analysis:
    return analyze(model, options=CPU)


def sample(model: onnx.ModelProto) -> np.ndarray[Any, Any]:
    shape = [dim.dim_value or 2 for dim in model.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def all_together(blocks: Blocks) -> list[int]:
    """As many groups as can go together, in their order."""
    found: list[int] = []
    for group in blocks.whole():
        if blocks.without((*found, group)) is not None:
            found.append(group)
    return found


@pytest.mark.parametrize("made", MODELS, ids=lambda made: made.__name__)
def test_equals_the_masked_original(made: Callable[[], onnx.ModelProto]) -> None:
    analysis = analysed(made())
    structure, blocks = analysis.structure, Blocks(analysis.model, analysis.structure)
    assert blocks.whole()
    for groups in ([group] for group in blocks.whole()):
        check_cut(analysis, groups)
    check_cut(analysis, all_together(blocks))
    half = [group.units[::2] for group in structure.groups if group.exact and group.index not in blocks.whole()]
    check_cut(analysis, list(blocks.whole())[:1], half)


def check_cut(analysis: Analysis, groups: list[int], more: list[Any] | None = None) -> None:
    """Without whole groups, and some other units, the small model and the masked original compute the same."""
    units = [analysis.structure.groups[group].units for group in groups] + (more or [])
    removed = np.sort(np.concatenate(units))
    small, large = (f(analysis.model, analysis.structure, removed) for f in (apply, masked))
    onnx.checker.check_model(small, full_check=True)
    x = sample(analysis.model)
    wanted = outputs(large, x)
    np.testing.assert_allclose(outputs(small, x), wanted, rtol=1e-4, atol=1e-5 * float(np.abs(wanted).max()))
    assert len(small.graph.node) < len(analysis.model.graph.node)
    read = {name for node in small.graph.node for name in node.input}
    assert {tensor.name for tensor in small.graph.initializer} <= read
    assert all(0 not in tensor.dims for tensor in small.graph.initializer)


@pytest.mark.parametrize(
    ("made", "gone"),
    [
        (behind_activation, {"Conv": 2, "Relu": 1}),
        (linear_stream, {"Conv": 4, "Relu": 2, "Add": 2}),
        (after_layer, {"Conv": 2, "Relu": 1, "Add": 1}),
        (subtracted, {"Conv": 2, "Relu": 1, "Sub": 1}),
        (gated, {"Conv": 2, "Relu": 1, "Mul": 1, "GlobalAveragePool": 1, "Sigmoid": 1}),
        (transformer, {"MatMul": 2, "Div": 1, "Erf": 1, "Mul": 2, "Add": 3}),
    ],
    ids=lambda entry: entry.__name__ if callable(entry) else "",
)
def test_what_leaves_the_graph(made: Callable[[], onnx.ModelProto], gone: dict[str, int]) -> None:
    analysis = analysed(made())
    groups = all_together(Blocks(analysis.model, analysis.structure))
    units = np.concatenate([analysis.structure.groups[group].units for group in groups])
    before, after = (
        Counter(node.op_type for node in model.graph.node)
        for model in (analysis.model, apply(analysis.model, analysis.structure, np.sort(units)))
    )
    assert before - after == Counter(gone)
    assert not after - before


def test_the_last_way_to_an_output_stays() -> None:
    analysis = analysed(chain())
    assert Blocks(analysis.model, analysis.structure).whole() == ()
    with pytest.raises(ModelError, match="no longer depends on the inputs"):
        apply(analysis.model, analysis.structure, analysis.structure.groups[0].units)
    analysis = analysed(joined())
    blocks = Blocks(analysis.model, analysis.structure)
    operands = [g for g in blocks.whole() if analysis.structure.groups[g].width in (5, 6, 8)]
    assert len(operands) == 3
    assert blocks.without(operands[:2]) is not None
    assert blocks.without(operands) is None


def slid_over() -> onnx.ModelProto:
    """A branch that ends in a mean over windows with a border of zeros, which is not the same everywhere."""
    net, x = started()
    made = net.add("AveragePool", net.branch(x, 12, 6), kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
    return net.ended(net.add("Relu", net.conv(net.add("Add", x, made), 12, 12)), 12)


def spread_out() -> onnx.ModelProto:
    """A branch that gives a sum its rows and columns: without it, the other term is a single point."""
    net, x = started()
    x = net.add("Add", net.add("GlobalAveragePool", x), net.branch(x, 12, 6))
    return net.ended(net.add("Relu", net.conv(x, 12, 12)), 12)


@pytest.mark.parametrize("made", [slid_over, spread_out], ids=lambda made: made.__name__)
def test_a_branch_that_does_more_than_add_a_constant_stays(made: Callable[[], onnx.ModelProto]) -> None:
    analysis = analysed(made())
    inner = [group.index for group in analysis.structure.groups if group.width == 6]
    assert inner and not set(inner) & set(Blocks(analysis.model, analysis.structure).whole())


def small_branch() -> onnx.ModelProto:
    """A network whose branch hardly does more than add a constant, which is large."""
    net, x = started()
    made = net.conv(net.add("Relu", net.conv(x, 12, 12)), 12, 12, taps=1)
    stored = {tensor.name: tensor for tensor in net.stored}
    first = next(node for node in net.nodes if node.op_type == "Conv" and node.input[0] == x)
    tensor = stored[first.input[1]]
    tensor.CopyFrom(onnx.numpy_helper.from_array(1e-3 * onnx.numpy_helper.to_array(tensor), tensor.name))
    x = net.add("Relu", net.add("Add", x, made))
    return net.ended(net.add("Relu", net.conv(x, 12, 12)), 12)


@pytest.fixture(scope="module")
def bought() -> onnxcop.PruneResult:
    return pruned_to(onnxcop.Limits(blocks=True, multiple_of=1), macs=0.5)


class Slow:
    """A machine whose models take as long as their convolutions have weights, in place of this one."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        patch.setenv(cache.FOLDER, str(folder))
        patch.setattr(timing, "measure_times", self.measure)
        patch.setattr(time_table, "kernel_times", lambda model, *_: times_in_blocks(model, float))
        patch.setattr(widths, "staircase_of", lambda _: Staircase(1, 1))
        patch.setattr(finish, "timed", self.timed)

    def seconds(self, model: onnx.ModelProto) -> float:
        return float(sum(np.prod(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 4))

    def measure(self, models: Sequence[onnx.ModelProto], *_: Any, **__: Any) -> Measurement:
        return Measurement(np.array([[self.seconds(model) for model in models]] * 3), "made up")

    def timed(self, original: onnx.ModelProto, other: onnx.ModelProto, *_: Any) -> Latency:
        before, after = (Timing(*[self.seconds(model)] * 3) for model in (original, other))
        return Latency(before, after, after.median / before.median, 0.0, 3, "made up")


def pruned_to(limits: onnxcop.Limits, **budget: float) -> onnxcop.PruneResult:
    data = np.random.default_rng(0).standard_normal((96, 3, SIDE, SIDE)).astype(np.float32)
    return onnxcop.prune(
        small_branch(), data=data, limits=limits, options=CPU, latency_seconds=0.0, progress=None, **budget
    )


def emptied_groups(result: onnxcop.PruneResult) -> int:
    return sum(not group.kept for group in result.report.groups)


def test_in_a_budget_of_time_a_block_goes_unasked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Slow(monkeypatch, tmp_path)
    caplog.set_level("INFO", "onnxcop")
    all_or_nothing = onnxcop.Limits(multiple_of=12)
    result = pruned_to(all_or_nothing, latency=0.67)
    assert emptied_groups(result) == 1
    assert result.report.latency is not None
    assert result.report.latency.ratio <= 0.67
    assert result.plan.settings["limits"]["blocks"] is True
    with pytest.raises(BudgetError, match="nothing is left to prune"):
        pruned_to(replace(all_or_nothing, blocks=False), latency=0.67)
    monkeypatch.setattr(widths, "_QUICK", 0.0)  # one more selection takes too long
    with pytest.raises(BudgetError, match="nothing is left to prune"):
        pruned_to(all_or_nothing, latency=0.67)


def test_in_other_budgets_it_does_not(bought: onnxcop.PruneResult) -> None:
    result = pruned_to(onnxcop.Limits(multiple_of=1), macs=0.5)
    assert not emptied_groups(result)
    assert result.plan.settings["limits"]["blocks"] is False
    assert bought.plan.settings["limits"]["blocks"] is True


def test_a_block_is_removed_if_that_pays(bought: onnxcop.PruneResult) -> None:
    whole = [group for group in bought.report.groups if not group.kept]
    assert len(whole) == 1
    assert sum(node.op_type == "Conv" for node in bought.model.graph.node) == 2
    assert any(line.startswith("blocks: 1 removed whole: node_conv") for line in bought.report.choices)
    assert bought.report.verification.max_difference < 1e-5
    assert bought.report.held_out["divergence"] < 0.05  # the mean of the branch stands in the next sum


def test_its_plan_makes_it_again(bought: onnxcop.PruneResult, tmp_path: Path) -> None:
    path = written(small_branch(), tmp_path / "model.onnx")
    analysis = analyze(path, options=CPU)
    plan = replace(bought.plan, model=analysis.sha256)
    units = units_of(analysis, plan)
    assert emptied(analysis.structure, units)
    assert plan.cuts == cuts_of(analysis, units)


def test_its_plan_is_refused_for_a_module(bought: onnxcop.PruneResult, tmp_path: Path) -> None:
    path = written(small_branch(), tmp_path / "model.onnx")
    plan = replace(bought.plan, model=analyze(path, options=CPU).sha256)
    with pytest.raises(PlanMismatchError, match="whole blocks"):
        onnxcop.torch_state(plan, {}, path)


def test_a_plan_that_leaves_nothing_is_refused() -> None:
    analysis = analysed(chain())
    plan = PruningPlan(model=analysis.sha256, cuts=(Cut("w1", 0, tuple(range(8))),))
    with pytest.raises(PlanMismatchError, match="leaves nothing"):
        units_of(analysis, plan)


def test_blocks_need_measured_allocation() -> None:
    with pytest.raises(BudgetError, match="--blocks"):
        onnxcop.prune(small_branch(), macs=0.6, criterion="l2", recover="none", limits=onnxcop.Limits(blocks=True))
