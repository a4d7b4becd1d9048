"""Conditions on a comparison, for a job that must fail if they do not hold: `agreement>=.97, time<=.8`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onnxcop.errors import OnnxcopError
from onnxcop.pipeline.compare import Comparison

_CONDITION = re.compile(r"\s*(?P<name>[a-z_]+)\s*(?P<sign><=|>=|<|>)\s*(?P<bound>[-+.\deE]+)\s*(?P<percent>%?)\s*")
_SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Condition:
    """One bound.

    Attributes:
        name: A key of :data:`QUANTITIES`.
        sign: `<=`, `>=`, `<` or `>`.
        bound: The bound on the quantity.
    """

    name: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.bound:g}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A condition with the measured value.

    Attributes:
        condition: The condition as written.
        value: The measured value; None if there is none.
        holds: Whether the condition holds; False without a value.
    """

    condition: str
    value: float | None
    holds: bool


def _ratio(b: float, a: float) -> float | None:
    return b / a if a else None


def _agreement(comparison: Comparison) -> float | None:
    """The lowest agreement of all outputs that have one."""
    if comparison.agreement is None or comparison.agreement.figures is None:
        return None
    shares = [one.agreement.value for one in comparison.agreement.figures.outputs if one.agreement is not None]
    return min(shares, default=None)


def _divergence(comparison: Comparison) -> float | None:
    figures = None if comparison.agreement is None else comparison.agreement.figures
    return None if figures is None else figures.divergence.value


def _error(comparison: Comparison) -> float | None:
    """The largest relative error of all outputs; None if an output cannot be compared."""
    gaps = () if comparison.agreement is None else comparison.agreement.outputs
    errors = [gap.error if gap.equal is None else 1 - gap.equal for gap in gaps]
    known = [error for error in errors if error is not None]
    return max(known) if known and len(known) == len(errors) else None


QUANTITIES: Mapping[str, tuple[str, Callable[[Comparison], float | None]]] = {
    "agreement": ("share of samples with the same answer, of the worst output", _agreement),
    "divergence": ("divergence of B's outputs from A's", _divergence),
    "error": ("relative error of the worst output", _error),
    "time": ("latency of B over A's", lambda found: None if found.latency is None else found.latency.ratio),
    "macs": ("multiply-accumulates of B over A's", lambda found: _ratio(found.b.cost.macs, found.a.cost.macs)),
    "params": ("parameters of B over A's", lambda found: _ratio(found.b.cost.params, found.a.cost.params)),
    "size": ("file size of B over A's", lambda found: _ratio(found.b.cost.bytes, found.a.cost.bytes)),
    "filters": ("filters of B over A's", lambda found: _ratio(found.b.filters, found.a.filters)),
}


def read_gate(text: str) -> tuple[Condition, ...]:
    """Conditions from a text such as `agreement>=.97, time<=80%`.

    Raises:
        OnnxcopError: It is not a condition; the message says what to write.
    """
    conditions = []
    for part in text.split(","):
        match = _CONDITION.fullmatch(part)
        try:
            bound = float(match["bound"]) if match else 0.0
        except ValueError:
            match = None
        if match is None or match["name"] not in QUANTITIES:
            raise OnnxcopError(
                f"{part.strip()!r} is not a condition; write NAME<=NUMBER or NAME>=NUMBER, where NAME is one of "
                f"{', '.join(QUANTITIES)}, e.g. agreement>=.97, time<=.8"
            )
        conditions.append(Condition(match["name"], match["sign"], bound / 100 if match["percent"] else bound))
    return tuple(conditions)


def check_gate(conditions: tuple[Condition, ...], comparison: Comparison) -> tuple[Verdict, ...]:
    """Check every condition on a comparison; quantities that were not measured fail."""
    verdicts = []
    for condition in conditions:
        value = QUANTITIES[condition.name][1](comparison)
        holds = value is not None and _SIGNS[condition.sign](value, condition.bound)
        verdicts.append(Verdict(str(condition), value, holds))
    return tuple(verdicts)
