"""The proof that a pruned model is correct, before anything is written.

Five checks: the ONNX checker with full shape inference, a session of ONNX Runtime, the names, types and shapes of
inputs and outputs, finite outputs of the right shapes, and, for exact groups, equality with the masked original on
random inputs. If sizes are dynamic, runs are repeated at other sizes than the analysed ones: a wrong constant size
shows only there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import onnx

from onnxcop._base.scratch import temporary_folder
from onnxcop._base.types import Feed, IntArray
from onnxcop.coupling.groups import Structure
from onnxcop.errors import EngineError, ModelError, VerificationError
from onnxcop.graph.io import LARGEST_SINGLE_FILE, WeightFile, save, weight_bytes, whole
from onnxcop.graph.serialize import file_size
from onnxcop.graph.shapes import Shape
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.inputs import model_inputs, other_shapes, random_feeds
from onnxcop.runtime.providers import TooNew
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.verification.dequantize import rounds
from onnxcop.verification.difference import difference, mixes_samples
from onnxcop.verification.masked_model import masked

LARGEST_COPIED = 32 * 2**20  # bytes of weights; those of larger models go to a file that all copies share
_LONG_RUN = 2.0  # seconds of one run, above which no other sizes are tried
_MIXED = "with other batches the original mixes samples, so only the analysed sizes were compared"
_UNREGISTERED = "is not a registered function/op"  # ONNX Runtime of an operator that it does not know
_FIX_SIZES = "fix the sizes of the model's inputs if others do not matter"


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of the verification.

    Attributes:
        max_difference: Largest difference from the masked original, relative to the largest absolute
            value of the output; None if no exact group was pruned.
        exact_units: Number of removed units that were compared with the masked original.
        inexact_units: Number of removed units in inexact groups, which were not compared.
        notes: What could not be checked, and why.
        other_shapes: Other input shapes with which the checks were repeated; empty if no size is dynamic, the original
            runs with no other, or a run takes long.
    """

    max_difference: float | None
    exact_units: int
    inexact_units: int
    notes: tuple[str, ...] = ()
    other_shapes: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def unproven(self) -> str:
        """The reason why the result is not known to equal the masked original.

        Empty if it is, or if nothing was removed.
        """
        if self.max_difference is not None or not self.exact_units + self.inexact_units:
            return ""
        if not self.exact_units:
            return "all removed units are inexact, so there is nothing that it should equal"
        return "its outputs were not compared with the masked original"


def verify(
    model: onnx.ModelProto,
    pruned: onnx.ModelProto,
    structure: Structure,
    removed: IntArray,
    options: EngineOptions = EngineOptions(),
    *,
    seed: int = 0,
) -> Verification:
    """Check a rewritten (not yet compensated) model against the masked original.

    Args:
        model: The original.
        pruned: The rewritten model; its weights may be in a file.
        structure: The original's structure.
        removed: The units removed.
        options: How to run both.
        seed: Seed of the random inputs.

    Raises:
        VerificationError: A check failed; the message says which and where.
    """
    file = WeightFile.of(pruned) or shared_file(model)
    if rounds(model):
        model, pruned, file = whole(model), whole(pruned), None
    stored = model
    if file is not None:
        model, pruned = file.light(model), file.light(pruned)
    notes = check_valid(pruned, model)
    check_border(model, pruned)
    shapes = {value.name: structure.coupling.shapes[value.name].shape or () for value in model_inputs(model)}
    other = check_runs(model, pruned, shapes, options, seed=seed)
    inexact = ~np.array([structure.groups[g].exact for g in structure.group_of[removed]], dtype=np.bool_)
    exact_part = removed[~inexact]
    worst = None
    if len(exact_part):
        context = pruned
        if inexact.any():
            context = apply(stored, structure, exact_part)
            context = context if file is None else file.light(context)
        reference = masked(stored, structure, exact_part, file)
        worst, note = _compare(
            reference, context, structure, exact_part,
            shapes=shapes, others=(other,) if other else (), options=options, seed=seed,
        )  # fmt: skip
        notes += note
        if _MIXED in note:
            other = {}
    return Verification(
        max_difference=worst,
        exact_units=len(exact_part),
        inexact_units=int(inexact.sum()),
        notes=notes,
        other_shapes=other,
    )


def shared_file(model: onnx.ModelProto) -> WeightFile | None:
    """The file that all copies of a large model share, or every copy and session would hold the weights once more.

    None if the model is small, or computes with rounded numbers, whose rounding is removed in memory.
    """
    if rounds(model):
        return None
    return WeightFile.of(model) or (WeightFile() if weight_bytes(model) > LARGEST_COPIED else None)


def check_valid(pruned: onnx.ModelProto, original: onnx.ModelProto) -> tuple[str, ...]:
    """Run the ONNX checker with full shape inference; a complaint that the original shares is only noted."""
    complaint = _complaint(pruned)
    if complaint is None:
        return ()
    before = _complaint(original)
    if before is None:
        raise VerificationError(f"the pruned model fails the ONNX checker: {complaint}")
    return (f"the ONNX checker refuses the original too: {before}",)


def _complaint(model: onnx.ModelProto) -> str | None:
    file = WeightFile.of(model)
    try:
        if file is not None:
            onnx.checker.check_model(str(file.written(model)), full_check=True)
        elif file_size(model) > LARGEST_SINGLE_FILE:
            with temporary_folder() as folder:
                path = folder / "model.onnx"
                save(model, path, external_data=True)
                onnx.checker.check_model(str(path), full_check=True)
        else:
            onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker and the inference raise exceptions of their own
        return " ".join(str(error).split())[:300]
    return None


def check_border(original: onnx.ModelProto, pruned: onnx.ModelProto) -> None:
    """Check that inputs and outputs keep their names, types and shapes."""

    def border(model: onnx.ModelProto, kind: str) -> list[onnx.ValueInfoProto]:
        stored = {tensor.name for tensor in model.graph.initializer}
        return [v for v in getattr(model.graph, kind) if kind == "output" or v.name not in stored]

    for kind in ("input", "output"):
        before, after = border(original, kind), border(pruned, kind)
        if [v.name for v in before] != [v.name for v in after]:
            raise VerificationError(f"the pruned model's {kind}s are {[v.name for v in after]}")
        for old, new in zip(before, after, strict=True):
            if old.type != new.type:
                raise VerificationError(f"{kind} {old.name!r} has another type or shape than in the original")


def check_runs(
    original: onnx.ModelProto,
    pruned: onnx.ModelProto,
    shapes: Mapping[str, Shape],
    options: EngineOptions,
    *,
    seed: int = 0,
) -> Mapping[str, Shape]:
    """Check that both models run, with outputs of the same shapes and types, finite if the original's are.

    Returns:
        Other shapes of the inputs with which both were run too; empty if the original runs with no other, or takes
        long.

    Raises:
        ModelError: The original does not run either.
        VerificationError: The pruned model does not run, or gives other shapes or types.
    """
    feeds = random_feeds(original, shapes, seed)
    old: Feed | None = None
    other: Mapping[str, Shape] = {}
    others: Feed = {}
    with suppress(EngineError), Session(original, options) as session:
        start = perf_counter()
        old = session.run(feeds)
        if perf_counter() - start <= _LONG_RUN:
            other, others = _first_other(original, session, shapes, seed)
    try:
        with Session(pruned, options) as session:
            new = session.run(feeds)
            if old is None:
                return {}  # the caller's inputs do not fit the original, so there is nothing to compare with
            _check_outputs(original, old, new)
            if other:
                _check_other(original, session, other, others, seed)
    except EngineError as error:
        require_running(original, feeds, options)
        raise VerificationError(f"the pruned model does not run: {error}") from None
    return other


def _first_other(
    original: onnx.ModelProto, session: Session, shapes: Mapping[str, Shape], seed: int
) -> tuple[Mapping[str, Shape], Feed]:
    """The first other shapes with which the original runs, and its outputs; empty if there are none."""
    for other in other_shapes(original, shapes):
        with suppress(EngineError):
            return other, session.run(random_feeds(original, other, seed))
    return {}, {}


def _check_other(original: onnx.ModelProto, session: Session, other: Mapping[str, Shape], old: Feed, seed: int) -> None:
    """Check that the pruned model runs with other shapes like the original."""
    try:
        new = session.run(random_feeds(original, other, seed))
    except EngineError as error:
        raise VerificationError(
            f"the pruned model does not run{_where(other)}, though the original does: {error}; {_FIX_SIZES}"
        ) from None
    _check_outputs(original, old, new, _where(other))


def _where(shapes: Mapping[str, Shape]) -> str:
    return " with " + ", ".join(f"{name} of {','.join(map(str, shape))}" for name, shape in shapes.items() if shape)


def _check_outputs(original: onnx.ModelProto, old: Feed, new: Feed, where: str = "") -> None:
    for name, after in new.items():
        before: Any = old[name]
        if not isinstance(before, np.ndarray):
            continue
        if before.shape != after.shape or before.dtype != after.dtype:
            if _data_dependent(original, name, before, after):
                continue
            raise VerificationError(
                f"output {name!r} is {after.dtype}{list(after.shape)}{where}, the original's is "
                f"{before.dtype}{list(before.shape)}" + (f"; {_FIX_SIZES}" if where else "")
            )
        if before.dtype.kind == "f" and np.isfinite(before).all() and not np.isfinite(after).all():
            raise VerificationError(f"output {name!r} of the pruned model is not finite{where}")


def require_running(model: onnx.ModelProto, feeds: Feed, options: EngineOptions) -> None:
    """Raise a ModelError if a model does not run on some inputs; the message says what to do."""
    try:
        with Session(model, options) as session:
            session.run(feeds)
    except TooNew as error:
        raise ModelError(f"the model does not run even before it is pruned: {error}") from None
    except EngineError as error:
        if _UNREGISTERED in str(error):
            raise ModelError(
                f"the model does not run even before it is pruned: {error}; give the library of that operator with "
                "--custom-ops"
            ) from None
        raise ModelError(
            f"the model does not run even before it is pruned: {error}; fix it, or give other input "
            "sizes with --input-shape"
        ) from None


def _data_dependent(model: onnx.ModelProto, name: str, before: Any, after: Any) -> bool:
    """Whether an output's size may depend on the data (detections that pass a threshold)."""
    value = next(v for v in model.graph.output if v.name == name)
    dims = value.type.tensor_type.shape.dim
    if before.dtype != after.dtype or before.ndim != after.ndim or len(dims) != before.ndim:
        return False
    sources = {"NonMaxSuppression", "NonZero", "Compress", "Unique"}
    if not any(node.op_type in sources for node in model.graph.node):
        return False
    return all(
        old == new or not dim.HasField("dim_value")
        for dim, old, new in zip(dims, before.shape, after.shape, strict=True)
    )


def _compare(
    reference: onnx.ModelProto, context: onnx.ModelProto, structure: Structure, removed: IntArray, *,
    shapes: Mapping[str, Shape], others: Sequence[Mapping[str, Shape]], options: EngineOptions, seed: int,
) -> tuple[float | None, tuple[str, ...]]:  # fmt: skip
    """Largest relative difference from the masked original on random inputs."""
    try:
        gap = difference(
            reference, context, structure, removed, shapes=shapes, others=others, options=options, seed=seed
        )
    except EngineError as error:
        return None, (f"the masked original could not be run: {error}",)
    if gap.worst is None:
        return None, ("no output is finite on random inputs, so nothing could be compared",)
    if gap.excessive and gap.shapes != shapes and mixes_samples(reference, shapes, gap.shapes or {}, options):
        value, notes = _compare(
            reference, context, structure, removed, shapes=shapes, others=(), options=options, seed=seed
        )
        return value, (*notes, _MIXED)
    if gap.excessive:
        where = _where(gap.shapes) if gap.shapes is not None and gap.shapes != shapes else ""
        raise VerificationError(
            f"tensor {gap.tensor!r} differs from the masked original by {gap.worst:.2g} of its largest "
            f"value{where} (allowed {gap.limit:.0e}); this is a bug, nothing was written"
            + (f"; {_FIX_SIZES}" if where else "")
        )
    if not gap.reacts:
        return gap.worst, ("nothing that was compared reacts to random inputs",)
    return gap.worst, ()
