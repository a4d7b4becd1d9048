"""Fewer classes: the head of a model reduced to some entries of its outputs, exactly.

Unlike pruning, this changes the shape of an output. The remaining entries are computed from the same numbers as before
and stay in order. A softmax over the classes runs over the remaining ones, so that they sum to one.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.classes import ClassAxis
from onnxcop.analysis.kept_classes import KeptClasses
from onnxcop.rewrite.apply import apply
from onnxcop.rewrite.sizes import kept_positions, pruned_shape

_NAMES = "names"  # the key of Ultralytics' metadata


def cut_classes(analysis: Analysis, axes: Sequence[ClassAxis], kept: KeptClasses) -> onnx.ModelProto:
    """A copy of a model that returns only some of its classes.

    Args:
        analysis: The model, analysed with open outputs.
        axes: The axes of the classes.
        kept: The classes to keep.

    Raises:
        ModelError: GraphSurgeon cannot represent the model.
    """
    dropped = np.setdiff1d(np.arange(kept.count), kept.kept)
    removed = np.sort(axes[0].units[dropped])
    result = apply(analysis.model, analysis.structure, removed)
    analysis.undo(result)
    keep = kept_positions(analysis.structure, removed)
    for value in result.graph.output:
        before = analysis.structure.coupling.shapes[value.name].shape
        after = pruned_shape(analysis.structure, value.name, keep)
        if before is None or after is None:
            continue
        for dim, old, new in zip(value.type.tensor_type.shape.dim, before, after, strict=True):
            if old != new:
                dim.dim_value = new
    _rename(result, kept)
    return result


def _rename(model: onnx.ModelProto, kept: KeptClasses) -> None:
    """Renumber the class names in the metadata, keeping their format."""
    for entry in model.metadata_props:
        if entry.key == _NAMES and kept.names:
            names: object = list(kept.names)
            if isinstance(ast.literal_eval(entry.value), Mapping):
                names = dict(enumerate(kept.names))
            entry.value = repr(names)
