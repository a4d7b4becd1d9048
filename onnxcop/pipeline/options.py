"""How units are chosen and made up for: what the user asked for, with every "auto" decided."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcop.criteria.base import Criterion
from onnxcop.criteria.registry import criterion_named
from onnxcop.errors import BudgetError, CalibrationError

ALLOCATE, RECOVER = ("auto", "cop", "measured"), ("auto", "none", "merge", "full")


@dataclass(frozen=True, slots=True)
class Modes:
    """What was asked for, with every "auto" decided."""

    criterion: Criterion
    allocate: str
    recover: str

    @classmethod
    def of(
        cls, criterion: str | Criterion, allocate: str, recover: str, *, has_data: bool, has_stats: bool, bounded: bool
    ) -> Modes:
        """Decide what is left open.

        Raises:
            BudgetError: A mode that does not exist, or modes that exclude each other.
            CalibrationError: A mode that needs data, without any.
        """
        for name, value, known in (("allocate", allocate, ALLOCATE), ("recover", recover, RECOVER)):
            if value not in known:
                raise BudgetError(f"--{name} {value!r} does not exist; choose one of {', '.join(known)}")
        named = criterion != "auto"
        only_stats = has_stats and not has_data
        if allocate == "auto":  # without data on made-up inputs, unless nothing is to be run at all
            measurable = has_data or (recover != "none" and not only_stats)
            allocate = "measured" if measurable and not named else "cop"
        if recover == "auto":
            recover = "merge" if only_stats else "full"
        if bounded and not has_data:
            raise CalibrationError("--divergence and --max-drop need calibration data; give --data")
        if bounded and allocate != "measured":
            raise BudgetError("--divergence and --max-drop go with --allocate measured")
        if bounded and recover == "none":
            raise BudgetError("--divergence and --max-drop bound what recovery leaves; give --recover merge or full")
        found = criterion_named("cop" if not named else criterion) if isinstance(criterion, str) else criterion
        if found.needs_stats and not (has_data or has_stats):
            raise CalibrationError(f"criterion {found.name} needs calibration data; give --data or --stats")
        return cls(found, allocate, recover)
