"""The scripts in tools/ ask the package only for what it has."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.mark.parametrize("path", sorted(TOOLS.glob("*.py")), ids=lambda path: path.stem)
def test_what_it_imports_is_there(path: Path) -> None:
    asked = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "onnxcop"
        for alias in node.names
    ]
    assert not [f"{module}.{name}" for module, name in asked if not has(module, name)]


def has(module: str, name: str) -> bool:
    """Whether a module of the package has a name; True if it needs a library that is not installed."""
    if find_spec(module) is None:
        return False
    try:
        return hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None
    except ModuleNotFoundError as error:
        return not (error.name or "").startswith("onnxcop")
