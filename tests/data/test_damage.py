"""Damage that a fuzzer found: readers answer it with an error of one line."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import chain, written_with_data

from onnxcop.data.arrays import NpyFile, NpzFile
from onnxcop.errors import CalibrationError, ModelError
from onnxcop.graph import io as models

_CUT_HEADER = (
    "k05VTVBZAQB2AHsnZGVzY3InOiAnPGY0JywgJ2ZvcnRyYW5fb3JkZXInOiBGYWxzZSwgJ3NoYXBlJzogKDIsIDMpLCB9ICAgICAgICAgICA"
)


def test_a_header_that_is_no_literal(tmp_path: Path) -> None:
    header = base64.b64decode(_CUT_HEADER + "=" * (-len(_CUT_HEADER) % 4))
    (tmp_path / "a.npy").write_bytes(header.ljust(10 + 0x76, b"{"))
    with pytest.raises(CalibrationError, match=r"a\.npy: this array file cannot be read"):
        NpyFile(tmp_path / "a.npy").outline()


def test_an_archive_whose_compressed_bytes_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).standard_normal(4096))
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(1800)
    path.write_bytes(bytes(content))
    array_file = NpzFile(path)
    with pytest.raises(CalibrationError, match=r"a\.npz: this array file cannot be read"):
        array_file.load(array_file.outline())


def test_the_place_of_weights_that_is_no_text(tmp_path: Path) -> None:
    path = written_with_data(chain(), tmp_path / "net.onnx", "net.data")
    content = path.read_bytes()
    assert b"net.data" in content
    path.write_bytes(content.replace(b"net.data", b"\xff\xfft.data"))
    with pytest.raises(ModelError, match="is not UTF-8 text"):
        models.load(path)
    assert onnx.load(tmp_path / "net.onnx", load_external_data=False).graph.node
