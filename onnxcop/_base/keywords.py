"""Functions that take the fields of an options object as keyword arguments, so that each is listed once."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")
O = TypeVar("O")  # noqa: E741 - an options object
R = TypeVar("R")


class by_keywords(Generic[P, O]):
    """Turn `function(model, options)` into `function(model, *, field=..., ...)`.

    Type checkers, `inspect.signature` and `help` see the fields of the options object as keyword arguments.

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
        fields = _fields(self.options)
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
        run.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\nKeyword arguments:\n{_described(self.options)}"
        return run


def _unknown(keywords: dict[str, Any], signature: inspect.Signature) -> str:
    return next((name for name in keywords if name not in signature.parameters), "")


def _fields(options: Callable[..., object]) -> list[inspect.Parameter]:
    """The parameters of an options class, its own before those of the classes it extends."""
    found = inspect.signature(options).parameters
    classes = cast("type[object]", options).__mro__
    names = dict.fromkeys(name for kind in classes for name in vars(kind).get("__annotations__", ()))
    return [found[name] for name in names if name in found]


def _described(options: Callable[..., object]) -> str:
    """The `Attributes:` sections of an options class and of those it extends."""
    classes = cast("type[object]", options).__mro__
    texts = (inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2] for kind in classes)
    return "\n".join(text.rstrip() for text in texts if text)
