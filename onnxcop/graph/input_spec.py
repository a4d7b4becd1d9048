"""Name, type and shape of an input or output of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Name, type and shape of an input or output of a model.

    Attributes:
        name: The tensor's name in the graph.
        dtype: Its numpy dtype; `object` for strings and for anything that is not a tensor.
        shape: Per axis a fixed size, the name of a dynamic size, or None for one without a name.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"'{self.name}' {self.dtype.name}{format_shape(self.shape)}"


def format_shape(shape: Sequence[int | str | None]) -> str:
    """`[N, 3, 224, 224]`; a dynamic size without a name is written `?`."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
