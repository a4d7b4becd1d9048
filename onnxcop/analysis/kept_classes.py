"""The classes to keep, and the outputs of a model with fewer classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from onnxcop.errors import ModelError

_SHOWN = 8  # classes to name in a line


@dataclass(frozen=True, slots=True)
class ClassWish:
    """The classes to keep.

    Attributes:
        entries: Numbers from 0, or names from the model's metadata.
        output: Name of the output that holds them; None if there is only one candidate.
    """

    entries: tuple[int | str, ...]
    output: str | None = None

    @classmethod
    def of(cls, value: str | Sequence[int | str]) -> ClassWish:
        """Read `0,2,5`, `person,car`, `output0:0,2,5`, or a list of such entries.

        Raises:
            ModelError: No class is named, or one is named twice.
        """
        output: str | None = None
        parts: Sequence[int | str]
        if isinstance(value, str):
            before, _, listed = value.rpartition(":")
            output, parts = before or None, [part.strip() for part in listed.split(",")]
        else:
            parts = value
        entries = tuple(int(part) if re.fullmatch(r"\d+", str(part)) else str(part) for part in parts)
        if not entries or "" in entries or len(set(entries)) != len(entries):
            raise ModelError(f"--classes {value!r} is not a list of classes, each named once; write 0,2,5")
        return cls(entries, output)


@dataclass(frozen=True, slots=True)
class KeptClasses:
    """The classes of a reduced model.

    Attributes:
        output: The output that holds the classes, the first if several do.
        axis: Their axis.
        first: The entry of the first class on that axis.
        kept: Numbers of the classes that stay, ascending, which is their order in the output.
        count: Number of classes before.
        names: Names of those that stay, if the model's metadata have them.
        renormalized: Whether a softmax over the classes now runs over the kept ones.
        original: SHA-256 of the model with all classes.
    """

    output: str
    axis: int
    first: int
    kept: tuple[int, ...]
    count: int
    names: tuple[str, ...] = ()
    renormalized: bool = False
    original: str = ""

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> KeptClasses:
        """Build from plain data, the inverse of :meth:`to_dict`."""
        return cls(**{**document, "kept": tuple(document["kept"]), "names": tuple(document.get("names", ()))})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "kept": list(self.kept), "names": list(self.names)}

    @property
    def wish(self) -> ClassWish:
        """The wish that selects the same classes again."""
        return ClassWish(self.kept, self.output)

    def line(self) -> str:
        """Description of the kept classes, in a line."""
        named = [f"{number} {name}" for number, name in zip(self.kept, self.names, strict=True)] if self.names else []
        shown = (named or [str(number) for number in self.kept])[:_SHOWN]
        more = ", …" if len(self.kept) > _SHOWN else ""
        place = f" from entry {self.first} of axis {self.axis}" if self.first else f" on axis {self.axis}"
        text = f"{len(self.kept)} of {self.count} classes kept ({', '.join(shown)}{more})"
        text += f": they are output {self.output!r}{place}, in this order"
        return text + ("; their softmax runs over them alone" if self.renormalized else "")
