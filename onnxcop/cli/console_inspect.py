"""Output of `inspect`: what can be pruned, what is frozen and why, and possible savings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from onnxcop._base.formatting import counted, listed_names, new_table, percent, shortened, sized, terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from onnxcop.analysis.inspect import GroupEntry, Inspection
    from onnxcop.criteria.scores import Scores

_MOST_GROUPS = 24  # so that a typical model fits on one or two screens
_MOST_FROZEN = 12
_MOST_SCORES = 20


def show_inspection(inspection: Inspection, *, verbose: bool = False) -> None:
    """Print what can be pruned and how much it saves, and what is frozen and why."""
    console = terminal()
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in inspection.input_shapes.items())
    console.print(f"{inspection.model} with {shapes}")
    console.print(
        f"{counted(inspection.cost.macs)} MACs, {counted(inspection.cost.params)} parameters, "
        f"{sized(inspection.cost.bytes)}; "
        f"{inspection.filters} filters, {inspection.prunable:.1%} prunable"
    )
    if inspection.groups:
        halved, cost = inspection.halved, inspection.cost
        console.print(
            f"with half of every group removed, {percent(halved.macs, cost.macs)} of the MACs and "
            f"{percent(halved.params, cost.params)} of the parameters are left"
        )
        console.print(_groups(inspection, console.width, verbose=verbose))
        if len(inspection.groups) > _MOST_GROUPS and not verbose:
            console.print(f"… and {len(inspection.groups) - _MOST_GROUPS} groups that save less; all with -v")
    _show_inexact(console, inspection)
    if inspection.frozen_layers:
        _show_frozen(console, inspection, verbose=verbose)
    if inspection.declined:
        console.print("nodes that could not be analysed; all that is connected to them is frozen:")
        for reason in inspection.declined:
            console.print(f"  {reason}")


def _groups(inspection: Inspection, width: int, *, verbose: bool) -> Table:
    """One line per group; with -v also all names and costs per filter."""
    inexact = any(not group.exact for group in inspection.groups)
    columns = ["width", "MACs/filter", *(["params/filter"] if verbose else []), "MACs", "params"]
    table = new_table(
        "layers", *columns, *(["exact"] if inexact else []),
        title="groups of filters that are removed together, and what half of each would save",
    )  # fmt: skip
    room = max(20, width - 2 - sum(max(len(column), 6) + 3 for column in columns) - 8 * inexact)
    for group in inspection.groups if verbose else inspection.groups[:_MOST_GROUPS]:
        per_filter = [counted(group.macs), *([counted(group.params)] if verbose else [])]
        saved = [percent(-group.half_macs, inspection.cost.macs), percent(-group.half_params, inspection.cost.params)]
        exact = [("yes" if group.exact else "no")] if inexact else []
        names = _one_line(group, room) if not verbose else listed_names(group.layers or (group.name,), sys.maxsize)
        table.add_row(names, str(group.width), *per_filter, *saved, *exact)
    return table


def _one_line(group: GroupEntry, room: int) -> str:
    """The first layer of a group, shortened to its end if necessary, and the number of others."""
    more = f" +{len(group.layers) - 1}" if len(group.layers) > 1 else ""
    return shortened((group.layers or (group.name,))[0], room - len(more)) + more


def _show_frozen(console: Console, inspection: Inspection, *, verbose: bool) -> None:
    table = new_table("layer", "why", "frozen", title="frozen filters", left=2)
    layers = inspection.frozen_layers if verbose else inspection.frozen_layers[:_MOST_FROZEN]
    for layer in layers:
        frozen = f"{layer.filters - layer.prunable} of {layer.filters}"
        name = layer.name if verbose else shortened(layer.name, console.width // 3)
        table.add_row(name, "; ".join(layer.reasons), frozen)
    console.print(table)
    if len(layers) < len(inspection.frozen_layers):
        console.print(f"… and {len(inspection.frozen_layers) - len(layers)} layers; all with -v")


def _show_inexact(console: Console, inspection: Inspection) -> None:
    reasons = sorted({reason for group in inspection.groups for reason in group.reasons})
    if reasons:
        console.print("inexact groups change a statistic that other channels share (--exact-only):")
        for reason in reasons:
            console.print(f"  {reason}")


def show_scores(scores: Scores, model: str, *, verbose: bool = False) -> None:
    """Print the importance of filters: the least important ones, or all."""
    console, most = terminal(), len(scores.units) if verbose else _MOST_SCORES
    settings = ", ".join(f"{name} {value}" for name, value in scores.parameters.items())
    console.print(f"{model} by {scores.criterion}" + (f" ({settings})" if settings else ""))
    if not scores.units:
        console.print("no filter may be removed; see onnxcop inspect without --scores")
        return
    rest = len(scores.units) - most
    title = "importance of filters, lowest first" + (f" (of {len(scores.units)}; all with -v)" if rest > 0 else "")
    table = new_table("group", "filter", "importance", *scores.terms, title=title)
    for unit in scores.units[:most]:
        terms = (f"{value:.4g}" for value in unit.terms.values())
        table.add_row(unit.group, str(unit.filter), f"{unit.importance:.5g}", *terms)
    console.print(table)
