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
_C, _V, _W, _R = "tests/coupling", "tests/verification", "tests/rewrite", "tests/reconstruction"
_PROVEN = f"{_C}/test_exports.py::test_pruned_and_proven"
_BODIES = f"{_C}/test_bodies.py::test_pruned_equals_masked"
_CORNERS, _MACS = f"{_C}/ops/test_corners.py", f"{_C}/ops/test_macs.py"
_FUSED_BERT = f"{_C}/test_transformers.py::test_bert_with_fused_operators"


def _rules(*operators: str) -> list[str]:
    """The test of every rule of these operators; those with a dot are of ONNX Runtime."""
    names = (name.replace("ms.", "com.microsoft") for name in operators)
    return [f"{_C}/ops/test_rules.py::test_rule[{name}]" for name in names]


# Modules with the tests that are to notice a change: quick ones, the most telling first.
TARGETS: dict[str, list[str]] = {
    "onnxcop/coupling/atoms.py": [
        f"{_C}/test_atoms.py", f"{_C}/test_joined.py", *_rules("Concat", "Add"),
    ],
    "onnxcop/coupling/balance.py": [f"{_C}/test_shuffles.py", f"{_C}/test_atoms.py", *_rules("Conv", "ms.MoE")],
    "onnxcop/coupling/choices.py": [
        f"{_C}/test_choices.py",
        f"{_C}/test_transformers.py::test_fused_attention_gives_heads_or_else_dimensions",
        f"{_C}/test_transformers.py::test_groups_of_query_heads_or_else_their_members",
        f"{_C}/test_transformers.py::test_queries_give_way_to_keys_that_share_a_matrix_with_values",
        f"{_C}/test_transformers.py::test_attention_written_out",
    ],
    "onnxcop/coupling/control_flow.py": [f"{_C}/test_bodies.py"],
    "onnxcop/coupling/groups.py": [
        f"{_C}/test_groups.py", _PROVEN, f"{_C}/test_bodies.py::test_work_is_counted_as_often_as_it_is_done",
        f"{_C}/test_transformers.py::test_fused_attention_gives_heads_or_else_dimensions",
    ],
    "onnxcop/coupling/result.py": [f"{_C}/test_groups.py", f"{_C}/test_atoms.py", *_rules("Concat")],
    "onnxcop/coupling/shuffles.py": [f"{_C}/test_shuffles.py"],
    "onnxcop/coupling/tracing.py": [
        f"{_C}/test_bodies.py", f"{_C}/test_shuffles.py", "tests/analysis/test_folding.py", _PROVEN,
        f"{_C}/test_exports.py::test_layouts_turn_around_layers",
        *_rules("Reshape", "Gather", "Conv", "Slice", "ConstantOfShape"),
    ],
    "onnxcop/coupling/ops/__init__.py": [
        f"{_C}/ops/test_rules.py::test_every_table_entry_has_a_case", "tests/_base/test_plugins.py",
        *_rules("Range", "Add", "ReduceSum"),
    ],
    "onnxcop/coupling/ops/attention.py": [
        _MACS,
        *_rules("Attention", "RotaryEmbedding", "ms.Attention", "ms.GroupQueryAttention", "ms.MultiHeadAttention",
                "ms.QAttention", "ms.RotaryEmbedding"),
        f"{_C}/test_transformers.py::test_fused_attention_gives_heads_or_else_dimensions",
        f"{_C}/test_transformers.py::test_groups_of_query_heads_or_else_their_members",
    ],
    "onnxcop/coupling/ops/attention_heads.py": [
        _MACS,
        *_rules("Attention", "ms.Attention", "ms.GroupQueryAttention", "ms.MultiHeadAttention", "ms.QAttention"),
        f"{_C}/test_transformers.py::test_fused_attention_gives_heads_or_else_dimensions",
        f"{_C}/test_transformers.py::test_default_scale_is_written_down_with_fewer_dimensions",
        f"{_C}/test_transformers.py::test_groups_of_query_heads_or_else_their_members",
    ],
    "onnxcop/coupling/ops/blocked.py": [_CORNERS, _MACS, *_rules("ms.MatMulNBits", "ms.MoE"), f"{_C}/test_blocked.py"],
    "onnxcop/coupling/ops/contraction.py": [
        _CORNERS, _MACS,
        *_rules("Conv", "MatMul", "Gemm", "Einsum", "ConvTranspose", "ConvInteger", "MatMulInteger", "QLinearConv",
                "QLinearMatMul", "ms.FusedMatMul"),
    ],
    "onnxcop/coupling/ops/elementwise.py": [
        _CORNERS,
        *_rules("Add", "Relu", "BatchNormalization", "Clip", "Dropout", "PRelu", "QuantizeLinear", "DequantizeLinear",
                "Where", "Equal", "Less", "Mul", "Cast"),
    ],
    "onnxcop/coupling/ops/facts.py": [f"{_C}/test_groups.py", *_rules("Conv", "Concat", "Reshape"), _PROVEN],
    "onnxcop/coupling/ops/fused.py": [
        _CORNERS,
        *_rules("ms.FusedConv", "ms.FusedMatMul", "ms.BiasGelu", "ms.EmbedLayerNormalization",
                "ms.SkipLayerNormalization", "ms.SkipSimplifiedLayerNormalization", "ms.FastGelu"),
        _FUSED_BERT,
    ],
    "onnxcop/coupling/ops/indexing.py": [
        _CORNERS,
        *_rules("Gather", "GatherElements", "GatherND", "GridSample", "Pad", "RoiAlign", "ScatterElements",
                "ScatterND", "Slice", "Split", "MaxRoiPool"),
        "tests/analysis/test_dynamic.py",
    ],
    "onnxcop/coupling/ops/movement.py": [
        f"{_C}/test_joined.py",
        *_rules("Concat", "Transpose", "Expand", "ConstantOfShape", "Tile", "DepthToSpace", "SpaceToDepth", "Resize",
                "Squeeze", "Unsqueeze", "Shape", "Range", "Upsample", "Size", "EyeLike"),
    ],
    "onnxcop/coupling/ops/normalization.py": [
        _CORNERS,
        *_rules("Softmax", "LayerNormalization", "GroupNormalization", "InstanceNormalization", "LRN", "CumSum",
                "TopK", "ArgMax", "LpNormalization", "MeanVarianceNormalization", "Hardmax"),
    ],
    "onnxcop/coupling/ops/op.py": [
        _CORNERS,
        *_rules("Conv", "Reshape", "Concat", "Gather", "Softmax", "Resize", "Expand", "ms.MoE", "LSTM",
                "LayerNormalization", "BatchNormalization"),
    ],
    "onnxcop/coupling/ops/quantized.py": [
        *_rules("DynamicQuantizeLinear", "ms.DynamicQuantizeMatMul", "ms.MatMulIntegerToFloat", "ms.QGemm",
                "ms.QLinearAdd", "ms.QLinearAveragePool", "ms.QLinearConcat", "ms.QLinearLeakyRelu",
                "ms.QLinearSoftmax", "ms.QLinearWhere"),
        f"{_C}/test_quantized.py::test_statically_quantized", _CORNERS, _MACS,
    ],
    "onnxcop/coupling/ops/recurrent.py": [
        *_rules("LSTM", "GRU", "RNN"),
        f"{_C}/test_bodies.py::test_convolutions_before_and_states_of_a_recurrent_layer_are_cut",
        f"{_C}/test_bodies.py::test_a_recurrent_layer_in_a_branch_that_does_not_fit_is_declined",
        f"{_C}/test_bodies.py::test_a_recurrent_state_that_is_given_keeps_the_hidden_size_only",
    ],
    "onnxcop/coupling/ops/reduction.py": [
        _CORNERS,
        *_rules("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "GlobalAveragePool", "MaxPool", "ms.NhwcMaxPool"),
    ],
    "onnxcop/coupling/ops/reshape.py": [_CORNERS, *_rules("Reshape", "Flatten"), f"{_C}/test_shuffles.py"],
    "onnxcop/verification/agreement.py": ["tests/pipeline/test_versus.py"],
    "onnxcop/verification/dequantize.py": [f"{_V}/test_compare.py", f"{_C}/test_quantized.py"],
    "onnxcop/verification/difference.py": [f"{_V}/test_difference.py", f"{_V}/test_compare.py"],
    "onnxcop/verification/kept_classes.py": [f"{_V}/test_kept_classes.py"],
    "onnxcop/verification/masked_model.py": [
        f"{_V}/test_masked.py", *_rules("MatMulInteger"), _BODIES, f"{_V}/test_proof.py",
    ],
    "onnxcop/verification/recheck.py": [
        f"{_V}/test_recheck.py",
        "tests/cli/test_cli_commands.py::test_verify_compares_with_the_masked_original",
        "tests/cli/test_cli_commands.py::test_verify_refuses_changed_weights_by_default",
        "tests/cli/test_cli_commands.py::test_verify_knows_that_recovery_changes_weights",
        f"{_V}/test_kept_classes.py::test_the_result_says_what_was_kept_and_its_plan_replays",
    ],
    "onnxcop/verification/verify.py": [
        f"{_V}/test_checks.py", f"{_V}/test_difference.py", f"{_V}/test_proof.py", f"{_V}/test_compare.py",
    ],
    "onnxcop/rewrite/apply.py": [
        f"{_W}/test_apply.py", _PROVEN, _BODIES, f"{_W}/test_blocks.py::test_equals_the_masked_original",
        f"{_V}/test_memory.py::test_a_model_is_cut_alike_with_its_weights_in_a_file",
    ],
    "onnxcop/rewrite/blocks.py": [f"{_W}/test_blocks.py"],
    "onnxcop/rewrite/classes.py": [f"{_V}/test_kept_classes.py"],
    "onnxcop/rewrite/constants.py": [f"{_W}/test_blocks.py"],
    "onnxcop/rewrite/edit.py": [
        f"{_W}/test_apply.py", _PROVEN, f"{_C}/test_bodies.py",
        f"{_C}/test_exports.py::test_initializers_stay_inputs_with_their_new_shapes",
        f"{_C}/test_exports.py::test_weights_in_constant_nodes_shrink", *_rules("Reshape", "Gather"),
        f"{_C}/test_shuffles.py", f"{_W}/test_sizes.py", "tests/graph/test_old_opsets.py",
        f"{_V}/test_memory.py::test_a_model_is_cut_alike_with_its_weights_in_a_file",
    ],
    "onnxcop/rewrite/merge.py": [
        f"{_W}/test_apply.py", _PROVEN, f"{_C}/test_bodies.py",
        f"{_V}/test_memory.py::test_a_model_is_cut_alike_with_its_weights_in_a_file",
        f"{_C}/test_exports.py::test_initializers_stay_inputs_with_their_new_shapes",
    ],
    "onnxcop/rewrite/plan.py": [f"{_W}/test_plan.py"],
    "onnxcop/rewrite/provenance.py": [f"{_W}/test_provenance.py"],
    "onnxcop/rewrite/sizes.py": [f"{_W}/test_sizes.py", f"{_W}/test_apply.py", _PROVEN, *_rules("Reshape", "Gather")],
    "onnxcop/reconstruction/block_bases.py": [f"{_R}/test_block_streams.py"],
    "onnxcop/reconstruction/block_streams.py": [f"{_R}/test_block_streams.py", f"{_R}/test_products.py"],
    "onnxcop/reconstruction/divergence.py": [f"{_R}/test_divergence.py"],
    "onnxcop/reconstruction/linear_layers.py": [f"{_R}/test_refine.py", f"{_R}/test_refined_operators.py"],
    "onnxcop/reconstruction/linear_streams.py": [f"{_R}/test_streams.py"],
    "onnxcop/reconstruction/masks.py": [f"{_R}/test_masks.py"],
    "onnxcop/reconstruction/network.py": [f"{_R}/test_lookahead.py", f"{_R}/test_refine.py", f"{_R}/test_masks.py"],
    "onnxcop/reconstruction/normal_equations.py": [f"{_R}/test_normal_equations.py"],
    "onnxcop/reconstruction/obs.py": [f"{_R}/test_surgeon.py"],
    "onnxcop/reconstruction/principal.py": [f"{_R}/test_streams.py"],
    "onnxcop/reconstruction/products.py": [f"{_R}/test_products.py", f"{_R}/test_block_streams.py"],
    "onnxcop/reconstruction/propagation.py": [f"{_R}/test_lookahead.py"],
    "onnxcop/reconstruction/refine.py": [f"{_R}/test_refine.py"],
    "onnxcop/reconstruction/refine_batches.py": [f"{_R}/test_refine_batches.py", f"{_R}/test_refine.py"],
    "onnxcop/reconstruction/ridge.py": [f"{_R}/test_surgeon.py"],
    "onnxcop/reconstruction/spread.py": [f"{_R}/test_refine_batches.py"],
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

_GUARDS = ("strict", "frozen", "slots")

_WAIT = 40  # how many times longer than its limit of CPU time a run may last, on a busy machine


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    operator: str
    line: int
    code: str
    diff: str


def mutants_of(module: str, most: int | None = None, seed: int = 0) -> tuple[int, list[Mutant]]:
    """Changes of a module that mean something, of all places in an order that the seed draws.

    Args:
        module: Its path.
        most: How many; None for all.
        seed: Draws the order.

    Returns:
        The number of places where the module can be changed, and the changes in the order of their lines.
    """
    source = (ROOT / module).read_text(encoding="utf-8")
    plain, found, seen = _meaning(source), [], {source}
    shorter = _without_calls(source)
    places: list[tuple[str, int]] = [("RemoveCall", place) for place in range(len(shorter))]
    for name in _OPERATORS:
        places += [(name, place) for place in range(_count(source, name))]
    random.Random(f"{seed} {module}").shuffle(places)
    for name, place in places:
        if len(found) == most:
            break
        code = shorter[place] if name == "RemoveCall" else _changed(source, name, place)
        _note(found, seen, plain, module, name, source, code)
    return len(places), sorted(found, key=lambda mutant: mutant.line)


def _count(source: str, name: str) -> int:
    """In how many places an operator of cosmic-ray can change a module."""
    from cosmic_ray.ast import Visitor, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    if f"core/{name}" not in set(operator_names()):
        return 0
    operator, count = get_operator(f"core/{name}")(), 0

    class _Counter(Visitor):  # type: ignore[misc]  # cosmic-ray has no types
        def visit(self, node: object) -> object:
            nonlocal count
            count += sum(1 for _ in operator.mutation_positions(node))
            return node

    _Counter().walk(get_ast(source))
    return count


def _changed(source: str, name: str, place: int) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    return str(mutate_code(source, get_operator(f"core/{name}")(), place))


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
    """A module without annotations, doc strings, messages of errors and guards, which change nothing that is computed.

    Guards are assertions, `strict` of `zip`, and `frozen` and `slots` of a data class: they act only where the code
    around them is wrong.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            node.test, node.msg = ast.Constant(None), None
        elif isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg not in _GUARDS]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
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
        os.setpgid(0, 0)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.chdir(copy)
        import resource

        import pytest

        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 1))
        quiet = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "not slow"]
        code = pytest.main([*quiet, "-W", "ignore::pytest.PytestAssertRewriteWarning", *tests])
        os._exit(min(int(code), 100))
    end = time.monotonic() + _WAIT * limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return "timeout" if -code in (signal.SIGXCPU, signal.SIGKILL) else "killed" if code else "survived"
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
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of CPU for the tests of one mutant")
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
        outcomes = _all(options, copy)
    if options.out:
        options.out.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    return 0


def _all(options: argparse.Namespace, copy: Path) -> list[dict[str, object]]:
    # Loaded once, before the forks; nothing that starts threads, as onnxruntime does: locks of theirs would stay taken.
    import click  # noqa: F401
    import hypothesis.strategies  # noqa: F401
    import numpy  # noqa: F401
    import onnx  # noqa: F401
    import onnx_graphsurgeon  # noqa: F401
    import pytest  # noqa: F401
    import scipy.linalg
    import scipy.sparse.csgraph  # noqa: F401

    outcomes: list[dict[str, object]] = []
    for module in options.module or TARGETS:
        tests = TARGETS[module]
        missing = [test for test in tests if not (copy / test.split("::")[0]).exists()]
        if missing or not (copy / module).exists():
            raise SystemExit(f"{module}: there is no {' or '.join(missing or [module])}; mend TARGETS")
        sys.dont_write_bytecode = False  # all that does not change is compiled once
        if _tested(copy, tests, 600) != "survived":
            raise SystemExit(f"the tests of {module} fail without a mutant: {' '.join(tests)}")
        sys.dont_write_bytecode = True
        for compiled in (copy / module).parent.glob(f"__pycache__/{Path(module).stem}.*"):
            compiled.unlink()
        total, chosen = mutants_of(module, options.sample, options.seed)
        counts: Counter[str] = Counter()
        for mutant in chosen:
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
