"""The shape of the package: modules and folders stay small."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

from conftest import REPO_ROOT

PACKAGE = REPO_ROOT / "onnxcop"
MOST_LINES = 450
MOST_STATEMENT_LINES = 60


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by name, without the package's own."""
    paths = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for path, name in paths.items() if name != "__init__"}


def test_modules_and_functions_are_of_a_size_to_be_read() -> None:
    long = {name: lines for name in modules() if (lines := len(source(name).read_text().splitlines())) > MOST_LINES}
    assert not long
    functions = {
        f"{name}.{node.name}": lines
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (lines := statement_lines(node)) > MOST_STATEMENT_LINES
    }
    assert not functions


def test_folders_hold_at_most_16_modules() -> None:
    modules_of = Counter(path.parent for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    assert not {str(folder): count for folder, count in modules_of.items() if count > 16}


def source(name: str) -> Path:
    return PACKAGE / Path(*name.split(".")).with_suffix(".py")


def statement_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    documentation = ast.get_docstring(function, clean=False)
    return (function.end_lineno or 0) - function.lineno + 1 - len((documentation or "").splitlines())
