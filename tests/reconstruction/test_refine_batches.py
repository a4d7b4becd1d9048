"""Refinement on workers: the same bytes as in one process, whatever happens to the workers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
from executors import Homes
from onnx import TensorProto, helper
from small_models import finished, weights

import onnxcop
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.reconstruction import refine
from onnxcop.reconstruction.divergence import HeldOut, Reference
from onnxcop.reconstruction.network import MaskedNetwork, NetworkChange
from onnxcop.reconstruction.normal_equations import FittedLayer
from onnxcop.reconstruction.refine import FitStep, Refined, Refiner, RefineSet
from onnxcop.reconstruction.spread import ChangedWeights, RefinePass, Step, Tried, Visit, score_batch, visit_batch
from onnxcop.runtime.segments import PartialExecutor
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions(provider="cpu", threads=1)
SIZES = (8, 8, 5)  # the last batch of each set is smaller, as that of a data set


def mixed() -> Any:
    """Two branches of convolutions that are added, of which only one changes, and a matrix product."""
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["stem"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["stem"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], "deep", pads=[1, 1, 1, 1], group=2),
        helper.make_node("Conv", ["x", "w2", "b2"], ["c2"], "side", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c1", "c2"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["r1"]),
        helper.make_node("GlobalAveragePool", ["r1"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["y"], "head"),
    ]
    sizes = {"w0": (6, 3, 3, 3), "b0": (6,), "w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 3, 3, 3), "b2": (6,),
             "w3": (6, 4), "b3": (4,)}  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 9, 9])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])]
    return finished(helper.make_graph(nodes, "g", inputs, outputs, [weights(n, s) for n, s in sizes.items()]))


def pictures(seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(size, 3, 9, 9)).astype(np.float32)} for size in SIZES]


def refined(executor: Any = None, *, again: bool = False) -> tuple[bytes, Refined]:
    """The bytes of a disturbed network after refinement, `again` on all samples if wanted, and what was kept."""
    original = MaskedNetwork.of(onnxcop.analyze(mixed(), options=CPU))
    working = original.copy()
    rng = np.random.default_rng(0)
    for name in ("w0", "b0", "w2", "w3", "b3"):
        values = working.read(name)
        working.write(name, values + 0.5 * rng.normal(size=values.shape).astype(np.float32))
    judge = pictures(200)
    reference = Reference(PartialExecutor(original.partition, judge, CPU).finish())
    crew = HERE if executor is None else Crew(executor)
    shared = None if executor is None else (crew.share(original), crew.share(HeldOut(judge, reference)))
    samples = RefineSet([*pictures(100), *pictures(101)], judge, reference)
    result = Refiner(original, working, samples, CPU, 0, crew, shared).run()
    if again:
        Refiner(original, working, samples, CPU, 0, crew, shared).repeat(result.steps)
    return working.model.SerializeToString(), result


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "_PER_SAMPLE", 10)  # so that positions are drawn
    monkeypatch.setattr(refine, "_ROWS_PER_FEATURE", 1)
    monkeypatch.setattr(refine, "_MOST_ROWS", 400)  # and some batches lag behind


@pytest.mark.parametrize("width", [1, 2, 3, 6, 9])  # from 6 on candidates are judged side by side
def test_workers_refine_to_the_same_bytes(width: int) -> None:
    expected, result = refined()
    assert result.tried >= 3 and len(result.steps) >= 2
    with Homes(width) as homes:
        assert refined(homes) == (expected, result)
    assert all(homes.tasks_of)


@pytest.mark.parametrize("width", [1, 2, 3, 6, 9])
def test_workers_fit_once_more_to_the_same_bytes(width: int) -> None:
    expected = refined(again=True)
    assert expected[0] != refined()[0]
    with Homes(width) as homes:
        assert refined(homes, again=True) == expected


@pytest.mark.parametrize("lost", [lambda n: n % 4 == 0, lambda n: n in (1, 2, 3), lambda n: n > 25])
def test_a_lost_worker_changes_nothing(lost: Callable[[int], bool]) -> None:
    expected = refined()
    with Homes(3, lost) as homes:
        assert refined(homes) == expected
    assert homes.given > 25


def test_weights_that_do_not_help_are_not_kept_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(layer: FittedLayer, *_: object) -> Any:
        yield FitStep(), (-30 * layer.weights, layer.bias)
        yield FitStep(), (50 * layer.weights, layer.bias)

    monkeypatch.setattr(refine, "candidates", worse)
    expected, result = refined()
    assert result.tried >= 3 and not result.steps
    scored = []
    for width in (1, 2, 6):
        with Scored(width) as homes:
            assert refined(homes) == (expected, result)
        scored.append(homes.scored)
    assert scored[0] < len(SIZES) * (1 + 2 * result.tried)  # some lose before their last batch
    assert scored[0] <= scored[1] <= scored[2] <= len(SIZES) * (1 + 2 * result.tried)


@pytest.mark.parametrize("width", [1, 3])  # candidates are judged one after the other
def test_half_of_a_step_that_clearly_lost_is_neither_tried_nor_packed(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    found, share = refine.candidates, Crew.share
    packed: list[Tried] = []

    def first_worse(layer: FittedLayer, *rows: Any) -> Any:
        yield FitStep(), (-30 * layer.weights, layer.bias)
        yield FitStep(share=0.5), (-15 * layer.weights, layer.bias)
        yield from islice(found(layer, *rows), 1)

    def noted(crew: Crew, value: Any, **settings: Any) -> Any:
        if isinstance(value, Tried):
            packed.append(value)
        return share(crew, value, **settings)

    monkeypatch.setattr(refine, "candidates", first_worse)
    monkeypatch.setattr(Crew, "share", noted)
    expected, result = refined()
    assert len(result.steps) >= 2 and not packed
    with Homes(width) as homes:
        assert refined(homes) == (expected, result)
    assert len(packed) == 1 + 2 * result.tried  # the first for the network as it was


class Scored(Homes):
    """Counts batches that are scored."""

    scored = 0

    def submit_to(self, home: int, fn: Any, /, *args: Any) -> Any:
        self.scored += args[0] is score_batch
        return super().submit_to(home, fn, *args)


def test_a_worker_says_whether_it_has_a_batch() -> None:
    original = MaskedNetwork.of(onnxcop.analyze(mixed(), options=CPU))
    feeds = pictures(200)
    held = HeldOut(feeds, Reference(PartialExecutor(original.partition, feeds, CPU).finish()))
    state = RefinePass(0, NetworkChange((), original.alive), CPU, len(feeds))
    news = ChangedWeights()

    def visited(visit: Visit) -> Any:
        return visit_batch(visit, original, held, state, news)

    sizes: dict[str, tuple[int | None, ...]] = {"x": (None, 3, 9, 9)}
    step = Step(2, (sizes, sizes))
    assert visited(Visit(1, 1)) is None  # never seen
    assert visited(Visit(1, 0, (step,))).shapes[0].keys() == {"x", "r0"}
    assert visited(Visit(1, 1)) is not None
    assert visited(Visit(1, 2)) is None  # it is not that far
    assert visited(Visit(0, 1)) is None  # another one
    assert visited(Visit(1, 0)) is not None  # and back to the start
    assert visited(Visit(1, 1)) is None
