"""Vocabularies trimmed to what texts use: the same tokens, the same outputs, files that fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_models import finished, weights

from onnxcop.cli import main as cli
from onnxcop.runtime.session import EngineOptions, Session

CPU = EngineOptions(provider="cpu", threads=1)
TEXTS = ["a small cat sat", "the cats sat on a mat", "smaller mats"]
OTHERS = "dogs and birds were flying over high mountains; zebras"
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")


def _trained(kind: str) -> Any:
    """A tokenizer of a kind, trained on more than the texts."""
    models, trainers, special = tokenizers.models, tokenizers.trainers, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    common: dict[str, Any] = {"vocab_size": 160, "special_tokens": special, "show_progress": False}
    made = {
        "WordPiece": lambda: (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(**common)),
        "WordLevel": lambda: (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(**common)),
        "BPE": lambda: (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(**common)),
        "Unigram": lambda: (models.Unigram(), trainers.UnigramTrainer(unk_token="[UNK]", **common)),
    }
    model, trainer = made[kind]()
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([OTHERS, *TEXTS], trainer)
    pairs = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pairs)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
    return tokenizer


def _encoder(tokens: int, *, tied: bool = False, argmax: bool = False) -> onnx.ModelProto:
    """Embeddings of tokens, averaged under the mask, and two linear layers."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "ids"], ["rows"], "words"),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["weights"]),
        helper.make_node("Mul", ["rows", "weights"], ["seen"]),
        helper.make_node("ReduceMean", ["seen"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Gemm", ["mean", "w1"], ["h"], "one", transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2"], ["y"], "two", transB=1),
    ]
    stored = [weights("table", (tokens, 8)), weights("w1", (12, 8)), weights("w2", (4, 12))]
    stored.append(onnx.numpy_helper.from_array(np.array([2], np.int64), "last"))
    value = helper.make_tensor_value_info
    outputs = [value("y", TensorProto.FLOAT, ["N", 4])]
    if tied:
        nodes.append(helper.make_node("Gemm", ["mean", "table"], ["words"], "head", transB=1))
        outputs.append(value("words", TensorProto.FLOAT, ["N", tokens]))
    if argmax:
        nodes.append(helper.make_node("ReduceMax", ["input_ids"], ["end"], "end", axes=[1]))
        outputs.append(value("end", TensorProto.INT64, ["N", 1]))
    inputs = [value(name, TensorProto.INT64, ["N", "S"]) for name in ("input_ids", "attention_mask")]
    return finished(helper.make_graph(nodes, "encoder", inputs, outputs, stored))


def _folder(tmp_path: Path, kind: str, **model: bool) -> Path:
    tokenizer, home = _trained(kind), tmp_path / "model"
    home.mkdir()
    tokenizer.save(str(home / "tokenizer.json"))
    count = tokenizer.get_vocab_size()
    if kind == "WordPiece":
        words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        (home / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    (home / "config.json").write_text(json.dumps({"vocab_size": count, "pad_token_id": 0, "hidden_size": 8}))
    (home / "model.onnx").write_bytes(_encoder(count, **model).SerializeToString())
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return home


def _outputs(home: Path) -> np.ndarray[Any, Any]:
    found = tokenizers.Tokenizer.from_file(str(home / "tokenizer.json")).encode_batch(TEXTS)
    feeds = {
        "input_ids": np.array([text.ids for text in found], np.int64),
        "attention_mask": np.array([text.attention_mask for text in found], np.int64),
    }
    with Session(home / "model.onnx", CPU) as session:
        return session.run(feeds)["y"]


def _command(home: Path, tmp_path: Path) -> list[str]:
    texts, small = str(tmp_path / "texts.txt"), f"{tmp_path}/small/"
    return ["trim-vocab", str(home / "model.onnx"), "--vocab-from", texts, "-o", small, "--provider", "cpu"]


def test_tokens_of_the_padding_and_of_the_configuration_stay(tmp_path: Path) -> None:
    """Also if no text uses them and the tokenizer does not list them as special."""
    home = _folder(tmp_path, "WordLevel")
    words = {
        word: number for number, word in enumerate(["[UNK]", "never", "[PAD]", "[END]", *"a small cat sat".split()])
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(pad_id=2, pad_token="[PAD]")
    tokenizer.save(str(home / "tokenizer.json"))
    (home / "config.json").write_text(json.dumps({"vocab_size": len(words), "eos_token_id": 3, "bos_token_id": None}))
    (home / "model.onnx").write_bytes(_encoder(len(words)).SerializeToString())
    (tmp_path / "texts.txt").write_text("a small cat\ncat sat")
    assert cli.run(_command(home, tmp_path)) == 0
    document = json.loads((tmp_path / "small" / "tokenizer.json").read_text())
    assert document["model"]["vocab"] == {"[UNK]": 0, "[PAD]": 1, "[END]": 2, "a": 3, "small": 4, "cat": 5, "sat": 6}
    assert document["padding"]["pad_id"] == 1
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config == {"vocab_size": 7, "eos_token_id": 2, "bos_token_id": None}


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel", "BPE", "Unigram"])
def test_texts_keep_their_outputs(kind: str, tmp_path: Path) -> None:
    home, small = _folder(tmp_path, kind), tmp_path / "small"
    assert cli.run(_command(home, tmp_path)) == 0
    np.testing.assert_allclose(_outputs(small), _outputs(home), rtol=1e-5, atol=1e-6)
    rows = {one.name: one.dims[0] for one in onnx.load(small / "model.onnx").graph.initializer}["table"]
    tokenizer = tokenizers.Tokenizer.from_file(str(small / "tokenizer.json"))
    before = tokenizers.Tokenizer.from_file(str(home / "tokenizer.json"))
    assert rows == tokenizer.get_vocab_size() < before.get_vocab_size()
    config = json.loads((small / "config.json").read_text())
    assert config == {"vocab_size": rows, "pad_token_id": tokenizer.token_to_id("[PAD]"), "hidden_size": 8}
    for text in TEXTS:
        assert tokenizer.encode(text).tokens == before.encode(text).tokens
    if kind == "WordPiece":
        assert (small / "vocab.txt").read_text().splitlines() == sorted(
            tokenizer.get_vocab(), key=tokenizer.get_vocab().get
        )


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"tied": True}, "the table 'table' is read by Gemm head too"),
        ({"argmax": True}, "token numbers reach ReduceMax end"),
    ],
)
def test_what_cannot_be_trimmed_is_said(
    model: dict[str, bool], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = _folder(tmp_path, "WordLevel", **model)
    assert cli.run(_command(home, tmp_path)) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
