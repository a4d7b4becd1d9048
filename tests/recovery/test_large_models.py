"""Networks that are large keep their weights in one file while they recover, and give what small ones give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_models import chain
from transformer_models import bert

import onnxcop
from onnxcop.calibration.calibrate import gather_statistics
from onnxcop.calibration.spilled import ChangedMoments, SpilledMoments
from onnxcop.calibration.statistics import Moments
from onnxcop.data.open import open_data
from onnxcop.data.options import DataOptions
from onnxcop.graph.io import WeightFile, inlined, values_of, whole
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.recovery.rounds import RecoverySettings

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
QUICK = RecoverySettings(rounds=1, held_out_samples=16, refine_samples=32, curve_passes=2, sharper_passes=1)


def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any network a large one."""
    monkeypatch.setattr("onnxcop.runtime.segments.LARGEST_COPIED", 0)
    monkeypatch.setattr("onnxcop.verification.verify.LARGEST_COPIED", 0)
    monkeypatch.setattr("onnxcop.calibration.calibrate.TOGETHER", 20_000)
    monkeypatch.setattr("onnxcop.calibration.calibrate.LARGEST_HELD", 20_000)
    monkeypatch.setattr("onnxcop.graph.io._SMALL", 64)


@pytest.mark.parametrize("options", [{"criterion": "l2"}, {"settings": QUICK}, {"recover": "merge", "settings": QUICK}])
@pytest.mark.parametrize("make", [chain, bert])
def test_large_networks_recover_as_small_ones_do(
    make: Any, options: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for large in (False, True):
        if large:
            limits(monkeypatch)
        result = onnxcop.prune(make(), macs=0.6, options=CPU, **options)
        assert WeightFile.of(result.model) is None
        found[large] = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    assert found[True].keys() == found[False].keys()
    for name, values in found[False].items():
        np.testing.assert_allclose(found[True][name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_copies_of_a_large_network_hold_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain()
    analysis = onnxcop.analyze(model, options=CPU, biases=True)
    limits(monkeypatch)
    original = MaskedNetwork.sharing(analysis)
    working = original.copy()
    layer = next(layer for layer in working.layers if working.is_open(layer))
    name = working.nodes[layer.node].input[layer.kernel.input]
    before = original.read(name)
    working.write(name, 2 * before)
    other = working.copy()
    working.write(name, 3 * before)
    for network, factor in ((original, 1), (other, 2), (working, 3)):
        np.testing.assert_array_equal(network.read(name), factor * before)
        np.testing.assert_array_equal(
            values_of(next(t for t in network.model.graph.initializer if t.name == name)), factor * before
        )
    assert original.model is analysis.model
    assert all(network.model.ByteSize() < analysis.model.ByteSize() / 2 for network in (other, working))
    assert WeightFile.of(other.model) is WeightFile.of(working.model) is not None
    full = whole(other.model)
    assert all(t.data_location != onnx.TensorProto.EXTERNAL for t in full.graph.initializer)
    assert whole(full) is full
    tensor = full.graph.initializer[0]
    assert inlined(tensor) is tensor


def test_statistics_in_several_passes_are_the_same(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = onnxcop.analyze(models_dir / "digits_resnet.onnx", options=CPU)
    data = open_data(analysis, DataOptions(data=models_dir / "digits_calib.npz", samples=40))
    assert data is not None
    reports: list[tuple[str, int, int]] = []
    once = gather_statistics(analysis, data, CPU)
    monkeypatch.setattr("onnxcop.calibration.calibrate.TOGETHER", 20_000)
    monkeypatch.setattr("onnxcop.calibration.calibrate.LARGEST_HELD", 20_000)
    parts = gather_statistics(analysis, data, CPU, lambda *report: reports.append(report))
    assert not isinstance(once.taps, SpilledMoments)
    assert isinstance(parts.taps, SpilledMoments)
    assert parts.equals(once)
    done = [entry[1] for entry in reports]
    assert done == sorted(done)
    assert done[-1] == reports[-1][2] > 40  # samples over all passes


def test_moments_are_changed_and_left_out_without_reading_the_others() -> None:
    class Unread(SpilledMoments):
        def __getitem__(self, key: str) -> Moments:
            raise AssertionError(key)

    base = Unread()
    moments = [Moments(float(n), np.full(3, n, np.float64), np.eye(3) * n) for n in range(4)]
    for name, entry in zip("abc", moments, strict=False):
        base[name] = entry
    changed = ChangedMoments(base, {"b": moments[3], "d": moments[0]}, frozenset({"c"}))
    assert list(changed) == ["a", "b", "d"]
    assert len(changed) == 3
    assert changed["b"] is moments[3]
    assert changed["d"] is moments[0]
    for name in ("c", "e"):
        assert name not in changed
        with pytest.raises(KeyError):
            changed[name]
    read = SpilledMoments.__getitem__(base, "c")
    assert read.count == 2
    np.testing.assert_array_equal(read.mean, moments[2].mean)
    np.testing.assert_array_equal(read.scatter, moments[2].scatter)
