"""Texts as data: one a line, tokenized by the model's own tokenizer (extra `text`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcop._base.documents import json_table
from onnxcop._base.types import Feed
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec

LONGEST = 128  # tokens of a text, unless the model or its tokenizer sets a limit; longer texts are truncated
_FORMS = {
    "input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids", "position_ids": "",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TextData:
    """Texts with the tokenizer that a model was trained with.

    Attributes:
        path: A text file, one text a line; empty lines are left out.
        tokenizer: A `tokenizer.json` as Hugging Face models have it, or the folder that holds it.
    """

    path: Path
    tokenizer: Path

    def arrays(self, inputs: Sequence[InputSpec]) -> Feed:
        """Token numbers and masks, int64 [texts, tokens], by input name.

        Args:
            inputs: Inputs of the model: any of input_ids, attention_mask, token_type_ids and position_ids.

        Raises:
            CalibrationError: A file cannot be read, or the model has other inputs.
        """
        unknown = [spec.name for spec in inputs if spec.name not in _FORMS]
        if unknown:
            raise CalibrationError(
                f"{self.path}: texts feed inputs named {', '.join(_FORMS)}, but the model reads {', '.join(unknown)}; "
                "give .npz files with an array for each"
            )
        tokenizer = self.loaded()
        fixed = next((s.shape[1] for s in inputs if len(s.shape) > 1 and isinstance(s.shape[1], int)), None)
        tokenizer.enable_truncation(fixed or self._longest())
        padding = dict(tokenizer.padding or {})
        kept = {key: padding[key] for key in ("direction", "pad_id", "pad_type_id", "pad_token") if key in padding}
        tokenizer.enable_padding(length=fixed, **kept)
        encodings = tokenizer.encode_batch(self.texts())
        return {
            spec.name: np.array(
                [getattr(text, _FORMS[spec.name]) if _FORMS[spec.name] else range(len(text.ids)) for text in encodings]
            ).astype(spec.dtype)
            for spec in inputs
        }

    def texts(self) -> list[str]:
        """The lines that are not empty.

        Raises:
            CalibrationError: The file cannot be read, or is empty.
        """
        try:
            lines = [line.strip() for line in self.path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{self.path}: texts cannot be read ({error}); give a UTF-8 file") from None
        texts = [line for line in lines if line]
        if not texts:
            raise CalibrationError(f"{self.path}: it holds no texts; write one on each line")
        return texts

    def file(self) -> Path:
        """The tokenizer's file."""
        return self.tokenizer / "tokenizer.json" if self.tokenizer.is_dir() else self.tokenizer

    def loaded(self) -> Any:
        """The tokenizer.

        Raises:
            CalibrationError: There is none, or the library that reads it is not installed.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise CalibrationError(
                "texts need the tokenizers library; install it with: pip install 'onnxcop[text]'"
            ) from None
        path = self.file()
        if not path.is_file():
            raise CalibrationError(f"{path} does not exist; give the folder of the model that holds its tokenizer.json")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise CalibrationError(f"{path} is not a tokenizer: {' '.join(str(error).split())}") from None

    def _longest(self) -> int:
        """The length that the tokenizer's settings name, at most the usual one."""
        folder = self.tokenizer if self.tokenizer.is_dir() else self.tokenizer.parent
        longest = (json_table(folder / "tokenizer_config.json") or {}).get("model_max_length")
        return min(LONGEST, longest) if isinstance(longest, int) and longest > 0 else LONGEST


def with_tokenizer(data: Any, tokenizer: str | Path | None) -> Any:
    """Data that are texts, with their tokenizer; other data unchanged.

    Raises:
        CalibrationError: One of the two is missing.
    """
    text = isinstance(data, str | os.PathLike) and Path(data).suffix.lower() == ".txt"
    if tokenizer is None:
        if text:
            raise CalibrationError(f"{data}: texts need the model's tokenizer; give --tokenizer DIR")
        return data
    if not text:
        raise CalibrationError("--tokenizer reads texts; give --data FILE.txt, one text a line")
    return TextData(Path(data), Path(tokenizer))
