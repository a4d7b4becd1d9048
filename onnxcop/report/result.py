"""The result of a run: the pruned model and the record of the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxcop._base.files import write_atomically
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.data.input_files import InputFiles
from onnxcop.errors import ModelError
from onnxcop.graph import io as models
from onnxcop.report import notebook as display
from onnxcop.report.document import Evidence, ReportData, report_data
from onnxcop.report.summary import Report
from onnxcop.rewrite.plan import PruningPlan


@dataclass(frozen=True)
class PruneResult:
    """A pruned model with its plan and report.

    Attributes:
        model: The pruned model.
        plan: The decision, replayable.
        report: The figures.
        stats: Statistics of the original, if they were gathered.
        evidence: Data for detailed reports; it keeps the original model in memory.
        int8: The pruned model in int8, if one was asked for.
    """

    model: onnx.ModelProto
    plan: PruningPlan
    report: Report
    stats: CalibrationStats | None = None
    evidence: Evidence | None = None
    int8: onnx.ModelProto | None = None

    def save(self, path: str | Path, *, external_data: bool | None = None) -> None:
        """Write the model; see :func:`onnxcop.graph.io.save`.

        Raises:
            ModelError: The path is the original's or that of its weights, or cannot be written.
        """
        self._refuse_source(Path(path))
        models.save(self.model, Path(path), external_data=external_data)

    def __repr__(self) -> str:
        """The kept shares, in a line."""
        return display.one_line(self.report)

    def __str__(self) -> str:
        """The table of the run, as text."""
        return display.as_text(self.report)

    def __rich__(self) -> Any:
        """The same for a console of rich."""
        return display.as_rich(self.report)

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        return display.as_html(self.report)

    def report_data(self, command: str = "") -> ReportData:
        """All data of a report, as plain data.

        Args:
            command: The command line of the run, if there was one.
        """
        if self.evidence is None:
            raise ModelError("this result has no data for a report; prune the model again")
        return report_data(self.report, self.plan, self.evidence, command)

    def save_report(self, path: str | Path) -> None:
        """Write a report; the suffix chooses its format.

        Args:
            path: A file ending in .html (one page that loads nothing), .md or .json.

        Raises:
            ModelError: Another suffix, or the file cannot be written.
        """
        from onnxcop.report.formats import rendered

        self._refuse_source(Path(path))
        write_atomically(Path(path), rendered(self.report_data(), Path(path)))

    def _refuse_source(self, path: Path) -> None:
        if self.evidence is not None:
            InputFiles([self.evidence.analysis.source]).refuse(path)
