"""Parts of batches: from shards of the samples, computed anywhere, with the same result."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from executors import AnyOrder, Homes, Mortal
from hypothesis import given
from hypothesis import strategies as st
from small_models import chain, disturbed
from test_distill import ENGINE, samples

import onnxcop
from onnxcop._base.types import Feed
from onnxcop.data.open import open_source
from onnxcop.parallel.crew import Crew
from onnxcop.runtime.session import EngineOptions, KeptSession, OutOfMemory, Session
from onnxcop.training import shards as module
from onnxcop.training.distill import Distilled, DistillOptions, distill
from onnxcop.training.finetune import Finetuned
from onnxcop.training.losses import TARGET, with_loss
from onnxcop.training.samples import PLAIN, ImageView
from onnxcop.training.schedule import Effort
from onnxcop.training.shards import PartOfBatch, Shards, parts_of
from onnxcop.training.step import Optimizer, build_step
from onnxcop.training.steps import Course, PartGradients, ShardedSteps
from onnxcop.training.teacher import Lesson
from onnxcop.training.trainer import Trainer, TrainingState

FLOAT = onnx.TensorProto.FLOAT


@given(st.data())
def test_a_pass_takes_no_sample_twice_and_each_part_from_its_shard(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 300))
    size = data.draw(st.integers(1, count))
    shards = Shards(count, size, data.draw(st.integers(1, min(size, 8))))
    bounds = shards.bounds
    assert bounds[0] == 0 and bounds[-1] == count
    for epoch in (0, 3):
        taken: list[int] = []
        for number in range(epoch * shards.steps, (epoch + 1) * shards.steps):
            parts = shards.batch(number, seed=5)
            assert sum(len(part.indices) for part in parts) == size
            assert sum(part.share for part in parts) == pytest.approx(1.0)
            for part, (start, stop) in zip(parts, pairwise(bounds), strict=True):
                assert part.epoch == epoch and (part.indices < stop - start).all()
                taken += (start + part.indices).tolist()
        assert len(set(taken)) == len(taken) == shards.steps * size


def test_small_batches_and_small_networks_are_not_divided() -> None:
    assert parts_of(64, 1e6) == 1 and parts_of(1, 1e12) == 1
    assert parts_of(64, 1e12) == 8 and parts_of(5, 1e12) == 5 and parts_of(64, 7e7) == 2


def squared(student: onnx.ModelProto) -> onnx.ModelProto:
    """A student with the mean of squared errors as its loss."""
    return with_loss(student, {"y": lambda y, t: ((y - t) * (y - t)).op("ReduceMean", keepdims=0)}, {"y": (FLOAT, 2)})


class Setting:
    """Steps of the small model in parts, and a trainer of whole batches."""

    def __init__(self, parts: int) -> None:
        student = squared(disturbed())
        graph = build_step(student, Optimizer(), input_shapes={"x": (16, 3, 8, 8), TARGET + "y": (16, 5)})
        start = graph.layout.vector(student)
        self.trainer, self.whole = (Trainer(graph, TrainingState.fresh(start), ENGINE) for _ in range(2))
        self.shards, views = Shards(72, 16, parts), [PLAIN, ImageView(mirrored=True)]
        self.course = Course(self.lesson(self.shards, views), samples(), self.shards, 0)
        self.steps = ShardedSteps(self.trainer, self.course, ENGINE)

    def lesson(self, shards: Shards, views: Sequence[ImageView]) -> Lesson:
        """Outputs of the original."""
        return Lesson(KeptSession(chain(), ENGINE), (0.25, 0), views, ("y",), shards=shards)


def test_a_step_in_shards_is_that_of_the_whole_batch() -> None:
    setting = Setting(parts=3)
    whole = setting.lesson(Shards(72, 16), [PLAIN, ImageView(mirrored=True)])
    for number in (0, 1, 4, 5):  # the last two are of the second pass, and so of the other view
        found, places = setting.steps.make(number, 0.01)
        expected = setting.whole.step(whole.feed(PartOfBatch(0, places, number // 4, 1.0), samples()), 0.01)
        assert (found.loss, found.norm) == pytest.approx((expected.loss, expected.norm), rel=1e-5)
    np.testing.assert_allclose(setting.trainer.weights, setting.whole.weights, atol=1e-6)
    assert setting.trainer.steps == 4
    setting.steps.close()


class Small:
    """A session that has memory for three samples."""

    def __init__(self, session: Any) -> None:
        self.session, self.sizes, self.most = session, list[int](), 3

    def run(self, feeds: Feed, outputs: list[str]) -> Feed:
        self.sizes.append(len(feeds["x"]))
        if len(feeds["x"]) > self.most:
            raise OutOfMemory("full")
        return self.session.run(feeds, outputs)  # type: ignore[no-any-return]


def test_a_part_that_exceeds_memory_is_halved_from_then_on() -> None:
    setting = Setting(parts=2)
    gradient = Trainer(setting.trainer._graph, setting.trainer.state, ENGINE).split()
    small = Small(KeptSession(gradient, ENGINE).session)
    narrow, wide = (
        PartGradients(KeptSession(gradient, ENGINE, made=made), setting.course.feeds) for made in (small, None)
    )
    part, weights = PartOfBatch(1, np.arange(8), 0, 0.5), setting.trainer.weights
    for sizes in ([8, 4, 2, 2, 2, 2], [2, 2, 2, 2]):
        (share, loss, slope), (_, expected, other) = (one.of(part, weights, samples()) for one in (narrow, wide))
        assert share == 0.5 and loss == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(slope, other, rtol=1e-4, atol=1e-6)
        assert small.sizes == sizes
        small.sizes.clear()
    small.most = 0
    with pytest.raises(OutOfMemory):
        narrow.of(part, weights, samples())


def distilled(executor: Executor | None, threads: int = 1) -> Distilled:
    options = DistillOptions(effort=Effort(epochs=8), batch_size=16, engine=EngineOptions("cpu", threads))
    return distill(disturbed(), chain(), samples(), options, crew=Crew(executor))


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of any network are divided."""
    monkeypatch.setattr(module, "FEWEST_MACS", 1.0)


class Noted(Homes):
    """Notes the shards of each home."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.shards: set[tuple[int, int]] = set()

    def submit_to(self, home: int, fn: Any, /, *args: Any) -> Any:
        if isinstance(args[1], PartOfBatch):
            self.shards.add((home % self.width, args[1].shard))
        return super().submit_to(home, fn, *args)


@pytest.mark.usefixtures("in_parts")
def test_the_same_bytes_whoever_computes_the_parts() -> None:
    expected = distilled(None)
    assert expected.kept and expected.after.value < 0.5 * expected.before.value
    found = {"two threads": distilled(None, threads=2)}
    with AnyOrder() as shuffled:
        found["in any order"] = distilled(shuffled)
    with ThreadPoolExecutor(3) as pool:
        found["a pool"] = distilled(pool)
    with Noted(3) as homes:
        found["homes"] = distilled(homes)
    with Mortal(2) as processes:
        found["processes that are killed"] = distilled(processes)
    bare = expected.model.SerializeToString()
    assert {name: one.model.SerializeToString() == bare for name, one in found.items()} == dict.fromkeys(found, True)
    assert homes.shards == {(shard % 3, shard) for shard in range(8)}  # each worker reads its shards alone
    assert processes.killed >= 2 and found["homes"].rate == expected.rate


@pytest.mark.usefixtures("in_parts")
def test_samples_that_workers_cannot_pick_by_their_places() -> None:
    """Parts of the samples of a generator."""
    with Session(chain(), ENGINE) as session:
        rng = np.random.default_rng(0)
        source = open_source(
            ({"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(96)), session.inputs,
            samples=96, batch_size=16,
        )  # fmt: skip
    options = DistillOptions(effort=Effort(epochs=2), rate=3e-3, batch_size=16, engine=ENGINE)
    with Homes(2) as homes:
        found = [distill(disturbed(), chain(), source, options, crew=Crew(one)) for one in (None, homes)]
    assert found[0].model.SerializeToString() == found[1].model.SerializeToString()


def test_fine_tuning_on_parts_with_a_teacher(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tuned(threads: int, parts: bool) -> Finetuned:
        monkeypatch.setattr(module, "FEWEST_MACS", 1.0 if parts else 1e12)
        return onnxcop.finetune(
            models_dir / "digits_resnet.onnx", models_dir / "digits_test.npz", epochs=2, rate=1e-4, batch_size=32,
            teacher=models_dir / "digits_resnet.onnx", engine=EngineOptions("cpu", threads),
        )  # fmt: skip

    one, two, whole = tuned(1, True), tuned(3, True), tuned(1, False)
    assert one.model.SerializeToString() == two.model.SerializeToString()
    assert one.history == two.history and one.steps == whole.steps
    assert one.after >= one.before and one.history != whole.history  # the order of samples is another one
