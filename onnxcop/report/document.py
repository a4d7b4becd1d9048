"""Everything that a report shows, as plain data: the figures of a run and their provenance."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from onnxcop._base.records import JSON_VERSION, finite
from onnxcop._base.types import IntArray
from onnxcop.allocation.limits import Limits
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.inspect import FrozenLayer, frozen_layers
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.reconstruction.divergence import Waypoint
from onnxcop.report.correlations import Correlation, correlations
from onnxcop.report.importance import Importance, importance
from onnxcop.report.layers import LayerChange, layer_changes
from onnxcop.report.summary import Report
from onnxcop.rewrite.plan import PruningPlan

FORMAT, VERSION = "onnxcop-report", JSON_VERSION


@dataclass(frozen=True)
class Evidence:
    """Data of a finished run for its report.

    Attributes:
        analysis: The original model, traced.
        removed: int64, the removed units.
        stats: Statistics of the original, if there were data.
        way: Measurements after every step towards the budget.
        limits: The limits on what could be cut, if units were chosen.
    """

    analysis: Analysis
    removed: IntArray
    stats: CalibrationStats | None = None
    way: tuple[Waypoint, ...] = ()
    limits: Limits | None = None


@dataclass(frozen=True, slots=True)
class ReportData:
    """The contents of a report.

    Attributes:
        report: The numbers of the run.
        sha256: Identity of the original model.
        input_shapes: Input shapes of the analysis.
        command: The command line; empty if the run was started from Python.
        budget: The requested budget.
        criterion: Name and parameters of the criterion.
        settings: Everything else that led to the decision.
        versions: Versions of the programs, and the machine.
        layers: Width and cost of every layer before and after.
        frozen: Layers with filters that cannot be removed, with the reasons.
        way: Divergence at the remaining share of multiply-accumulates, step by step.
        correlations: Correlation matrices of layers.
        importance: Histograms of COP's importance, if available.
        left_out: Notes on contents that were left out.
    """

    report: Report
    sha256: str
    input_shapes: Mapping[str, tuple[int, ...]]
    command: str
    budget: Mapping[str, Any]
    criterion: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    layers: tuple[LayerChange, ...]
    frozen: tuple[FrozenLayer, ...]
    way: tuple[Waypoint, ...]
    correlations: tuple[Correlation, ...]
    importance: Importance | None
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that JSON cannot hold become null."""
        document = {
            "format": FORMAT, "version": VERSION, "model_sha256": self.sha256,
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "command": self.command, "budget": dict(self.budget), "criterion": dict(self.criterion),
            "settings": dict(self.settings), "versions": dict(self.versions), "summary": self.report.to_dict(),
            "layers": [asdict(layer) for layer in self.layers], "frozen": [asdict(layer) for layer in self.frozen],
            "curve": [asdict(point) for point in self.way],
            "importance": None if self.importance is None else asdict(self.importance),
            "correlations": [matrix.to_dict() for matrix in self.correlations], "left_out": list(self.left_out),
        }  # fmt: skip
        plain: dict[str, Any] = finite(document)
        return plain

    def to_json(self) -> str:
        """The JSON report."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, default=str) + "\n"


def report_data(report: Report, plan: PruningPlan, evidence: Evidence, command: str = "") -> ReportData:
    """Collect the contents of a report.

    Args:
        report: The numbers of the run.
        plan: The decision.
        evidence: Data of the run.
        command: The command line of the run.
    """
    analysis, removed = evidence.analysis, evidence.removed
    matrices, left_out = correlations(analysis, removed, evidence.stats)
    ranked = plan.settings.get("allocate") == "cop"
    return ReportData(
        report=report, sha256=plan.original, input_shapes=dict(analysis.input_shapes), command=command,
        budget=plan.budget, criterion=plan.criterion, settings=plan.settings, versions=versions(),
        layers=layer_changes(analysis, removed), frozen=frozen_layers(analysis), way=evidence.way,
        correlations=matrices, left_out=left_out,
        importance=importance(analysis, removed, evidence.stats, plan.criterion, ranked),
    )  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of the software that the run used."""
    import numpy
    import onnx
    import onnxruntime

    from onnxcop._version import __version__

    return {
        "onnxcop": __version__, "python": platform.python_version(), "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__, "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.release()} ({platform.machine()}, {os.cpu_count()} processors)",
    }  # fmt: skip
