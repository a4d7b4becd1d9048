"""The JSON Schema of results, reports, comparisons and errors; `python -m onnxcop.report.schema` prints it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def json_schema() -> dict[str, Any]:
    """The schema, draft 2020-12."""
    text = files("onnxcop.report.schema").joinpath("result.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
