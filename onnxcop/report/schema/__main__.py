"""Print the JSON Schema: `python -m onnxcop.report.schema`."""

from __future__ import annotations

import json

from onnxcop.report.schema import json_schema

print(json.dumps(json_schema(), indent=1))
