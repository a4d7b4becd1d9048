"""Outputs of the original, computed once for every sample and view, and kept as far as memory allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from onnxcop._base.types import Array, Feed, IntArray
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.training.samples import MOST_BYTES, ImageView, SampleSet


class Teacher:
    """Outputs of a model on views of samples.

    Args:
        model: The model.
        samples: The samples.
        views: The views.
        outputs: Names of the required outputs.
        options: How to run it.
    """

    def __init__(
        self, model: onnx.ModelProto, samples: SampleSet, views: Sequence[ImageView], outputs: Sequence[str],
        options: EngineOptions,
    ) -> None:  # fmt: skip
        self._session = Session(model, options)
        self._samples, self._outputs = samples, list(outputs)
        self._answers: dict[int, dict[str, Array]] = {}
        self._known = np.zeros((len(views), samples.count), np.bool_)

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
            if size * self._known.size > MOST_BYTES:
                return outputs
            cached = self._answers.setdefault(view, {})
            for name, value in outputs.items():
                if name not in cached:
                    cached[name] = np.zeros((self._samples.count, *value.shape[1:]), value.dtype)
                cached[name][indices] = value
            self._known[view, indices] = True
        return {name: values[indices] for name, values in self._answers[view].items()}

    def close(self) -> None:
        """Free the session."""
        self._session.close()
