"""Calibration data at URLs."""

import gc
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_models import chain

import onnxcop
from onnxcop.data.open import open_source
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec

INPUT = [InputSpec("x", np.dtype(np.float32), ("n", 3, 8, 8))]


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def memory() -> Any:
    """A file system in memory."""
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_images_are_read_one_by_one(tmp_path: Path, memory: Any) -> None:
    for seed in range(5):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
        memory.pipe(f"/images/deep/{seed}.png", png(seed))
    memory.pipe("/images/.hidden.png", b"")
    one, other = (open_source(at, INPUT, samples=5) for at in (str(tmp_path), "memory://images"))
    assert (one.count, other.count) == (5, 5)
    for mine, theirs in zip(one.batches(), other.batches(), strict=True):
        np.testing.assert_array_equal(mine["x"], theirs["x"])
    assert next(pickle.loads(pickle.dumps(other)).batches())["x"].shape == (5, 3, 8, 8)


def test_arrays_are_copied_and_give_the_same_result(tmp_path: Path, memory: Any) -> None:
    data = np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32)
    for place in range(2):
        np.savez(tmp_path / f"{place}.npz", data[12 * place : 12 * place + 12])
        memory.pipe(f"/arrays/{place}.npz", (tmp_path / f"{place}.npz").read_bytes())
    results = [
        onnxcop.prune(chain(), data=at, macs=0.6, criterion="cop", recover="none").model.SerializeToString()
        for at in (str(tmp_path), "memory://arrays", tmp_path.as_uri())
    ]
    assert results[0] == results[1] == results[2]


def test_another_machine_makes_its_own_copies(memory: Any) -> None:
    data = io.BytesIO()
    np.savez(data, np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32))
    memory.pipe("/arrays/0.npz", data.getvalue())
    source = open_source("memory://arrays", INPUT, samples=6)
    expected = next(source.batches())["x"]
    packed = pickle.dumps(source)
    again = pickle.loads(packed)  # on this machine, from the same copies
    memory.store.clear()
    np.testing.assert_array_equal(next(again.batches())["x"], expected)
    memory.pipe("/arrays/0.npz", data.getvalue())
    del source, again
    gc.collect()  # with the copies
    np.testing.assert_array_equal(next(pickle.loads(packed).batches())["x"], expected)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://nowhere", "nothing is there"),
        ("memory://texts", "it holds no images"),
        ("memory://mixed", "it holds 1 images and 1 other files"),
        ("memory://bad", "this image cannot be read"),
        ("nonsense://bucket/x", "it cannot be listed"),
    ],
)
def test_what_cannot_be_read_is_named(memory: Any, url: str, said: str) -> None:
    memory.pipe("/texts/a.txt", b"a")
    memory.pipe("/mixed/a.png", b"a")
    memory.pipe("/mixed/a.npz", b"a")
    memory.pipe("/bad/a.png", b"a")
    with pytest.raises(CalibrationError, match=said):
        list(open_source(url, INPUT).batches())


def test_without_fsspec_the_extra_is_named(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(CalibrationError, match=r"install onnxcop\[remote\]"):
        open_source("s3://bucket/images", INPUT)
