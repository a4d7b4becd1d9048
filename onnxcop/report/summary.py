"""The result in figures: what could be pruned, what was removed, what it saves, and what was checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from onnxcop._base.records import finite
from onnxcop._base.types import IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.census import group_name
from onnxcop.analysis.reason_codes import coded
from onnxcop.analysis.summary import Totals
from onnxcop.criteria.base import PruningContext
from onnxcop.criteria.filters import produced_filter_counts
from onnxcop.data.dataset import DataRecord, FedValues
from onnxcop.reconstruction.divergence import Figures
from onnxcop.runtime.latency import Latency
from onnxcop.verification.verify import Verification


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One dependency group before and after.

    Attributes:
        name: Its first layer, and the number of others.
        layers: The layers whose filters are removed together.
        width: Number of units in the original.
        kept: Number of remaining units.
        exact: Whether removing units leaves the others unchanged.
        filters: Number of filters, over all layers, that a unit represents.
    """

    name: str
    layers: tuple[str, ...]
    width: int
    kept: int
    exact: bool
    filters: int = 1


@dataclass(frozen=True, slots=True)
class Expected:
    """Expected time of the result on another device, from a table of times.

    Attributes:
        device: The device.
        before: Seconds of a run of the original there.
        ratio: Time of the result as a share of that.
    """

    device: str
    before: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Int8Report:
    """The result in int8.

    Attributes:
        mode: `static` or `dynamic`.
        chosen: How it was made, in words; empty where there was no choice.
        bytes: Size of the file.
        latency: Of the original and of this model; None where none was measured.
        figures: What was measured of it on the samples of the report's figures; None without data.
    """

    mode: str
    chosen: str
    bytes: int
    latency: Latency | None
    figures: Figures | None


@dataclass(frozen=True, slots=True)
class Report:
    """The report of a run.

    Attributes:
        model: Path or description of the original.
        before: Its cost.
        after: The cost of the result.
        groups: Every dependency group.
        filters: Number of filters in all layers.
        prunable: Fraction of the filters that can be removed.
        frozen: Reasons for the others, with numbers of filters.
        declined: Nodes that could not be followed, with the reason.
        verification: The checks and their results.
        criterion: Name of the criterion.
        warnings: Warnings for the user.
        calibration: One line on the calibration data.
        inputs: Values of the model's inputs.
        data: Record of the calibration data.
        figures: Figures of the written file on samples that no choice has used; None without data.
        measured_on: Description of these samples.
        quality: The same as plain numbers (divergence, agreement, the user's metric), by name.
        held_out: Divergence and agreement on the held-out samples that choices were made on.
        seconds: Time spent, by stage.
        latency: Of the original and of the result, measured side by side on this machine.
        choices: Choices made by measurement, in words.
        expected: The latency on the device of a table of times, if one was given.
        provider: The execution provider that models ran on.
        int8: The same of the result in int8, where one was asked for.
    """

    model: str
    before: Totals
    after: Totals
    groups: tuple[GroupReport, ...]
    filters: int
    prunable: float
    frozen: Mapping[str, int]
    declined: tuple[str, ...]
    verification: Verification | None = None
    criterion: str = ""
    warnings: tuple[str, ...] = ()
    calibration: str = ""
    figures: Figures | None = None
    measured_on: str = ""
    quality: Mapping[str, float] = field(default_factory=dict)
    held_out: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    latency: Latency | None = None
    inputs: tuple[FedValues, ...] = ()
    data: DataRecord | None = None
    choices: tuple[str, ...] = ()
    expected: Expected | None = None
    provider: str = ""
    int8: Int8Report | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        document = asdict(self)
        document["kept"] = {
            "macs": self.after.macs / max(self.before.macs, 1),
            "params": self.after.params / max(self.before.params, 1),
            "bytes": self.after.bytes / max(self.before.bytes, 1),
        }
        data = document.pop("data")
        document["calibration"] = {"description": self.calibration} | (data or {})
        document["frozen"] = coded(self.frozen)
        plain: dict[str, Any] = finite(document)
        return plain


def with_latency(report: Report, latency: Latency, instead: str = "") -> Report:
    """The report with another measurement of latency, and the remarks on it.

    Args:
        report: The report.
        latency: The measurement.
        instead: Warning to use instead of the usual one, if the result is slower.
    """
    lines = (instead,) if instead and latency.slower else slowness(latency)
    said = {*slowness(report.latency), *undecided(report.latency)}
    return replace(
        report, latency=latency,
        warnings=(*lines, *(line for line in report.warnings if line not in said)),
        choices=(*(line for line in report.choices if line not in said), *undecided(latency)),
    )  # fmt: skip


def slowness(latency: Latency | None) -> tuple[str, ...]:
    """A warning if the result was measured to be slower than the original."""
    if latency is None or not latency.slower:
        return ()
    return (
        f"the pruned model is slower than the original on this machine ({latency.ratio:.1%} of its time): "
        "deploy the original there, or set a budget of time with --latency",
    )


def undecided(latency: Latency | None) -> tuple[str, ...]:
    """A line if the measurement leaves open whether the result is faster."""
    if latency is None or not latency.undecided:
        return ()
    return (f"latency: undecided, because the interval of the ratio ({latency.share}) contains 100%",)


def group_reports(analysis: Analysis, removed: IntArray) -> tuple[GroupReport, ...]:
    """Widths of all groups before and after."""
    structure = analysis.structure
    filters = produced_filter_counts(PruningContext.of(analysis.model, structure, analysis.cost, None)).astype(np.int64)
    cut = np.bincount(structure.group_of[removed], minlength=len(structure.groups)) if len(removed) else None
    result = []
    for group in structure.groups:
        lost = 0 if cut is None else int(cut[group.index])
        layers = tuple(analysis.nodes[n].name or analysis.nodes[n].output[0] for n in group.producers)
        result.append(
            GroupReport(
                name=group_name(analysis, group.index),
                layers=layers,
                width=group.width,
                kept=group.width - lost,
                exact=group.exact,
                filters=int(filters[group.units[0]]),
            )
        )
    return tuple(result)
