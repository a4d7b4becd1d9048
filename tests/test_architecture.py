"""The shape of the package: modules and folders stay small."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
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


def test_classes_are_made_with_at_most_four_positional_arguments() -> None:
    classes = {node.name for tree in modules().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    long = [
        f"{name}:{node.lineno} {called}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and (called := constructed(node, classes)) and len(node.args) > 4
    ]
    assert not long


def constructed(call: ast.Call, classes: set[str]) -> str:
    """The name of the class of the package that a call makes an instance of, if it does."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    return name if name in {*classes, "cls"} else ""


def test_folders_hold_at_most_16_modules() -> None:
    modules_of = Counter(path.parent for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    assert not {str(folder): count for folder, count in modules_of.items() if count > 16}


def source(name: str) -> Path:
    return PACKAGE / Path(*name.split(".")).with_suffix(".py")


def statement_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    documentation = ast.get_docstring(function, clean=False)
    return (function.end_lineno or 0) - function.lineno + 1 - len((documentation or "").splitlines())


# Packages


def floors() -> list[str]:
    """The packages from the top down, as the contract lists them."""
    contract = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = [layer.strip() for entry in contract["contracts"][0]["layers"] for layer in entry.split("|")]
    return [layer.removeprefix("onnxcop.") for layer in layers if (PACKAGE / layer.removeprefix("onnxcop.")).is_dir()]


def test_every_package_has_its_floor() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == {*floors()}
    text = (REPO_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Floors")[1].split("\n## ")[0]
    assert [line.split()[0] for line in text.splitlines() if line.startswith("    ")] == floors()


@pytest.mark.parametrize("package", floors())
def test_packages_say_what_they_are_for_what_they_import_and_where_to_start(package: str) -> None:
    tree = ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8"))
    said = " ".join((ast.get_docstring(tree) or "").split())
    below = floors()[floors().index(package) + 1 :]
    imported = re.search(r"may import (?:`(\w+)` and the packages below it|everything|nothing|every package)", said)
    assert imported is not None
    assert imported[1] is None or imported[1] in below
    started = re.search(r"[Ss]tart at ([^.:;]+)", said)
    assert started is not None
    starts = re.findall(r"`([\w/]+)`", started[1])
    assert starts
    for name in starts:
        path = PACKAGE / package / name
        assert path.with_suffix(".py").is_file() or path.is_dir(), name


def test_no_text_holds_marks_of_a_merge() -> None:
    texts = [path for folder in ("onnxcop", "docs", "tests", "tools") for path in (REPO_ROOT / folder).rglob("*.*")]
    texts = [*REPO_ROOT.glob("*.md"), *(path for path in texts if path.suffix in (".py", ".md", ".toml"))]
    marks = re.compile(r"^(<{7} |>{7} |={7}$)", re.MULTILINE)
    assert not [str(path) for path in texts if marks.search(path.read_text(encoding="utf-8"))]


def test_no_two_modules_define_the_same_name() -> None:
    homes: dict[str, list[str]] = {}
    for name, tree in modules().items():
        rules = name.startswith(("coupling.ops.", "gradient.rules."))  # functions there are named after operators
        kinds = ast.ClassDef if rules else (ast.ClassDef, ast.FunctionDef)
        for node in tree.body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(name)
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_pytest_finds_every_test_module_under_a_name_of_its_own() -> None:
    files = [path for path in (REPO_ROOT / "tests").rglob("test_*.py")]
    names = [path.name for path in files if not (path.parent / "__init__.py").exists()]
    assert sorted(names) == sorted({*names})
