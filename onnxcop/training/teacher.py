"""Outputs of the original, computed once for every sample and view, and kept up to 1 GB: if large, in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcop._base.types import Array, Feed, IntArray
from onnxcop.runtime.session import Runner
from onnxcop.training.samples import MOST_BYTES, LargeArrays, SampleSet

_KEPT = 2**30  # bytes of outputs to keep


class Teacher:
    """Outputs of a model on views of samples.

    Args:
        session: Runs the model.
        samples: The samples.
        views: Number of views.
        outputs: Names of the required outputs.
        share: Share of the memory for outputs that these may take.
    """

    def __init__(
        self, session: Runner, samples: SampleSet, views: int, outputs: Sequence[str], *, share: float = 1.0
    ) -> None:
        self._session, self._share = session, share
        self._samples, self._outputs = samples, list(outputs)
        self._answers: dict[int, dict[str, Array]] = {}
        self._large = LargeArrays()
        self._known = np.zeros((views, samples.count), np.bool_)

    def answers(self, indices: IntArray, view: int, feed: Mapping[str, Array]) -> Feed:
        """Outputs on some samples.

        Args:
            indices: Indices of the samples.
            view: Number of the view.
            feed: These samples in that view.
        """
        if not self._known[view, indices].all():
            outputs = self._session.run(feed, self._outputs)
            if any(np.ndim(value) == 0 or len(value) != len(indices) for value in outputs.values()):
                return outputs  # samples are not along the first axis: outputs cannot be stored by sample
            size = sum(value.nbytes for value in outputs.values()) / len(indices)
            if size * self._known.size > self._share * _KEPT:
                return outputs
            cached = self._answers.setdefault(view, {})
            for name, value in outputs.items():
                if name not in cached:
                    shape = (self._samples.count, *value.shape[1:])
                    in_file = size * self._known.size > self._share * MOST_BYTES
                    cached[name] = self._large.make(f"{view} {name}", shape, value.dtype, in_file=in_file)
                cached[name][indices] = value
                self._large.note(value.nbytes)
            self._known[view, indices] = True
        return {name: self._large.take(f"{view} {name}", indices, 0) for name in self._answers[view]}
