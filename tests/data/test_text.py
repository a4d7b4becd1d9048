"""Texts as data, by the tokenizer of a model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from onnxcop.data.open import open_source
from onnxcop.data.text import TextData, with_tokenizer
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec

INT = np.dtype(np.int64)
IDS, MASK = InputSpec("input_ids", INT, ("N", "S")), InputSpec("attention_mask", INT, ("N", "S"))


@pytest.fixture
def texts(tmp_path: Path) -> TextData:
    """Three texts, and a tokenizer of words."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = {"[PAD]": 0, "[UNK]": 1, "one": 2, "two": 3, "three": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "texts.txt"
    path.write_text("one two\n\n  three\nfour one two three\n", encoding="utf-8")
    return TextData(path, tmp_path)


def test_texts_become_what_the_model_reads(texts: TextData) -> None:
    kinds = InputSpec("token_type_ids", INT, ("N", "S")), InputSpec("position_ids", INT, ("N", "S"))
    found = texts.arrays([IDS, MASK, *kinds])
    assert found["input_ids"].tolist() == [[2, 3, 0, 0], [4, 0, 0, 0], [1, 2, 3, 4]]
    assert found["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert found["token_type_ids"].tolist() == [[0] * 4] * 3 and found["position_ids"][1].tolist() == [0, 1, 2, 3]
    assert all(array.dtype == np.int64 for array in found.values())


def test_the_length_is_that_of_the_model_or_of_its_tokenizer(texts: TextData) -> None:
    assert texts.arrays([InputSpec("input_ids", np.dtype(np.int32), ("N", 3))])["input_ids"].shape == (3, 3)
    (texts.tokenizer / "tokenizer_config.json").write_text('{"model_max_length": 2}')
    assert texts.arrays([IDS])["input_ids"].shape == (3, 2)


def test_texts_are_opened_as_samples(texts: TextData) -> None:
    source = open_source(with_tokenizer(str(texts.path), texts.tokenizer), [IDS, MASK], samples=3, batch_size=2)
    assert source.count == 3 and str(texts.path) in source.description
    assert [feed["input_ids"].shape for feed in source.batches()] == [(2, 4), (1, 4)]


def test_what_cannot_be_read_says_what_to_give(texts: TextData, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="give --tokenizer DIR"):
        with_tokenizer("some.txt", None)
    with pytest.raises(CalibrationError, match=r"give --data FILE\.txt"):
        with_tokenizer("some.npz", texts.tokenizer)
    assert with_tokenizer("some.npz", None) == "some.npz"
    with pytest.raises(CalibrationError, match="but the model reads pixels"):
        texts.arrays([InputSpec("pixels", INT, ("N", 3))])
    with pytest.raises(CalibrationError, match="does not exist; give the folder"):
        TextData(texts.path, texts.path.parent / "none").arrays([IDS])
    (texts.tokenizer / "bad.json").write_text("{")
    with pytest.raises(CalibrationError, match="is not a tokenizer"):
        TextData(texts.path, texts.tokenizer / "bad.json").arrays([IDS])
    with pytest.raises(CalibrationError, match="texts cannot be read"):
        TextData(texts.path.parent / "none.txt", texts.tokenizer).arrays([IDS])
    texts.path.write_text("\n \n")
    with pytest.raises(CalibrationError, match="it holds no texts"):
        texts.arrays([IDS])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CalibrationError, match="pip install 'onnxcop\\[text\\]'"):
        texts.arrays([IDS])
