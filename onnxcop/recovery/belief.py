"""Consistency check: the divergence that recovery expected against that of the written file.

Every choice is made on the masked network, in the original's shapes. On the same samples the file must give the same
outputs up to rounding. If it does not, choices were based on wrong figures and nothing may be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxcop._base.types import Array, Feed
from onnxcop.analysis.census import group_name
from onnxcop.errors import InternalError
from onnxcop.graph.io import WeightFile
from onnxcop.outputs.batches import answers_to
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.reconstruction.divergence import Divergence, Reference
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.session import EngineOptions

_ROUNDING = 0.02  # of the outputs' size; a different order of sums explains less, even after many layers
_SHARE, _LEAST = 0.05, 5e-4  # allowed difference: of the divergence, and absolute
_NAMED = 3  # groups to name in a message
_FLOOR = 1e-30


@dataclass(frozen=True)
class Belief:
    """A recovered network on held-out samples.

    Attributes:
        network: The recovered network.
        feeds: The samples, by batch.
        reference: The original's outputs on them.
        options: How to run models.
        crew: Runs them on the samples.
    """

    network: MaskedNetwork
    feeds: Sequence[Feed]
    reference: Reference
    options: EngineOptions
    crew: Crew = HERE

    def check(self, written: onnx.ModelProto) -> Divergence:
        """Run the written model and compare it with the recovered network.

        Args:
            written: The network cut to size.

        Returns:
            Its distance from the original, on these samples.

        Raises:
            InternalError: It computes something else; the message names the groups.
        """
        believed, actual = self._run(self.network.masked()), self._run(self._light(written))
        expected, divergence = self.reference.compare(believed), self.reference.compare(actual)
        # Outputs alone may jump if the model rounds or picks the best of many; the printed figures may not.
        apart = abs(divergence.value - expected.value) > max(_SHARE * expected.value, _LEAST)
        if apart and disagreement(believed, actual) > _ROUNDING:
            raise InternalError(
                f"the written model has a divergence of {divergence.value:.3g}, the search expected "
                f"{expected.value:.3g}, because of {self._culprits()}; nothing was written; keep these layers "
                "with --keep, and please report the model"
            )
        return divergence

    def _light(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A model that ONNX Runtime maps from the file of the network's weights, where these are in one."""
        file = WeightFile.of(self.network.model)
        return model if file is None else file.light(model)

    def _run(self, model: onnx.ModelProto) -> list[Feed]:
        return list(answers_to(model, self.feeds, self.options, self.crew))

    def _culprits(self) -> str:
        """Names of the groups whose removal alone changes the result; all groups if none does alone."""
        structure, analysis = self.network.analysis.structure, self.network.analysis
        removed = self.network.removed()
        groups = np.unique(structure.group_of[removed]).tolist()
        blamed = [group for group in groups if self._alone(removed[structure.group_of[removed] == group]) > _ROUNDING]
        names = [group_name(analysis, group) for group in blamed or groups]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return ", ".join(names[:_NAMED]) + more

    def _alone(self, units: Array) -> float:
        """Difference of the recovered network and the written file if only some units are removed."""
        alone = self.network.copy()
        alone.alive[:] = True
        alone.alive[units] = False
        written = apply(alone.model, alone.analysis.structure, alone.removed())
        return disagreement(self._run(alone.masked()), self._run(written))


def disagreement(believed: Sequence[Mapping[str, Array]], actual: Sequence[Mapping[str, Array]]) -> float:
    """Difference of outputs from the expected ones: ‖found - believed‖ / ‖believed‖, of the worst output.

    Infinite if shapes differ, or if values are finite in one of them only.
    """
    worst = 0.0
    for name, first in believed[0].items():
        if not isinstance(first, np.ndarray) or first.dtype.kind != "f":
            continue
        gap = total = 0.0
        for mine, other in zip(believed, actual, strict=True):
            a, b = mine[name].astype(np.float64), other[name].astype(np.float64)
            if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
                return float("inf")
            known = np.isfinite(a)
            gap += float(((a - b)[known] ** 2).sum())
            total += float((a[known] ** 2).sum())
        worst = max(worst, float(np.sqrt(gap / max(total, _FLOOR))) if gap else 0.0)
    return worst
