"""The part of a tokenizer that some texts need: its vocabulary, with new token numbers.

Supports WordPiece, WordLevel, Unigram and BPE of Hugging Face's `tokenizer.json`. The texts get the same tokens as
before: a longest match, a best path and a lowest merge do not change if only unused entries are removed. Tokens of
single ASCII characters, a BPE's alphabet, bytes and special tokens also stay, so that other texts can still be spelled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcop._base.documents import json_table
from onnxcop._base.types import IntArray
from onnxcop.data.text import TextData
from onnxcop.errors import CalibrationError

_SETTINGS = ("tokenizer_config.json", "config.json", "generation_config.json")
_KINDS = ("WordPiece", "WordLevel", "Unigram", "BPE")
_MARKS = "▁Ġ"  # stands for a blank before a word


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer with fewer tokens.

    Attributes:
        kept: int64 [tokens], the old number of every token that stays, ascending; its position is the new number.
        count: Number of tokens before.
        files: The files of the tokenizer, rewritten, by name.
    """

    kept: IntArray
    count: int
    files: Mapping[str, bytes]

    def renumbered(self, old: int) -> int | None:
        """The new number of a token; None if it is removed."""
        place = int(np.searchsorted(self.kept, old))
        return place if place < len(self.kept) and self.kept[place] == old else None


def trimmed_vocabulary(texts: TextData) -> Vocabulary:
    """The vocabulary that texts need.

    Args:
        texts: A file of texts, and the tokenizer.

    Raises:
        CalibrationError: A file cannot be read, or the tokenizer is of another kind.
    """
    tokenizer = texts.loaded()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lines = texts.texts()
    used = {number for text in tokenizer.encode_batch(lines) for number in text.ids}
    document = json.loads(texts.file().read_text(encoding="utf-8"))
    model = document["model"]
    if model.get("type") not in _KINDS:
        raise CalibrationError(
            f"{texts.file()}: a vocabulary of kind {model.get('type')} cannot be trimmed; known are {', '.join(_KINDS)}"
        )
    pieces = _pieces(model)
    added = {entry["id"]: entry["content"] for entry in document.get("added_tokens", ())}
    named = dict(_numbers_named(document.get("post_processor")))
    used |= set(added) | set(named) | set(_numbers_in_settings(document, texts.file().parent))
    used |= {number for piece, number in pieces.items() if _always(piece, model)}
    if model["type"] == "BPE":
        used |= _alphabet(model, pieces)
        used = _with_parts(used, model, pieces)
    kept = np.array(sorted(used), dtype=np.int64)
    vocabulary = Vocabulary(kept, max([*pieces.values(), *added], default=-1) + 1, {})
    files = _files(document, vocabulary, texts.file().parent)
    result = Vocabulary(vocabulary.kept, vocabulary.count, files)
    _check(result, lines, tokenizer, texts)
    return result


def _check(vocabulary: Vocabulary, lines: list[str], tokenizer: Any, texts: TextData) -> None:
    """Check that the texts have the same tokens, under their new numbers."""
    after = type(tokenizer).from_str(vocabulary.files["tokenizer.json"].decode())
    after.no_truncation()
    after.no_padding()
    for one, other in zip(tokenizer.encode_batch(lines), after.encode_batch(lines), strict=True):
        if [vocabulary.renumbered(number) for number in one.ids] != other.ids:
            raise CalibrationError(f"{texts.file()}: with fewer tokens the texts are cut otherwise; keep all tokens")


def _pieces(model: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def _always(piece: str, model: Mapping[str, Any]) -> bool:
    """Whether a token stays even if no text uses it."""
    prefix = model.get("continuing_subword_prefix") or ""
    bare = piece.removeprefix(prefix).lstrip(_MARKS)
    byte = piece.startswith("<0x") and piece.endswith(">")
    return byte or piece == model.get("unk_token") or not bare or (len(bare) == 1 and bare.isascii())


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[Any, str, str]]:
    for entry in model.get("merges", ()):
        left, right = entry.split(" ", 1) if isinstance(entry, str) else entry
        yield entry, left, right


def _joined(left: str, right: str, model: Mapping[str, Any]) -> str:
    prefix = model.get("continuing_subword_prefix") or ""
    return left + right.removeprefix(prefix)


def _alphabet(model: Mapping[str, Any], pieces: Mapping[str, int]) -> set[int]:
    """Tokens that no merge makes."""
    made = {_joined(left, right, model) for _, left, right in _merges(model)}
    return {number for piece, number in pieces.items() if piece not in made}


def _with_parts(used: set[int], model: Mapping[str, Any], pieces: Mapping[str, int]) -> set[int]:
    """Tokens with all tokens that they are merged from."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for _, left, right in _merges(model):
        parts.setdefault(_joined(left, right, model), []).append((left, right))
    pieces_used = {piece for piece, number in pieces.items() if number in used}
    waiting = list(pieces_used)
    while waiting:
        for pair in parts.get(waiting.pop(), ()):
            waiting += [part for part in pair if part not in pieces_used]
            pieces_used.update(pair)
    return used | {pieces[piece] for piece in pieces_used if piece in pieces}


def _numbers_named(processor: Any) -> Iterator[tuple[int, str]]:
    """Token numbers in the sections after the model, at any depth."""
    if isinstance(processor, Mapping):
        for key, value in processor.items():
            if key == "ids" and isinstance(value, list):
                yield from ((number, key) for number in value)
            elif key in ("sep", "cls") and isinstance(value, list):
                yield value[1], key
            else:
                yield from _numbers_named(value)
    elif isinstance(processor, list):
        for entry in processor:
            yield from _numbers_named(entry)


def _numbers_in_settings(document: Mapping[str, Any], folder: Path) -> Iterator[int]:
    """Token numbers of the padding, and of special tokens in the configuration, whether or not a text uses them."""
    padding = document.get("padding")
    if isinstance(padding, Mapping) and isinstance(padding.get("pad_id"), int):
        yield padding["pad_id"]
    for name in _SETTINGS:
        for key, value in (json_table(folder / name) or {}).items():
            if key.endswith("token_id") and isinstance(value, int):
                yield value


def _renamed(processor: Any, vocabulary: Vocabulary) -> Any:
    if isinstance(processor, Mapping):
        result = {}
        for key, value in processor.items():
            if key == "ids" and isinstance(value, list):
                result[key] = [vocabulary.renumbered(number) for number in value]
            elif key in ("sep", "cls") and isinstance(value, list):
                result[key] = [value[0], vocabulary.renumbered(value[1])]
            else:
                result[key] = _renamed(value, vocabulary)
        return result
    return [_renamed(entry, vocabulary) for entry in processor] if isinstance(processor, list) else processor


def _files(document: dict[str, Any], vocabulary: Vocabulary, folder: Path) -> dict[str, bytes]:
    """The tokenizer's files with the tokens that stay."""
    model = dict(document["model"])
    new = {piece: vocabulary.renumbered(number) for piece, number in _pieces(model).items()}
    new = {piece: number for piece, number in new.items() if number is not None}
    merges = [
        (entry, left, right) for entry, left, right in _merges(model)
        if {left, right, _joined(left, right, model)} <= new.keys()
    ]  # fmt: skip
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in new]
        model["unk_id"] = None if model.get("unk_id") is None else vocabulary.renumbered(model["unk_id"])
    else:
        model["vocab"] = new
    if "merges" in model:
        model["merges"] = [entry for entry, _, _ in merges]
    added = [{**entry, "id": vocabulary.renumbered(entry["id"])} for entry in document.get("added_tokens", ())]
    result = {**document, "model": model, "added_tokens": added}
    result["post_processor"] = _renamed(document.get("post_processor"), vocabulary)
    if isinstance(document.get("padding"), Mapping) and "pad_id" in document["padding"]:
        pad = vocabulary.renumbered(document["padding"]["pad_id"])
        result["padding"] = {**document["padding"], "pad_id": pad}
    files = {"tokenizer.json": _json(result)}
    listed = sorted(new, key=lambda piece: new[piece] or 0)
    if (folder / "vocab.txt").is_file():
        files["vocab.txt"] = "".join(f"{piece}\n" for piece in listed).encode()
    if (folder / "vocab.json").is_file():
        files["vocab.json"] = _json(new)
    if (folder / "merges.txt").is_file():
        files["merges.txt"] = "".join(["#version: 0.2\n", *(f"{a} {b}\n" for _, a, b in merges)]).encode()
    return files | dict(_settings(folder, vocabulary))


def _settings(folder: Path, vocabulary: Vocabulary) -> Iterator[tuple[str, bytes]]:
    """Settings that name tokens by their numbers."""
    for name in (*_SETTINGS, "added_tokens.json"):
        config = json_table(folder / name)
        if config is None:
            continue
        for key, value in config.items():
            if key == "vocab_size":
                config[key] = len(vocabulary.kept)
            elif (key.endswith("token_id") or name == "added_tokens.json") and isinstance(value, int):
                config[key] = vocabulary.renumbered(value)
            elif key == "added_tokens_decoder" and isinstance(value, dict):
                config[key] = {str(vocabulary.renumbered(int(number))): entry for number, entry in value.items()}
        yield name, _json(config)


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
