"""Opening data for an analysed model, and synthetic inputs if there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_models import chain, finished, weights

import onnxcop
from onnxcop.analysis.analyze import Analysis
from onnxcop.data.open import input_specs, open_data
from onnxcop.data.options import DataOptions
from onnxcop.data.synthetic import Family, noise, synthetic_data, waves, white
from onnxcop.errors import CalibrationError
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions(provider="cpu", threads=1)
KINDS = {"x": TensorProto.FLOAT, "ids": TensorProto.INT64, "bytes": TensorProto.UINT8, "flags": TensorProto.BOOL}


def mixed() -> onnx.ModelProto:
    """An input of every kind."""
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["h"], "one"),
        *(helper.make_node("Cast", [name], [f"{name}_f"], name, to=TensorProto.FLOAT) for name in list(KINDS)[1:]),
        helper.make_node("Sum", ["h", "ids_f", "bytes_f", "flags_f"], ["s"], "sum"),
        helper.make_node("Gemm", ["s", "w2"], ["y"], "two"),
    ]
    inputs = [helper.make_tensor_value_info(n, k, ["N", 6 if n == "x" else 8]) for n, k in KINDS.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])]
    return finished(helper.make_graph(nodes, "mixed", inputs, outputs, [weights("w1", (6, 8)), weights("w2", (8, 3))]))


def analysed(model: onnx.ModelProto) -> Analysis:
    return onnxcop.analyze(model, options=CPU)


def joined(analysis: Analysis, samples: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    batches = list(synthetic_data(analysis, samples, 8, seed).batches())
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_specs_are_those_of_the_model() -> None:
    specs = {spec.name: spec for spec in input_specs(analysed(mixed()))}
    assert {name: spec.dtype for name, spec in specs.items()} == {
        "x": np.float32, "ids": np.int64, "bytes": np.uint8, "flags": np.bool_,
    }  # fmt: skip
    assert specs["x"].shape == ("N", 6)


def test_initializers_need_not_be_fed() -> None:
    model = chain()
    model.graph.input.append(helper.make_tensor_value_info("b1", TensorProto.FLOAT, [8]))
    assert [spec.name for spec in input_specs(analysed(model))] == ["x"]


def test_no_data_is_none() -> None:
    assert open_data(analysed(chain()), DataOptions(data=None, samples=4, batch_size=2)) is None


def test_data_is_opened_for_the_model(tmp_path: Path) -> None:
    analysis = analysed(chain())
    x = np.random.default_rng(0).standard_normal((10, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    for source in (x, {"x": x}, tmp_path / "data.npz"):
        data = open_data(analysis, DataOptions(data=source, samples=6, batch_size=4))
        assert data is not None
        assert [len(batch["x"]) for batch in data.batches()] == [4, 2]
        assert all((sample == x).all(axis=(1, 2, 3)).any() for b in data.batches() for sample in b["x"])
    with pytest.raises(CalibrationError, match="samples is 0"):
        open_data(analysis, DataOptions(data=x, samples=0, batch_size=4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: 0 * x + 0.5, "each of 16 samples looked at is one number throughout"),
        (lambda x: 0 * x + np.arange(40, dtype=np.float32).reshape(-1, 1, 1, 1), "one number throughout"),
        (lambda x: 0 * x + x[:1], "the 16 samples looked at are all the same"),
        (lambda x: x, ""),
        (lambda x: x[:1], ""),
    ],
    ids=["constant", "constant each", "alike", "good", "one"],
)
def test_uninformative_data_are_detected(change: Any, words: str, caplog: pytest.LogCaptureFixture) -> None:
    x = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    open_data(analysed(chain()), DataOptions(data={"x": change(x)}, samples=40, batch_size=8))
    told = [line for line in caplog.messages if "the calibration data carry no information" in line]
    assert len(told) == bool(words)
    assert all(words in line for line in told)


def test_made_up_inputs_fit_the_model() -> None:
    made = joined(analysed(mixed()), 40)
    assert {name: (value.dtype, value.shape) for name, value in made.items()} == {
        "x": (np.float32, (40, 6)), "ids": (np.int64, (40, 8)), "bytes": (np.uint8, (40, 8)),
        "flags": (np.bool_, (40, 8)),
    }  # fmt: skip
    assert set(made["ids"].ravel()) == {0, 1}  # valid as an index, a type or a mask
    assert made["bytes"].max() > 100
    assert 0.3 < made["flags"].mean() < 0.7
    assert np.isfinite(made["x"]).all()
    assert len(np.unique(made["x"], axis=0)) == 40


def test_made_up_inputs_depend_on_the_seed_alone() -> None:
    analysis = analysed(chain())
    first, again, other = joined(analysis, 12), joined(analysis, 12), joined(analysis, 12, seed=1)
    np.testing.assert_array_equal(first["x"], again["x"])
    assert not np.array_equal(first["x"], other["x"])


@pytest.mark.parametrize("family", [noise, waves])
def test_made_up_pictures_are_smooth(family: Family) -> None:
    model = chain()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 32
    data = synthetic_data(analysed(model), 64, 8, 0, family)
    pictures = np.concatenate([batch["x"] for batch in data.batches()]).astype(np.float64)
    power = (np.abs(np.fft.fft(pictures, axis=-1)) ** 2).mean(axis=(0, 1, 2))
    assert power[1] > 2 * power[4]
    assert power[4] > 2 * power[12]
    left, right = pictures[..., :-1].ravel(), pictures[..., 1:].ravel()
    assert np.corrcoef(left, right)[0, 1] > 0.5
    red, green = pictures[:, 0].ravel(), pictures[:, 1].ravel()
    assert np.corrcoef(red, green)[0, 1] > 0.3
    assert 0.5 < pictures.std() < 2


def test_families_differ() -> None:
    """White noise has the same of every frequency, noise more of the low ones, waves much of a few."""
    model = chain()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 32
    concentration = []
    for family in (white, noise, waves):
        batches = synthetic_data(analysed(model), 64, 8, 0, family).batches()
        pictures = np.concatenate([batch["x"] for batch in batches]).astype(np.float64)
        power = np.abs(np.fft.fft2(pictures - pictures.mean(axis=(2, 3), keepdims=True))) ** 2
        shares = np.sort(power.reshape(*power.shape[:2], -1), axis=-1)
        concentration.append((shares[..., -24:].sum(axis=-1) / shares.sum(axis=-1)).mean())
    assert concentration == sorted(concentration)
    assert concentration[0] < 0.2 and concentration[2] > 0.7
