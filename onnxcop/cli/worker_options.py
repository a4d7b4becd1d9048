"""The options of commands that can work on several processes or machines, and of those that try several ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from onnxcop.cli.framework import SectionOption
from onnxcop.cli.types import CriterionName, Several, Workers

MEASURED = "measured"  # among several criteria, measured sensitivity

F = TypeVar("F", bound=Callable[..., Any])


def _workers(text: str) -> Callable[[F], F]:
    """The option `--workers` with its help."""
    return click.option(
        "--workers", cls=SectionOption, section="Machine", type=Workers(), metavar="N|ADDRESS", help=text
    )


workers_option = _workers(
    "Work on N processes with one thread each, or on a cluster: dask://HOST:PORT, ray://HOST:PORT or ray. "
    "Results stay the same."
)
timing_workers_option = _workers(
    "Time on N processes, or on a cluster: dask://HOST:PORT, ray://HOST:PORT or ray. Workers must be alike and "
    "quiet: each times one thing after the other, with one thread unless --threads says more."
)
independent_option = click.option(
    "--independent", cls=SectionOption, section="Machine", is_flag=True,
    help="Reach each budget from the original, as jobs for --workers that a stopped run continues; with several "
    "models always.",
)  # fmt: skip


class _CriterionOrNone(CriterionName):
    """The name of a criterion, or that of measured sensitivity."""

    def summaries(self) -> Mapping[str, str]:
        """All criteria, and measured sensitivity."""
        return {MEASURED: "measured sensitivity, the default", **super().summaries()}


def several(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let the options `--criterion` and `--seed` of a command take several values, separated by commas."""
    kinds: dict[str | None, click.ParamType[Any]] = {"criterion": _CriterionOrNone(), "seed": click.INT}
    for option in function.__click_params__:  # type: ignore[attr-defined]
        if option.name in kinds:
            option.type = Several(kinds[option.name])
    return function
