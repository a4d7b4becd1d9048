"""Types of command-line values: their form on the command line, and their Python values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from onnxcop._base.quantities import share, size_or_share

if TYPE_CHECKING:
    from onnxcop.allocation.limits import Auto
    from onnxcop.parallel.workers import WorkersWish


class Fraction(click.ParamType[float]):
    """`0.7` or `70%`, above 0 and at most 1."""

    name = "fraction"

    def __init__(self, *, zero: bool = False) -> None:
        self.zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The fraction as a float."""
        try:
            return share(value, zero=self.zero)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@dataclass(frozen=True, slots=True)
class Output:
    """Destination of a result.

    Attributes:
        path: The file or folder.
        whole: Whether it is a folder that also gets config.json and the tokenizer beside the model.
    """

    path: Path
    whole: bool = False


class OutputPath(click.ParamType[Output]):
    """A file, or a folder that ends in a slash."""

    name = "file"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Files."""
        return [CompletionItem(incomplete, type="file")]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Output:
        """The path, and whether it is a folder."""
        text = str(value)
        return Output(Path(text), whole=text.endswith(tuple(filter(None, (os.sep, os.altsep)))))


class ReportFile(click.ParamType[Path]):
    """A file with the suffix of a report format."""

    name = "file"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Files."""
        return [CompletionItem(incomplete, type="file")]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path."""
        from onnxcop.report.formats import SUFFIXES

        path = Path(value)
        if path.suffix.lower() not in SUFFIXES:
            self.fail(f"{str(value)!r} does not end in {', '.join(SUFFIXES)}", param, ctx)
        return path


class Fractions(click.ParamType[tuple[float, ...]]):
    """Fractions separated by commas: `0.9,0.8,70%`."""

    name = "fractions"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The fractions as floats."""
        if isinstance(value, tuple):
            return value
        return tuple(Fraction().convert(part, param, ctx) for part in str(value).split(","))


class Several(click.ParamType[tuple[Any, ...]]):
    """Values of a type, separated by commas, each once.

    Args:
        each: The type of a value.
    """

    def __init__(self, each: click.ParamType[Any]) -> None:
        self.each, self.name = each, f"{each.name},..."

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Completions of the last value."""
        before, comma, last = incomplete.rpartition(",")
        found = self.each.shell_complete(ctx, param, last)
        return [CompletionItem(before + comma + item.value, help=item.help) for item in found]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """The values."""
        if isinstance(value, tuple):
            return value
        return tuple(dict.fromkeys(self.each.convert(part.strip(), param, ctx) for part in str(value).split(",")))


class WidthMultiple(click.ParamType["int | Auto"]):
    """A number from 1 on, or `auto`, which means widths that suit the machine."""

    name = "n|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Auto:
        """The number, or :data:`onnxcop.AUTO`."""
        from onnxcop.allocation.limits import AUTO

        if value == "auto":
            return AUTO
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither a whole number of at least 1 nor auto", param, ctx)
        return int(value)


class FileSize(click.ParamType[float]):
    """Bytes, with a unit: `5MB` (10^6), `5MiB` (2^20), `700k`, or a plain number; or a share of the original, `50%`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The size in bytes, or a share up to 1."""
        try:
            return size_or_share(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Workers(click.ParamType["WorkersWish"]):
    """A number of processes, or the address of a cluster."""

    name = "n|address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> WorkersWish:
        """The workers to open."""
        from onnxcop.parallel.workers import WorkersWish

        if isinstance(value, WorkersWish):
            return value
        try:
            return WorkersWish.of(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class InputShape(click.ParamType[tuple[str, tuple[int, ...]]]):
    """`name:1,3,224,224`; the name may hold colons itself."""

    name = "name:shape"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        """The input's name and its shape."""
        name, _, sizes = str(value).rpartition(":")
        try:
            shape = tuple(int(size) for size in re.split("[,x]", sizes))
        except ValueError:
            shape = ()
        if not name or not shape or min(shape) < 1:
            self.fail(f"{value!r} is not an input shape; write NAME:1,3,224,224", param, ctx)
        return name, shape


class Positive(click.ParamType[float]):
    """A number above 0."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not 0 < number < float("inf"):
            self.fail(f"{value} is not above 0", param, ctx)
        return number


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas: `0.485,0.456,0.406`."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers."""
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers; write 0.485,0.456,0.406", param, ctx)


class PreferenceWeights(click.ParamType[tuple[float, float]]):
    """`faster`, `smaller`, `balanced`, or the weights `beta,gamma` themselves."""

    name = "preference"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names."""
        from onnxcop.criteria.preference import NAMED

        return [CompletionItem(name) for name in NAMED if name.startswith(incomplete)]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """The weights (beta, gamma)."""
        from onnxcop.criteria.preference import Preference
        from onnxcop.errors import BudgetError

        try:
            parsed = Preference.of(value)
        except BudgetError as error:
            self.fail(str(error), param, ctx)
        return parsed.beta, parsed.gamma


class _Name(click.ParamType[str]):
    """A name from a catalogue: completed by the shell, and refused with a list of all names if unknown."""

    name = "name"
    kind = ""

    def summaries(self) -> Mapping[str, str]:
        """The catalogue, with a description of each; imported late, because it may be heavy."""
        raise NotImplementedError

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names with this beginning, with their descriptions."""
        return [
            CompletionItem(name, help=text) for name, text in self.summaries().items() if name.startswith(incomplete)
        ]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, if it exists."""
        known = self.summaries()
        if value not in known:
            self.fail(f"unknown {self.kind} {value!r}; choose {', '.join(known)}", param, ctx)
        return str(value)


class CriterionName(_Name):
    """The name of a criterion."""

    kind = "criterion"

    def summaries(self) -> Mapping[str, str]:
        """All criteria."""
        from onnxcop.criteria.registry import summaries

        return summaries()


class PresetName(_Name):
    """The name of a preprocessing of images."""

    kind = "preprocessing"

    def summaries(self) -> Mapping[str, str]:
        """All presets."""
        from onnxcop.images.presets import PRESETS

        return {name: preset.purpose for name, preset in PRESETS.items()}


class TargetName(_Name):
    """The name of a device to prune for."""

    kind = "target"

    def summaries(self) -> Mapping[str, str]:
        """All targets."""
        from onnxcop.runtime.staircase import TARGETS

        return {target.name: target.source for target in TARGETS}


class ProviderName(_Name):
    """The name of an execution provider; besides the short names ONNX Runtime may have others."""

    kind = "provider"

    def summaries(self) -> Mapping[str, str]:
        """The short names."""
        from onnxcop.runtime.providers import SHORT_NAMES

        return SHORT_NAMES

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, unchanged."""
        return str(value)


class LayerWish(click.ParamType[dict[str, Any]]):
    """`PATTERN:max_cut=0.3,min_filters=16`; the pattern may hold colons itself."""

    name = "pattern:limits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """The keyword arguments of :class:`onnxcop.allocation.limits.LayerLimit`."""
        if isinstance(value, dict):
            return value
        pattern, _, limits = str(value).rpartition(":")
        parsed: dict[str, Any] = {"pattern": pattern}
        try:
            for part in limits.split(","):
                name, number = part.split("=")
                if name.strip() not in ("max_cut", "min_filters"):
                    raise ValueError(name)
                parsed[name.strip()] = int(number) if name.strip() == "min_filters" else share(number, zero=True)
        except ValueError:
            self.fail(f"{value!r} is not a limit of layers; write 'PATTERN:max_cut=0.3,min_filters=16'", param, ctx)
        if not pattern:
            self.fail(f"{value!r} names no layers; write 'PATTERN:max_cut=0.3'", param, ctx)
        return parsed
