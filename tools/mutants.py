"""Mutation testing: what of the heart of the package can be changed without a test noticing.

Mutants come from cosmic-ray's operators, and from taking out calls, which it has no operator for. Each runs in a
process forked from one that has the libraries loaded already, on the tests that are named beside its module.

    pip install cosmic-ray
    python tools/mutants.py --sample 40 --out mutants.json                # all modules, 40 mutants each
    python tools/mutants.py --module onnxcop/rewrite/sizes.py --show      # one, with the diff of every survivor
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_RULES = "tests/coupling/ops/test_rules.py"
_PROVEN = "tests/coupling/test_exports.py::test_pruned_and_proven"
_BODIES = "tests/coupling/test_bodies.py::test_pruned_equals_masked"
# Modules with the tests that are to notice a change: quick ones, the most telling first.
TARGETS: dict[str, list[str]] = {
    "onnxcop/coupling/atoms.py": [
        "tests/coupling/test_atoms.py",
        "tests/coupling/test_joined.py", f"{_RULES}::test_rule[Concat]", f"{_RULES}::test_rule[Add]",
    ],
    "onnxcop/coupling/ops/movement.py": [
        "tests/coupling/test_joined.py",
        *(f"{_RULES}::test_rule[{name}]" for name in (
            "Concat", "Transpose", "Split", "Slice", "Expand", "ConstantOfShape", "Pad", "Tile", "DepthToSpace",
            "SpaceToDepth", "Resize", "Squeeze", "Unsqueeze", "Shape", "Range",
        )),
    ],
    "onnxcop/coupling/groups.py": [
        "tests/coupling/test_groups.py", _PROVEN,
        "tests/coupling/test_bodies.py::test_work_is_counted_as_often_as_it_is_done",
    ],
    "onnxcop/coupling/tracing.py": [
        "tests/analysis/test_folding.py", _BODIES,
        "tests/coupling/test_bodies.py::test_unknown_bodies_freeze_what_they_read",
        _PROVEN, "tests/coupling/test_exports.py::test_layouts_turn_around_layers",
    ],
    "onnxcop/rewrite/apply.py": [_PROVEN, _BODIES, "tests/rewrite/test_blocks.py::test_equals_the_masked_original"],
    "onnxcop/rewrite/edit.py": [
        _PROVEN, _BODIES, "tests/coupling/test_exports.py::test_initializers_stay_inputs_with_their_new_shapes",
        "tests/coupling/test_exports.py::test_weights_in_constant_nodes_shrink", f"{_RULES}::test_rule[Reshape]",
        f"{_RULES}::test_rule[Gather]",
    ],
    "onnxcop/rewrite/sizes.py": [
        "tests/rewrite/test_sizes.py", _PROVEN, f"{_RULES}::test_rule[Reshape]", f"{_RULES}::test_rule[Gather]",
    ],
    "onnxcop/rewrite/plan.py": ["tests/rewrite/test_plan.py"],
    "onnxcop/verification/difference.py": ["tests/verification/test_difference.py"],
    "onnxcop/verification/masked_model.py": [
        "tests/verification/test_masked.py", f"{_RULES}::test_rule[MatMulInteger]", _BODIES,
        "tests/verification/test_proof.py",
    ],
    "onnxcop/verification/verify.py": [
        "tests/verification/test_checks.py", "tests/verification/test_difference.py",
        "tests/verification/test_proof.py",
    ],
    "onnxcop/reconstruction/normal_equations.py": ["tests/reconstruction/test_normal_equations.py"],
    "onnxcop/reconstruction/obs.py": ["tests/reconstruction/test_surgeon.py"],
    "onnxcop/reconstruction/refine.py": ["tests/reconstruction/test_refine.py"],
    "onnxcop/reconstruction/ridge.py": ["tests/reconstruction/test_surgeon.py"],
}  # fmt: skip
_OPERATORS = [
    *(f"ReplaceComparisonOperator_{pair}" for pair in (
        "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Lt_Gt", "Gt_Lt", "Is_IsNot", "IsNot_Is",
    )),
    *(f"ReplaceBinaryOperator_{pair}" for pair in (
        "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Add", "BitAnd_BitOr", "BitOr_BitAnd",
    )),
    "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "AddNot",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_USub", "NumberReplacer", "ZeroIterationForLoop", "ExceptionReplacer",
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    operator: str
    line: int
    code: str
    diff: str


def mutants_of(module: str) -> list[Mutant]:
    """Every change of a module that is one, and not of an annotation or a doc string."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / module).read_text(encoding="utf-8")
    plain, found, seen = _meaning(source), [], {source}
    known = set(operator_names())
    for name in _OPERATORS:
        if f"core/{name}" not in known:
            continue
        for occurrence in range(10_000):
            code = mutate_code(source, get_operator(f"core/{name}")(), occurrence)
            if code is None:
                break
            _note(found, seen, plain, module, name, source, code)
    for code in _without_calls(source):
        _note(found, seen, plain, module, "RemoveCall", source, code)
    return found


def _note(found: list[Mutant], seen: set[str], plain: str, module: str, operator: str, source: str, code: str) -> None:
    if code in seen:
        return
    seen.add(code)
    try:
        if _meaning(code) == plain:
            return
    except SyntaxError:
        return
    lines = list(difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm=""))
    changed = [line for line in lines[3:] if line[:1] in "+-"]
    line = int(lines[2].split()[1].split(",")[0].removeprefix("-"))
    found.append(Mutant(module, operator, line, code, "\n".join(changed)))


def _meaning(source: str) -> str:
    """A module without its annotations, doc strings and messages of errors, which change nothing that is computed."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
            for argument in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs):
                argument.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args = []
    return ast.dump(tree)


def _without_calls(source: str) -> list[str]:
    """The module with one call that stands for itself taken out, for every one."""
    lines = source.splitlines(keepends=True)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and node.end_lineno is not None:
            first, last = node.lineno - 1, node.end_lineno
            indent = lines[first][: node.col_offset]
            if not indent.strip():
                found.append("".join([*lines[:first], f"{indent}pass\n", *lines[last:]]))
    return found


def run(mutant: Mutant, copy: Path, tests: list[str], limit: float) -> str:
    """What became of a mutant: killed, survived or timeout (which counts as killed)."""
    path = copy / mutant.module
    original = path.read_text(encoding="utf-8")
    path.write_text(mutant.code, encoding="utf-8")
    try:
        return _tested(copy, tests, limit)
    finally:
        path.write_text(original, encoding="utf-8")


def _tested(copy: Path, tests: list[str], limit: float) -> str:
    child = os.fork()
    if child == 0:
        os.setsid()
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.chdir(copy)
        import pytest

        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", *tests])
        os._exit(min(int(code), 100))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def main() -> int:
    """Run mutants of modules and tell which survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", action="append", choices=list(TARGETS), help="only this one; may be given again")
    parser.add_argument("--sample", type=int, help="at most so many mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for the tests of one mutant")
    parser.add_argument("--show", action="store_true", help="print the change of every survivor")
    parser.add_argument("--out", type=Path, help="write all outcomes as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "copy"
        for name in ("onnxcop", "tests", "models", "pyproject.toml", "README.md"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                copy.mkdir(exist_ok=True)
                shutil.copy(source, copy / name)
        sys.path = [
            entry for entry in sys.path if ROOT not in (Path(entry or "."), *Path(entry or ".").resolve().parents)
        ]
        sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
        sys.path.insert(0, str(copy))
        sys.dont_write_bytecode = True
        outcomes = _all(options, copy)
    if options.out:
        options.out.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    return 0


def _all(options: argparse.Namespace, copy: Path) -> list[dict[str, object]]:
    # Loaded once, before the forks; nothing that starts threads of its own.
    import numpy  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import pytest  # noqa: F401
    import scipy.linalg  # noqa: F401

    outcomes: list[dict[str, object]] = []
    for module in options.module or TARGETS:
        tests = TARGETS[module]
        missing = [test for test in tests if not (copy / test.split("::")[0]).exists()]
        if missing or not (copy / module).exists():
            raise SystemExit(f"{module}: there is no {' or '.join(missing or [module])}; mend TARGETS")
        if _tested(copy, tests, 600) != "survived":
            raise SystemExit(f"the tests of {module} fail without a mutant: {' '.join(tests)}")
        chosen = mutants_of(module)
        total = len(chosen)
        if options.sample and options.sample < total:
            chosen = random.Random(f"{options.seed} {module}").sample(chosen, options.sample)
        counts: Counter[str] = Counter()
        for mutant in sorted(chosen, key=lambda m: m.line):
            outcome = run(mutant, copy, tests, options.limit)
            counts[outcome] += 1
            outcomes.append(
                {key: value for key, value in asdict(mutant).items() if key != "code"} | {"outcome": outcome}
            )
            if outcome == "survived" and options.show:
                print(f"{module}:{mutant.line} {mutant.operator}\n{mutant.diff}", flush=True)
        killed = counts["killed"] + counts["timeout"]
        print(f"| `{module}` | {total} | {len(chosen)} | {killed} | {killed / max(len(chosen), 1):.0%} |", flush=True)
    return outcomes


if __name__ == "__main__":
    raise SystemExit(main())
