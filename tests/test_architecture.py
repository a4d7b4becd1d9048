"""The shape of the package: imports go one way, modules stay small, and the documentation lists them all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import REPO_ROOT

PACKAGE = REPO_ROOT / "onnxcop"
MOST_LINES = 300
MOST_STATEMENT_LINES = 60

# What faces the user; the engine below knows nothing of it.
FACE = ("__main__", "cli", "console")


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by name, without the package's own."""
    paths = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for path, name in paths.items() if name != "__init__"}


def is_face(name: str) -> bool:
    return name.startswith(FACE)


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that are imported anywhere in a tree, inside functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("onnxcop.") for alias in node.names if alias.name.startswith("onnxcop.")
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "onnxcop":
            inside = (node.module or "").partition(".")[2]
            for alias in node.names:
                yield from (".".join(filter(None, parts)) for parts in ((inside, alias.name), (inside,)))


def graph() -> dict[str, set[str]]:
    """The modules that each one imports; those of a package's own are taken from its `__init__`."""
    known = {name: name for name in modules()} | {"ops": "ops.__init__"}
    return {
        name: {known[other] for other in imported(tree) if other in known} - {name} for name, tree in modules().items()
    }


def test_imports_have_no_circles() -> None:
    order = list(TopologicalSorter(graph()).static_order())
    assert order.index("atoms") < order.index("tracing") < order.index("pipeline") < order.index("cli")


def test_the_engine_does_not_know_the_command_line() -> None:
    upward = {
        name: found for name, used in graph().items() if not is_face(name) and (found := {*filter(is_face, used)})
    }
    assert not upward


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


def source(name: str) -> Path:
    return PACKAGE / Path(*name.split(".")).with_suffix(".py")


def statement_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    documentation = ast.get_docstring(function, clean=False)
    return (function.end_lineno or 0) - function.lineno + 1 - len((documentation or "").splitlines())


def test_the_architecture_lists_every_module_by_its_first_line() -> None:
    text = (REPO_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = [line for line in text.split("## Every module")[1].splitlines() if line.startswith("- ")]
    wanted = {
        f"- `{name.removesuffix('.__init__').replace('.', '/')}`: {first_paragraph(tree)}"
        for name, tree in modules().items()
        if name != "__main__"
    }
    assert sorted(listed) == sorted(wanted)


def first_paragraph(tree: ast.Module) -> str:
    return " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
