"""Putting right a size that is computed at run time, in as few nodes as can be.

Such a number may be a count of channels, a dynamic size, or a product of both: a wrong one is scaled,
which is right whatever the dynamic sizes are. Only what cannot be scaled is written over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcop._base.types import Array
from onnxcop.rewrite.sizes import SizeFix

_WHERE_SINCE = 9  # the opset


@dataclass(frozen=True, slots=True)
class Correction:
    """A node that reads the number (or what the one before made of it) and constants.

    Attributes:
        op_type: Its operator.
        name: What it does, for its name.
        constants: Its other inputs, by a name for each.
    """

    op_type: str
    name: str
    constants: Mapping[str, Array]

    def inputs(self, values: Any, constants: Sequence[Any]) -> list[Any]:
        """The node's inputs in order; Where has the values last."""
        return [*constants, values] if self.op_type == "Where" else [values, *constants]


def corrections(mend: SizeFix, opset: int) -> list[Correction]:
    """The nodes that turn what is read into what must be read, one after the other."""
    required = mend.required
    actual = np.asarray(np.broadcast_to(mend.actual, required.shape))
    wrong = np.asarray(actual != required)
    if required.dtype.kind in "if" and np.isfinite(actual[wrong]).all() and (actual[wrong] != 0).all():
        return _scaled(required, actual, wrong)
    if opset >= _WHERE_SINCE:
        return [Correction("Where", "where", {"mask": wrong, "value": required})]
    kept = np.asarray(~wrong).astype(required.dtype)
    written = np.where(wrong, required, 0).astype(required.dtype)
    return [Correction("Mul", "clear", {"mask": kept}), Correction("Add", "write", {"value": written})]


def _scaled(required: Array, actual: Array, wrong: Array) -> list[Correction]:
    upper, lower = np.where(wrong, required, 1), np.where(wrong, actual, 1)
    if required.dtype.kind == "f":
        return [Correction("Mul", "scale", {"factor": np.asarray(upper / lower).astype(required.dtype)})]
    common = np.gcd(upper, lower)
    factor, divisor = (np.asarray(part // common).astype(required.dtype) for part in (upper, lower))
    steps = [Correction("Mul", "scale", {"factor": factor})]
    return steps if (divisor == 1).all() else [*steps, Correction("Div", "divide", {"divisor": divisor})]
