"""A later check of a pruned model against the original and the plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop.errors import VerificationError
from onnxcop.graph import io as models
from onnxcop.graph.check import tensors
from onnxcop.graph.constants import constant_tensors
from onnxcop.graph.edit import copied, replace_all
from onnxcop.rewrite.apply import apply
from onnxcop.rewrite.plan import PruningPlan, units_of
from onnxcop.runtime.session import EngineOptions
from onnxcop.verification.kept_classes import analyze_kept
from onnxcop.verification.verify import Verification, check_border, check_runs, check_valid, verify


@dataclass(frozen=True, slots=True)
class Recheck:
    """Result of the check.

    Attributes:
        removed: How many units the plan removes.
        tensors: How many stored tensors were found to have the planned shapes and types.
        changed: Names of those whose values are not the plan's: recovered or trained since.
        verification: The comparison with the masked original; None if the weights have changed, because then nothing is
            comparable.
        notes: What could not be checked, and why.
    """

    removed: int
    tensors: int
    changed: tuple[str, ...]
    verification: Verification | None
    notes: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The checks in one line."""
        shapes = f"the ONNX checker, a run, and the shapes of {self.tensors} stored tensors"
        if self.verification is None:
            return (
                f"structure only: {shapes} agree with the plan; {len(self.changed)} of them hold "
                "other values than the plan gives, so outputs were not compared"
            )
        verification = self.verification
        if verification.max_difference is None:
            return f"{shapes} agree with the plan; outputs were not compared"
        gap = "exactly" if verification.max_difference == 0 else f"to {verification.max_difference:.1e}"
        text = f"{shapes} agree with the plan; it equals the masked original {gap}"
        if verification.inexact_units:
            text += f" ({verification.inexact_units} inexact of {self.removed} units left out of that)"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "summary": self.summary}


def recheck(
    original: onnx.ModelProto | str | Path,
    pruned: onnx.ModelProto | str | Path,
    plan: PruningPlan,
    *,
    options: EngineOptions = EngineOptions(),
    structure_only: bool = False,
) -> Recheck:
    """Check that a model is the original with a plan applied.

    Args:
        original: The model that the plan was made for.
        pruned: The model to check.
        plan: The plan.
        options: How to run both.
        structure_only: Accept weights that differ from those of the plan, e.g. after training.

    Raises:
        PlanMismatchError: The plan belongs to another original.
        VerificationError: The pruned model is not the original with the plan applied.
    """
    analysis = analyze_kept(original, plan.wish, input_shapes=plan.input_shapes, policy=plan.policy, options=options)
    removed = np.sort(units_of(analysis, plan))
    given = models.load(pruned)
    name = "the pruned model" if isinstance(pruned, onnx.ModelProto) else str(pruned)
    expected = apply(analysis.model, analysis.structure, removed)
    analysis.undo(expected)
    recovered = plan.settings.get("recover") not in (None, "none")
    tensors, changed = _compare_tensors(expected, given, name)
    same_nodes = [_signature(node) for node in given.graph.node] == [_signature(node) for node in expected.graph.node]
    if not changed and same_nodes:
        verification = verify(analysis.model, given, analysis.structure, removed, options)
        return Recheck(
            removed=len(removed), tensors=tensors, changed=(), verification=verification, notes=verification.notes
        )
    if not (structure_only or recovered):
        what = f"{changed[0]!r} holds other values" if changed else "its nodes are not the same"
        raise VerificationError(
            f"{name} is not what the plan makes: {what}; if it was trained since, check its shapes "
            "alone with --structure-only"
        )
    notes = check_valid(given, analysis.original)
    check_border(analysis.original, given)
    check_runs(analysis.original, given, analysis.input_shapes, options)
    return Recheck(removed=len(removed), tensors=tensors, changed=tuple(changed), verification=None, notes=notes)


def _compare_tensors(expected: onnx.ModelProto, given: onnx.ModelProto, name: str) -> tuple[int, list[str]]:
    """Check the shapes and types of all stored tensors; return their number and the names of those with other values.

    Raises:
        VerificationError: A tensor is missing or has another shape or type.
    """
    given_tensors = constant_tensors(given)
    expected_tensors = constant_tensors(expected)
    changed = []
    for key, target in expected_tensors.items():
        actual = given_tensors.get(key)
        if actual is None:
            raise VerificationError(f"{name} has no tensor {key!r}, which the plan keeps")
        if (actual.data_type, list(actual.dims)) != (target.data_type, list(target.dims)):
            raise VerificationError(f"{name}: tensor {key!r} is {_kind(actual)}, the plan makes it {_kind(target)}")
        one, two = numpy_helper.to_array(actual), numpy_helper.to_array(target)
        if one.tobytes() != two.tobytes():
            changed.append(key)
    return len(expected_tensors), changed


def _kind(tensor: onnx.TensorProto) -> str:
    return f"{onnx.TensorProto.DataType.Name(tensor.data_type)}{list(tensor.dims)}"


def _signature(node: onnx.NodeProto) -> bytes:
    """The computation of a node: without its name, doc string and the values of constants."""
    bare = copied(node)
    bare.ClearField("name")
    bare.ClearField("doc_string")
    if node.op_type == "Constant":
        bare.ClearField("attribute")
    for attribute in bare.attribute:
        attribute.ClearField("doc_string")
        for tensor in tensors(attribute.g) if attribute.type == attribute.GRAPH else ():
            kind, dims = tensor.data_type, list(tensor.dims)
            tensor.Clear()
            tensor.data_type = kind
            tensor.dims.extend(dims)
    ordered = sorted(bare.attribute, key=lambda attribute: attribute.name)
    replace_all(bare.attribute, ordered)
    return bytes(bare.SerializeToString(deterministic=True))
