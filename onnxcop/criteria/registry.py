"""Criteria by name: those of the modules beside this one, and those that other packages register.

A module of this folder lists its criteria in `CRITERIA`, and their descriptions in `SUMMARIES`, a literal that is read
without importing the module, so that `onnxcop --help` stays quick. Another package registers a criterion (an object, or
a class that takes no arguments) as an entry point of `onnxcop.criteria`.
"""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib import import_module, util
from typing import TYPE_CHECKING, Any, cast

from onnxcop._base.lookup import unknown
from onnxcop._base.plugins import loaded, registered, skipped
from onnxcop.errors import BudgetError

if TYPE_CHECKING:
    from onnxcop.criteria.base import Criterion

GROUP = "onnxcop.criteria"


class _Criteria(Mapping[str, "Criterion"]):
    """Criteria by name; names are read without imports, a criterion is imported on first use."""

    def __iter__(self) -> Iterator[str]:
        return iter(summaries())

    def __len__(self) -> int:
        return len(summaries())

    def __contains__(self, name: object) -> bool:
        return name in summaries()

    def __getitem__(self, name: str) -> Criterion:
        module = _modules().get(name)
        entries = _foreign() if module is None else {entry.name: entry for entry in import_module(module[0]).CRITERIA}
        return entries[name]


CRITERIA: Mapping[str, Criterion] = _Criteria()


def summaries() -> dict[str, str]:
    """Descriptions of all criteria, by name, without importing any."""
    foreign = {entry.name: f"entry point {entry.value}" for entry in registered(GROUP)}
    return {name: summary for name, (_, summary) in _modules().items()} | {
        name: text for name, text in foreign.items() if name not in _modules()
    }


def criterion_named(name: str, **parameters: object) -> Criterion:
    """Look a criterion up, with some of its parameters changed.

    Args:
        name: Its name.
        parameters: Parameters of the criterion, by name.

    Raises:
        BudgetError: No criterion has this name, or it has no such parameter.
    """
    try:
        criterion = CRITERIA[name]
    except KeyError:
        # a criterion from a package that fails to load is listed, but does not exist
        raise unknown("criterion", name, [other for other in CRITERIA if other != name]) from None
    known = parameters_of(criterion)
    for parameter in parameters:
        if parameter not in known:
            raise BudgetError(
                f"criterion {name} has no parameter {parameter!r}; it has {', '.join(known) or 'no parameters'}"
            )
    return replace(cast(Any, criterion), **parameters) if parameters else criterion


def parameters_of(criterion: Criterion) -> tuple[str, ...]:
    """The names of the parameters that can be set: fields of a dataclass that it records in a plan."""
    settable = cast(Any, criterion)
    recorded = criterion.parameters() if is_dataclass(settable) else {}
    return tuple(entry.name for entry in fields(settable) if entry.name in recorded) if recorded else ()


@cache
def _modules() -> dict[str, tuple[str, str]]:
    """Module and summary of every criterion of this folder, by name."""
    package = util.find_spec("onnxcop.criteria")
    modules = {}
    for entry in pkgutil.iter_modules(package.submodule_search_locations if package else None):
        name = f"onnxcop.criteria.{entry.name}"
        loader = util.find_spec(name)
        source = loader.loader.get_source(name) if loader else ""  # type: ignore[union-attr]
        literal = re.search(r"^SUMMARIES = (\{.*?\})$", source, re.MULTILINE | re.DOTALL)
        if literal is not None:
            modules.update({key: (name, text) for key, text in ast.literal_eval(literal[1]).items()})
    return modules


@cache
def _foreign() -> dict[str, Criterion]:
    """Criteria that other packages register."""
    criteria: dict[str, Criterion] = {}
    for entry, value in loaded(GROUP):
        try:
            criterion = value() if isinstance(value, type) else value
            if not callable(getattr(criterion, "rank", None)):
                raise TypeError(f"{entry.value} is not a criterion: it has no method rank")
            criteria[entry.name] = cast("Criterion", criterion)
        except Exception as error:  # a foreign class may raise anything
            skipped(entry, f"{type(error).__name__}: {error}")
    return criteria
