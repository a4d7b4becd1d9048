"""The network that recovery measures computes what the written file computes, whatever is removed from what."""

from __future__ import annotations

from pathlib import Path

import body_models
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ops.builder import Builder
from ops.oracle import CPU, draw_units, embedded
from ops.test_rules import CASES
from test_exports import EXPORTS
from test_random_graphs import _networks
from test_transformers import WRITTEN_OUT

import onnxcop
from onnxcop._base.types import Feed
from onnxcop.allocation.sensitivity import choose_ridges
from onnxcop.analysis.analyze import Analysis
from onnxcop.data.synthetic import synthetic_data
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.recovery.rounds import Recovery, RecoverySettings
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.segments import PartialExecutor
from onnxcop.runtime.session import Session
from onnxcop.verification.difference import relative_difference, tolerance

FEW = settings(
    deadline=None,
    derandomize=True,
    max_examples=2,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def gap(expected: Feed, found: Feed) -> float:
    worst = 0.0
    for name, values in expected.items():
        difference = relative_difference(values, found[name])
        if difference is not None:
            worst = max(worst, difference / tolerance(np.asarray(values)))
    return worst


def check(working: MaskedNetwork, feeds: Feed) -> None:
    """Whole and in pieces, the network computes what is written of it."""
    written = apply(working.model, working.analysis.structure, working.removed())
    expected = Session(written, CPU, optimize=False).run(feeds)
    assert gap(expected, Session(working.masked(), CPU, optimize=False).run(feeds)) < 1
    executor = PartialExecutor(working.partition, [feeds], CPU)
    for cut in range(0, working.partition.count, max(1, working.partition.count // 3)):
        executor.advance(cut)
    assert gap(expected, executor.finish()[0]) < 1


@pytest.mark.parametrize("key", sorted(CASES), ids="".join)
@FEW
@given(data=st.data())
def test_every_rule(key: tuple[str, str], data: st.DataObject) -> None:
    sample = data.draw(CASES[key])
    analysis = onnxcop.analyze(embedded(sample), options=CPU)
    seed = data.draw(st.integers(0, 99))
    for fraction in (0.4, 1.0):
        removed = draw_units(analysis.structure, fraction, seed)
        working = MaskedNetwork.of(analysis)
        working.alive[removed] = False
        check(working, random_feeds(analysis.model, analysis.input_shapes, seed))


def recovering(analysis: Analysis, seed: int) -> Recovery:
    """A network on synthetic inputs."""
    data = synthetic_data(analysis, 12, 4, seed)
    fit, held_out = data.split(0.5, seed)
    return Recovery(analysis, fit, held_out, CPU, RecoverySettings(refine_samples=8))


@settings(FEW, max_examples=25)
@given(network=_networks(), seed=st.integers(0, 99))
def test_random_networks_through_recovery(network: tuple[Builder, list[str]], seed: int) -> None:
    b, outputs = network
    recovery = recovering(onnxcop.analyze(b.model(outputs), options=CPU, biases=True), seed)
    feeds = recovery.held_out_feeds[0]
    removed = draw_units(recovery.analysis.structure, 0.5, seed)
    samples = recovery.statistics()
    recovery.cut(removed, samples, choose_ridges(recovery.working, samples))
    check(recovery.working, feeds)
    recovery.refine()
    check(recovery.working, feeds)
    recovery.statistics()


def check_removals(model: onnx.ModelProto, policy: str = "finest") -> None:
    """Check some removals, and that nodes without removed units have no replacement."""
    analysis = onnxcop.analyze(model, options=CPU, biases=True, policy=policy)
    feeds = random_feeds(analysis.model, analysis.input_shapes, 5)
    assert MaskedNetwork.of(analysis).masked() == analysis.model
    for fraction, seed in ((0.3, 0), (0.7, 1)):
        working = MaskedNetwork.of(analysis)
        working.alive[draw_units(analysis.structure, fraction, seed)] = False
        check(working, feeds)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["branches", "loop", "scan", "nested"])
def test_bodies(name: str, inside: bool) -> None:
    check_removals(body_models.model(name, inside=inside))


@pytest.mark.parametrize("policy", ["finest", "coarsest"])
@pytest.mark.parametrize("path", sorted(EXPORTS.glob("*.onnx")), ids=lambda path: path.stem)
def test_exports(path: Path, policy: str) -> None:
    check_removals(onnx.load(path), policy)


@pytest.mark.parametrize("policy", ["finest", "coarsest"])
@pytest.mark.parametrize("name", sorted(WRITTEN_OUT))
def test_transformers(name: str, policy: str) -> None:
    check_removals(WRITTEN_OUT[name][0](), policy)
