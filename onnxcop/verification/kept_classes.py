"""Models with fewer classes, and the proof that the remaining outputs are the original's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import Array, FloatArray, IntArray
from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.analysis.classes import ClassAxis, find_classes, has_classes, open_rules
from onnxcop.analysis.kept_classes import ClassWish, KeptClasses
from onnxcop.coupling.ops import RuleTable, known_rules
from onnxcop.errors import ModelError, VerificationError
from onnxcop.graph.shapes import Shape
from onnxcop.rewrite.classes import cut_classes
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.verification.difference import tolerance
from onnxcop.verification.verify import check_valid

_AXES = (-1, 1)  # where classes are: on the last axis or, in images and detectors, behind the samples
_DRAWS = 2  # random inputs for both models
_FAINT = 1e-30  # of the probabilities that stay; smaller sums are rounding


def analyze_kept(
    model: onnx.ModelProto | str | Path,
    wish: ClassWish | None,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    rules: RuleTable | None = None,
    options: EngineOptions = EngineOptions(),
    **arguments: Any,
) -> Analysis:
    """Analyse a model reduced to some of its classes, or unchanged if none are named.

    Args:
        model: A path or a model in memory (never changed).
        wish: The classes to keep; None for all.
        input_shapes: Concrete shapes for dynamic inputs, by name.
        rules: The operator rules.
        options: How to run models.
        arguments: Other arguments of :func:`onnxcop.analysis.analyze.analyze`.

    Raises:
        ModelError: The model cannot be read, or its classes cannot be reduced.
        VerificationError: The outputs of the reduced model are not the original's.
    """
    if wish is None:
        return analyze(model, input_shapes=input_shapes, rules=rules, options=options, **arguments)
    weighed: list[IntArray] = []
    opening = open_rules(rules or known_rules(), weighed)
    for axis in _AXES:
        weighed.clear()
        opened = analyze(model, input_shapes=input_shapes, rules=opening, options=options, open_axis=axis)
        if has_classes(opened, wish):
            break
    axes, kept = find_classes(opened, wish)
    softmax = _weighs(opened, axes[0], weighed)
    if softmax and len(kept.kept) == 1:
        raise ModelError("--classes: a softmax over a single class is always 1; keep two classes or more")
    result = cut_classes(opened, axes, kept)
    kept = replace(kept, renormalized=_prove(opened, result, axes, kept, softmax, options))
    analysis = analyze(result, input_shapes=opened.input_shapes, rules=rules, options=options, **arguments)
    return replace(analysis, source=opened.source, images=opened.images, sha256=_identity(kept), kept=kept)


def _identity(kept: KeptClasses) -> str:
    """Identity of a model with fewer classes: it follows from the original's and from the kept classes."""
    return hashlib.sha256(json.dumps([kept.original, kept.output, list(kept.kept)]).encode()).hexdigest()


def _weighs(analysis: Analysis, place: ClassAxis, weighed: Sequence[IntArray]) -> bool:
    """Whether a softmax runs over the classes."""
    return any(np.isin(place.units, analysis.structure.units_on(atoms)).any() for atoms in weighed)


def _prove(
    analysis: Analysis, result: onnx.ModelProto, axes: Sequence[ClassAxis], kept: KeptClasses, softmax: bool,
    options: EngineOptions,
) -> bool:  # fmt: skip
    """Check that a reduced model returns the original's values for the classes that stay.

    Returns:
        Whether an output holds probabilities renormalized over the kept classes, not the original's own values.

    Raises:
        VerificationError: An output is neither.
    """
    check_valid(result, analysis.original)
    renormalized = False
    places = {entry.output: entry for entry in axes}
    with Session(analysis.original, options) as before, Session(result, options) as after:
        for seed in range(_DRAWS):
            shapes: Mapping[str, Shape] = analysis.input_shapes
            feeds = random_feeds(analysis.original, shapes, seed)
            old, new = before.run(feeds), after.run(feeds)
            for name, values in old.items():
                if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
                    renormalized |= _same(name, values, new[name], places.get(name), kept, softmax)
    return renormalized


def _same(name: str, original: Array, given: Any, place: ClassAxis | None, kept: KeptClasses, softmax: bool) -> bool:
    """Whether an output is renormalized over the kept classes; False if it holds the original's values."""
    if place is None:
        _require(name, _gap(original, given))
        return False
    axis, past = place.axis, place.first + kept.count
    classes = np.take(original, place.first + np.array(kept.kept, dtype=np.int64), axis=axis)
    others = (
        np.take(original, np.arange(place.first), axis),
        np.take(original, np.arange(past, original.shape[axis]), axis),
    )
    parts = np.split(given, np.cumsum([others[0].shape[axis], classes.shape[axis]]), axis=axis)
    for one, other in zip(others, (parts[0], parts[2]), strict=True):  # boxes and the like, each on its own scale
        if one.size or other.size:
            _require(name, _gap(one, other))
    gaps = [_gap(classes, parts[1])]
    if softmax:
        gaps += [_gap(shares, parts[1]) for shares in _shares(classes.astype(np.float64), axis)]
    best = min(range(len(gaps)), key=lambda index: gaps[index][0])
    _require(name, gaps[best])
    return best > 0


def _shares(values: FloatArray, axis: int) -> tuple[FloatArray, FloatArray]:
    """Probabilities renormalized to sum to one, and their logarithms, if `values` are either."""
    total = values.sum(axis=axis, keepdims=True)
    one = np.where(np.abs(total) > _FAINT, values / np.where(np.abs(total) > _FAINT, total, 1.0), np.nan)
    top = values.max(axis=axis, keepdims=True)
    two = values - top - np.log(np.exp(values - top).sum(axis=axis, keepdims=True))
    return one, two


def _gap(expected: Array, given: Array) -> tuple[float, float]:
    """The largest difference relative to the largest value, and the allowed one."""
    one, two = expected.astype(np.float64), given.astype(np.float64)
    finite = np.isfinite(one)
    if one.shape != two.shape or not finite.any():
        return float("inf"), 0.0
    scale = max(float(np.abs(one[finite]).max()), 1e-12)
    return float(np.abs(one - two)[finite].max()) / scale, tolerance(given)


def _require(name: str, gap: tuple[float, float]) -> None:
    if not gap[0] <= gap[1]:
        raise VerificationError(
            f"--classes: output {name!r} of the cut model is not what the original gives out of these classes "
            f"(off by {gap[0]:.2g} of its largest value); its classes cannot be cut"
        )
