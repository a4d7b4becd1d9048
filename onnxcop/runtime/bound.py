"""A session with state on the device: tensors that a run reads, and returns with new values for the next run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import Array, Feed
from onnxcop.errors import EngineError
from onnxcop.runtime.providers import CUDA, engine_error
from onnxcop.runtime.session import EngineOptions, Session


class BoundSession(Session):
    """Runs a graph on state in two sets of buffers, one to read and one to write.

    Args:
        model: The graph.
        turns: The output that holds the next value of each input of the state.
        options: How to run it.

    Raises:
        EngineError: ONNX Runtime refuses the graph.
    """

    def __init__(self, model: onnx.ModelProto, turns: Mapping[str, str], options: EngineOptions) -> None:
        super().__init__(model, options)
        self._turns = dict(turns)
        self._device = "cuda" if self.providers[0] == CUDA else "cpu"
        self._now: dict[str, Any] = {}
        self._next: dict[str, Any] = {}

    def set_state(self, values: Mapping[str, Array]) -> None:
        """Copy values into the state."""
        self._now = {name: self._value(np.array(values[name])) for name in self._turns}
        self._next = {name: self._value(np.zeros_like(values[name])) for name in self._turns}

    def run_bound(self, feeds: Mapping[str, Array], outputs: Iterable[str]) -> Feed:
        """Run once; the state stays unchanged until :meth:`advance`.

        Args:
            feeds: Inputs that are not part of the state.
            outputs: Outputs to return.

        Raises:
            OutOfMemory: The device has not enough memory for this feed.
            EngineError: The feed does not fit, or an operator fails.
        """
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, target in self._turns.items():
            binding.bind_ortvalue_input(name, self._now[name])
            binding.bind_ortvalue_output(target, self._next[name])
        requested = list(outputs)
        for name in requested:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
            values = binding.get_outputs()[len(self._turns) :]
            return {name: value.numpy() for name, value in zip(requested, values, strict=True)}
        except (Exception, MemoryError) as error:
            raise engine_error("the model could not be run", error) from error

    def advance(self) -> None:
        """Make the values of the last run the state."""
        self._now, self._next = self._next, self._now

    def state(self, names: Iterable[str] | None = None) -> Feed:
        """Copies of the state."""
        chosen = self._turns if names is None else names
        return {name: np.array(self._now[name].numpy()) for name in chosen}

    def close(self) -> None:
        """Release the memory."""
        self._now, self._next = {}, {}
        super().close()

    def _value(self, array: Array) -> Any:
        import onnxruntime

        try:
            return onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0)
        except Exception as error:
            raise EngineError(f"the state of training does not fit the device: {error}") from None
