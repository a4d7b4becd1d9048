"""An inner tensor that distillation compares besides the outputs.

Outputs are few numbers, so a student can match them on few samples for the wrong reasons. The last tensor before the
positions are pooled has far more of them; matching it as well is what makes training on few samples generalize
(MiR, Wang et al. 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop._base.types import IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.graph.edit import copied

_FEWEST_AXES = 3  # samples, channels and positions
FEATURE = "feature/"  # prefix of the name that both models give the compared tensor


@dataclass(frozen=True, slots=True)
class Feature:
    """A tensor that student and teacher both compute, the student with fewer channels.

    Attributes:
        tensor: Its name in both models.
        axis: The axis of channels.
        kept: int64, the teacher's channels that the student has.
        rank: Its number of axes.
    """

    tensor: str
    axis: int
    kept: IntArray
    rank: int

    @property
    def name(self) -> str:
        """Name of the compared tensor."""
        return FEATURE + self.tensor

    def of_teacher(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of the teacher that also returns the channels that the student has."""
        work = copied(model)
        places = f"{self.name}/channels"
        work.graph.initializer.append(numpy_helper.from_array(self.kept.astype(np.int64), places))
        work.graph.node.append(
            onnx.helper.make_node("Gather", [self.tensor, places], [self.name], self.name, axis=self.axis)
        )
        return self._returned(work)

    def of_student(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of the student that also returns the tensor."""
        work = copied(model)
        work.graph.node.append(onnx.helper.make_node("Identity", [self.tensor], [self.name], self.name))
        return self._returned(work)

    def _returned(self, model: onnx.ModelProto) -> onnx.ModelProto:
        sizes = [None] * self.rank  # the checker wants the rank, even if no size is known
        model.graph.output.append(onnx.helper.make_tensor_value_info(self.name, onnx.TensorProto.FLOAT, sizes))
        return model


def last_feature(analysis: Analysis, removed: IntArray, pruned: onnx.ModelProto) -> Feature | None:
    """The last tensor of full size whose channels are prunable; None if there is none that both models compute.

    Args:
        analysis: The original.
        removed: int64, the removed units.
        pruned: The student.
    """
    structure, coupling = analysis.structure, analysis.structure.coupling
    alive = np.ones(len(structure.unit_class) + 1, np.bool_)  # the last entry is for positions that cannot be removed
    alive[removed] = False
    both = _computed(analysis.original) & _computed(pruned)
    found: dict[bytes, tuple[int, Feature]] = {}  # by the units along the axis; those read last come last
    for name in (name for node in analysis.model.graph.node for name in node.output if name in both):
        info = coupling.shapes[name]
        if info.elem_type != onnx.TensorProto.FLOAT or info.shape is None or len(info.shape) < _FEWEST_AXES:
            continue
        on_axes = [None if atoms is None else structure.units_on(atoms) for atoms in coupling.labels.get(name, ())]
        prunable = [axis for axis, units in enumerate(on_axes) if units is not None and (units >= 0).any()]
        if len(prunable) != 1 or prunable[0] == 0:
            continue
        units = np.asarray(on_axes[prunable[0]])
        size, (known, feature) = math.prod(info.shape), found.pop(units.tobytes(), (0, None))
        if feature is None or size >= known:
            known, feature = size, Feature(name, prunable[0], np.flatnonzero(alive[units]), len(info.shape))
        found[units.tobytes()] = known, feature
    return list(found.values())[-1][1] if found else None


def _computed(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output if name}


__all__ = ["FEATURE", "Feature", "last_feature"]
