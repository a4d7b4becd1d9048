"""What a run has to tell, in words and numbers, whatever they are shown on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onnxcop.report import GroupReport, Report
from onnxcop.verify import Verification

_BEFORE, _AFTER = " before", " after"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the final table: a quantity before and after, and what is left of it."""

    name: str
    before: str
    after: str
    kept: str = ""


def rows(report: Report) -> Iterator[Row]:
    """The final table."""
    before, after = report.before, report.after
    for name, old, new, form in (
        ("filters", report.filters, report.filters - filters_cut(report), count),
        ("MACs", before.macs, after.macs, count),
        ("parameters", before.params, after.params, count),
        ("file size", before.bytes, after.bytes, size),
    ):
        yield Row(name, form(old), form(new), percent(new, old))
    found = report.quality
    for name, value in found.items():
        if name.endswith(_BEFORE) and name.removesuffix(_BEFORE) + _AFTER in found:
            bare = name.removesuffix(_BEFORE)
            yield Row(bare, f"{value:.4g}", f"{found[bare + _AFTER]:.4g}")
        elif not (name.endswith(_AFTER) and name.removesuffix(_AFTER) + _BEFORE in found):
            yield Row(name, "", f"{value:.4g}")


def filters_cut(report: Report) -> int:
    """How many filters are gone, over all layers."""
    return sum(group.filters * (group.width - group.kept) for group in report.groups)


def found(report: Report) -> str:
    """What there was to prune."""
    inexact = sum(not group.exact for group in report.groups)
    text = f"{report.filters} filters, {report.prunable:.1%} prunable, in {_plural(len(report.groups), 'group')}"
    return text + (f" ({inexact} inexact)" if inexact else "")


def cut(report: Report, settings: Mapping[str, Any]) -> str:
    """What was cut, and how it was chosen and made up for."""
    touched = [group for group in report.groups if group.kept < group.width]
    how = "by measurement" if settings.get("allocate") == "measured" else f"by {report.criterion}"
    text = f"{_plural(filters_cut(report), 'filter')} from {len(touched)} of {_plural(len(report.groups), 'group')}"
    inexact = sum(not group.exact for group in touched)
    text += f" {how}" + (f", {inexact} of them inexact" if inexact else "")
    return f"{text}; recovery: {settings.get('recover', 'none')}"


def most_cut(report: Report, most: int) -> str:
    """The groups that lost the largest shares, "conv2 64→40, …"; empty where none was cut."""
    touched = sorted((g for g in report.groups if g.kept < g.width), key=_share_kept)
    text = ", ".join(f"{group.name} {group.width}→{group.kept}" for group in touched[:most])
    return text + (", …" if len(touched) > most else "")


def _share_kept(group: GroupReport) -> float:
    return group.kept / group.width


def verified(found: Verification) -> str:
    """What a verification says, in a line."""
    if found.max_difference is None:
        text = "valid and runs; outputs were not compared with the masked original"
    else:
        gap = "exactly" if found.max_difference == 0 else f"to {found.max_difference:.1e}"
        text = f"valid, runs, equals the masked original {gap}"
    if found.inexact_units:
        text += f"; {found.inexact_units} of the removed units are inexact"
    return text


def count(value: float) -> str:
    """A number of things, 928.99 k say."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.2f} {unit}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """A number of bytes, 400.33 kB say."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f} B"


def percent(new: float, old: float) -> str:
    """What is left of something."""
    return f"{new / old:.1%}" if old else "-"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
