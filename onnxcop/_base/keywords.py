"""Functions that take the fields of an options object as keyword arguments, so that each is listed once."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Container
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, cast, get_args, get_origin, overload

P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")
O = TypeVar("O")  # noqa: E741 - an options object
R = TypeVar("R")


class by_keywords(Generic[P, O]):
    """Turn `function(model, options)` into `function(model, *, field=..., ...)`.

    Type checkers see the fields of the options object as keyword arguments, with their types. So does `help`: names
    and defaults in the signature, types in the text, since dozens of types hide the names.

    Args:
        options: A frozen dataclass whose fields are keyword-only.
    """

    def __init__(self, options: Callable[P, O]) -> None:
        self.options = options

    @overload
    def __call__(self, function: Callable[[A, O], R]) -> Callable[Concatenate[A, P], R]: ...
    @overload
    def __call__(self, function: Callable[[A, B, O], R]) -> Callable[Concatenate[A, B, P], R]: ...
    def __call__(self, function: Any) -> Any:
        """Decorate a function whose last parameter is the options object."""
        written = inspect.signature(function)
        *leading, last = written.parameters.values()
        taken = {entry.name for entry in leading}
        fields = [entry for entry in _fields(self.options) if entry.name not in taken]
        signature = written.replace(parameters=[*leading, *fields])

        @functools.wraps(function)
        def run(*args: Any, **keywords: Any) -> Any:
            try:
                given = signature.bind(*args, **keywords).arguments
            except TypeError as error:
                near = difflib.get_close_matches(_unknown(keywords, signature), signature.parameters, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{function.__name__}() {error}{hint}") from None
            first = {entry.name: given.pop(entry.name) for entry in leading}
            return function(**first, **{last.name: self.options(**given)})  # type: ignore[call-arg]

        run.__signature__ = signature  # type: ignore[attr-defined]
        text = re.sub(rf"\n    {last.name}: .*(\n {{8}}.*)*", "", inspect.cleandoc(function.__doc__))
        run.__doc__ = f"{text}\n\nKeyword arguments:\n{_described(self.options, taken)}"
        return run


def _unknown(keywords: dict[str, Any], signature: inspect.Signature) -> str:
    return next((name for name in keywords if name not in signature.parameters), "")


def _fields(options: Callable[..., object]) -> list[inspect.Parameter]:
    """The parameters of an options class, its own before those of the classes it extends."""
    parameters = inspect.signature(options).parameters
    names = [name for kind in _classes(options) for name in kind.__annotations__]
    return [parameters[name].replace(annotation=inspect.Parameter.empty) for name in names]


def _described(options: Callable[..., object], without: Container[str]) -> str:
    """The `Attributes:` sections of an options class and of those it extends, with the types of the fields."""
    lines, shown = [], True
    for kind in _classes(options):
        for line in inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2].rstrip().splitlines():
            field = re.fullmatch(r" {4}(\w+): (.*)", line)
            shown = field[1] not in without if field else shown
            if shown:
                lines.append(f"    {field[1]} ({_typed(kind, field[1])}): {field[2]}" if field else line)
    return "\n".join(lines)


def _typed(kind: type[object], name: str) -> str:
    """The type of a field in words: closed sets spelled out, None left to the default."""
    names = vars(sys.modules[kind.__module__])
    parts = [part for part in kind.__annotations__[name].split(" | ") if part != "None"]
    sets = {part: get_args(names[part]) for part in parts if get_origin(names.get(part)) is Literal}
    return " | ".join(" | ".join(map(repr, sets[part])) if part in sets else part for part in parts)


def _classes(options: Callable[..., object]) -> list[type[object]]:
    return [kind for kind in cast("type[object]", options).__mro__ if "__annotations__" in vars(kind)]
