"""Options of calibration data, as one object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxcop.images.preprocess import Preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """Options of calibration data.

    Attributes:
        data: Calibration data: a path, arrays, feed dicts, a loader or a `SCRIPT.py:FUNCTION` (see
            :func:`onnxcop.data.open.open_source`); without it synthetic inputs are used.
        tokenizer: The model's `tokenizer.json`, or its folder, for data that are a text file, one text a line.
        preprocess: How images become inputs, or the name of such a preprocessing, e.g. `imagenet`; open fields are as
            the model declares, else guessed.
        samples: How many samples of the data are used; None for 512, or up to 1,024 for a model that runs quickly.
        batch_size: Samples that run at once.
        seed: Random seed.
    """

    data: Any = None
    tokenizer: str | Path | None = None
    preprocess: Preprocess | str | None = None
    samples: int | None = None
    batch_size: int = 32
    seed: int = 0
