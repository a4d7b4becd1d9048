"""What recovery believed of a network, held against what the written file gives.

Every choice is made on the masked network, in the original's shapes. If that network is what the file
computes, both give the same on the same samples, up to rounding; if not, choices were made by figures
that do not hold, and nothing may be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxcop._base.types import Array, Feed
from onnxcop.analysis.census import group_name
from onnxcop.errors import InternalError
from onnxcop.reconstruction.divergence import Divergence, Reference
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.session import EngineOptions, Session

_ROUNDING = 0.02  # of the outputs' size: sums in another order explain less, after many layers too
_SHARE, _LEAST = 0.05, 5e-4  # of the divergence, and in all, that it may differ by
_NAMED = 3  # groups in a message
_FLOOR = 1e-30


@dataclass(frozen=True)
class Belief:
    """A recovered network on held-out samples.

    Attributes:
        network: The network as it is now.
        feeds: The samples, by batch.
        reference: The original's outputs on them.
        options: How models are run.
    """

    network: MaskedNetwork
    feeds: Sequence[Feed]
    reference: Reference
    options: EngineOptions

    def check(self, written: onnx.ModelProto) -> Divergence:
        """Run what was written of the network, and compare it with what was believed.

        Args:
            written: The network cut to size.

        Returns:
            Its distance from the original, on these samples.

        Raises:
            InternalError: It does not compute what the network was believed to; the message names the groups.
        """
        believed, found = self._run(self.network.masked()), self._run(written)
        expected, divergence = self.reference.compare(believed), self.reference.compare(found)
        # Outputs alone may jump where the model rounds or picks the best of many; what is printed may not.
        apart = abs(divergence.value - expected.value) > max(_SHARE * expected.value, _LEAST)
        if apart and disagreement(believed, found) > _ROUNDING:
            raise InternalError(
                f"the written model has a divergence of {divergence.value:.3g}, the search expected "
                f"{expected.value:.3g}, because of {self._culprits()}; nothing was written; keep these layers "
                "with --keep, and please report the model"
            )
        return divergence

    def _run(self, model: onnx.ModelProto) -> list[Feed]:
        with Session(model, self.options) as session:
            return [session.run(feed) for feed in self.feeds]

    def _culprits(self) -> str:
        """Names of the groups whose removal alone is not what was believed; of all, where none alone is to blame."""
        structure, analysis = self.network.analysis.structure, self.network.analysis
        removed = self.network.removed()
        groups = np.unique(structure.group_of[removed]).tolist()
        blamed = [group for group in groups if self._alone(removed[structure.group_of[removed] == group]) > _ROUNDING]
        names = [group_name(analysis, group) for group in blamed or groups]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return ", ".join(names[:_NAMED]) + more

    def _alone(self, units: Array) -> float:
        """How far belief and written file are apart where only some units are removed."""
        alone = self.network.copy()
        alone.alive[:] = True
        alone.alive[units] = False
        written = apply(alone.model, alone.analysis.structure, alone.removed())
        return disagreement(self._run(alone.masked()), self._run(written))


def disagreement(believed: Sequence[Mapping[str, Array]], found: Sequence[Mapping[str, Array]]) -> float:
    """How far outputs are from what was believed: ‖found - believed‖ / ‖believed‖, of the worst output.

    Infinite where shapes differ, or numbers are finite in one of them only.
    """
    worst = 0.0
    for name, first in believed[0].items():
        if not isinstance(first, np.ndarray) or first.dtype.kind != "f":
            continue
        gap = total = 0.0
        for mine, other in zip(believed, found, strict=True):
            a, b = mine[name].astype(np.float64), other[name].astype(np.float64)
            if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
                return float("inf")
            known = np.isfinite(a)
            gap += float(((a - b)[known] ** 2).sum())
            total += float((a[known] ** 2).sum())
        worst = max(worst, float(np.sqrt(gap / max(total, _FLOOR))) if gap else 0.0)
    return worst
