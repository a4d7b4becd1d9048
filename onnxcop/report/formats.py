"""Report formats, by the suffix of the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnxcop.errors import ModelError

if TYPE_CHECKING:
    from onnxcop.report.document import ReportData

SUFFIXES = (".html", ".md", ".json")


def rendered(data: ReportData, path: Path) -> bytes:
    """A report in the format of its file's suffix.

    Raises:
        ModelError: There is no such format.
    """
    suffix = path.suffix.lower()
    if suffix == ".html":
        from onnxcop.report.pages import html

        return html(data).encode()
    if suffix == ".md":
        from onnxcop.report.pages import markdown

        return markdown(data).encode()
    if suffix == ".json":
        return data.to_json().encode()
    raise ModelError(f"{path}: a report is written to a file ending in {', '.join(SUFFIXES)}")
