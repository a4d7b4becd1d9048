"""The training step: AdamW as written, against numpy and PyTorch, and what happens to steps that fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcop.errors import ModelError
from onnxcop.runtime.providers import OutOfMemory
from onnxcop.runtime.session import EngineOptions
from onnxcop.training.loop import Loop, LoopSettings
from onnxcop.training.losses import LOSS, with_loss
from onnxcop.training.schedule import Schedule
from onnxcop.training.shards import Shards
from onnxcop.training.step import Optimizer, build_step
from onnxcop.training.steps import BatchSteps, Course
from onnxcop.training.trainer import StepResult, Trainer, TrainingState

ENGINE = EngineOptions("cpu", 1)
FLOAT = onnx.TensorProto.FLOAT


def linear() -> onnx.ModelProto:
    """y = x w + b."""
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[N,3] x) => (float[N,2] y) { y = Gemm(x, w, b) }'
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w", (3, 2)), ("b", (2,))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return with_loss(model, {"y": lambda y, t: ((y - t) * (y - t)).op("ReduceMean", keepdims=0)}, {"y": (FLOAT, 2)})


def batches(count: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(1)
    return [
        {
            "x": rng.standard_normal((5, 3)).astype(np.float32),
            "target/y": rng.standard_normal((5, 2)).astype(np.float32),
        }
        for _ in range(count)
    ]


def test_steps_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = linear()
    graph = build_step(model, Optimizer(decay=0.1, clip=0.7), input_shapes={"x": (5, 3), "target/y": (5, 2)})
    trainer = Trainer(graph, TrainingState.fresh(graph.layout.vector(model)), ENGINE)
    leaves = {
        tensor.name: torch.tensor(numpy_helper.to_array(tensor).copy(), requires_grad=True)
        for tensor in model.graph.initializer if tensor.name in ("w", "b")
    }  # fmt: skip
    optimizer = torch.optim.AdamW(
        [{"params": [leaves["w"]], "weight_decay": 0.1}, {"params": [leaves["b"]], "weight_decay": 0.0}], lr=0.05
    )
    for feed in batches(6):
        result = trainer.step(feed, 0.05)
        optimizer.zero_grad()
        loss = ((torch.tensor(feed["x"]) @ leaves["w"] + leaves["b"] - torch.tensor(feed["target/y"])) ** 2).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(leaves.values()), 0.7)
        optimizer.step()
        assert result.loss == pytest.approx(float(loss.detach()), rel=1e-5) and result.norm == pytest.approx(
            float(norm), rel=1e-5
        )
    found = graph.layout.arrays(trainer.weights)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(found[name], leaf.detach().numpy(), atol=2e-5)


def test_a_step_in_parts_is_the_step_of_the_whole() -> None:
    model = linear()
    graph = build_step(model, Optimizer(decay=0.1, clip=0.7), input_shapes={"x": (5, 3), "target/y": (5, 2)})
    whole, parted = (Trainer(graph, TrainingState.fresh(graph.layout.vector(model)), ENGINE) for _ in range(2))
    for feed in batches(4):
        parts = [{name: array[a:b] for name, array in feed.items()} for a, b in ((0, 2), (2, 4), (4, 5))]
        one, other = whole.step(feed, 0.05), parted.step_in_parts(parts, [0.4, 0.4, 0.2], 0.05)
        assert (other.loss, other.norm) == pytest.approx((one.loss, one.norm), rel=1e-5)
    np.testing.assert_allclose(parted.weights, whole.weights, atol=1e-6)
    assert parted.steps == whole.steps == 4
    last = batches(1)[0]
    broken = parted.step_in_parts([last, {**last, "x": last["x"] * np.float32(np.nan)}], [0.5, 0.5], 0.05)
    assert not broken.finite and parted.steps == 4
    np.testing.assert_allclose(parted.weights, whole.weights, atol=1e-6)


def test_a_step_that_is_no_number_is_undone() -> None:
    model = linear()
    graph = build_step(model, Optimizer(), input_shapes={"x": (5, 3), "target/y": (5, 2)})
    trainer = Trainer(graph, TrainingState.fresh(graph.layout.vector(model)), ENGINE)
    before = trainer.weights
    feed = batches(1)[0]
    result = trainer.step(feed | {"x": feed["x"] * np.float32(np.nan)}, 0.1)
    assert not result.finite and trainer.steps == 0
    np.testing.assert_array_equal(trainer.weights, before)


def test_a_model_without_anything_to_train_is_refused() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }'
    )
    work = with_loss(model, {"y": lambda y, t: (y - t).op("ReduceMean", keepdims=0)}, {"y": (FLOAT, 2)})
    with pytest.raises(ModelError, match="nothing can be trained"):
        build_step(work, Optimizer(), input_shapes={"x": (5, 3), "target/y": (5, 3)})
    assert LOSS in [value.name for value in work.graph.output]


class FakeTrainer:
    """Returns prepared results of steps."""

    def __init__(self, results: Sequence[Any]) -> None:
        self.results, self.rates, self.parts, self.steps = list(results), [], [], 0
        self.weights = np.zeros(3, np.float32)

    def step_in_parts(self, parts: Sequence[Mapping[str, Any]], shares: Sequence[float], rate: float) -> StepResult:
        """The next of the answers."""
        assert sum(shares) == pytest.approx(1.0)
        self.rates.append(rate)
        self.parts.append(len(parts))
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        self.steps += int(result.finite)
        return result  # type: ignore[no-any-return]


def looped(results: Sequence[Any], steps: int = 2) -> tuple[Loop, FakeTrainer]:
    trainer = FakeTrainer(results)
    nothing = SimpleNamespace(feed=lambda part, source: {}, close=lambda: None)
    made = BatchSteps(trainer, Course(nothing, None, Shards(8, 4), 0))  # type: ignore[arg-type]
    return Loop(trainer, made, lambda weights: 1.0, LoopSettings(Schedule(1.0, steps))), trainer  # type: ignore[arg-type]


GOOD, BAD = StepResult(1.0, 1.0), StepResult(float("nan"), 1.0)


def test_the_rate_is_halved_three_times_then_the_batch_is_named() -> None:
    loop, trainer = looped([BAD, GOOD, BAD, BAD, GOOD])
    loop.run(2.0)
    rate = Schedule(1.0, 2).at
    assert trainer.rates == pytest.approx([rate(0), rate(0) / 2, rate(1) / 2, rate(1) / 4, rate(1) / 8])
    loop, _ = looped([BAD] * 4)
    with pytest.raises(ModelError, match=r"nan at step 1 .* \(samples \d, \d, \d, \d\), or give a lower rate"):
        loop.run(2.0)


def test_a_batch_that_exceeds_memory_is_split() -> None:
    loop, trainer = looped([OutOfMemory("full"), OutOfMemory("full"), GOOD, GOOD])
    loop.run(2.0)
    assert trainer.parts == [1, 2, 4, 4]
    loop, _ = looped([OutOfMemory("full")] * 3)
    with pytest.raises(OutOfMemory):
        loop.run(2.0)
