"""Sessions with tensors that stay on the device between runs.

The state of training is read by a run, and returned with new values for the next one. In recovery a network runs in
pieces, and copies between host and device, and the creation of sessions, would cost more than a piece itself. So the
tensors that cross a cut stay on the device. The weights of a piece are inputs of its session, which is kept: a variant
of the network with other weights needs no session of its own. On the CPU nothing of this saves time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnxcop._base.lookup import Recent
from onnxcop._base.types import Array, Feed
from onnxcop.errors import EngineError
from onnxcop.graph.edit import copied
from onnxcop.graph.io import values_of
from onnxcop.graph.subgraphs import captured
from onnxcop.graph.traits import Trait, traits
from onnxcop.runtime.providers import CUDA, TENSORRT, OutOfMemory, engine_error, resolve_provider
from onnxcop.runtime.session import EngineOptions, Session, close

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_VARYING = Trait.LINEAR | Trait.MULTIPLIES | Trait.ADDS  # operators that read weights, biases or masks
_SESSIONS = 8  # pieces whose sessions are kept


def device_of(options: EngineOptions) -> str | None:
    """ONNX Runtime's name of the device that tensors can stay on; None for the CPU and for devices that copy anyway."""
    return "cuda" if resolve_provider(options.provider)[0] in (CUDA, TENSORRT) else None


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTensor:
    """A tensor on a device.

    Attributes:
        value: ONNX Runtime's handle of it.
    """

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return tuple(self.value.shape())

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return int(self.value.tensor_size_in_bytes())

    def numpy(self) -> Array:
        """A copy in the host's memory."""
        return np.array(self.value.numpy())


Live = Mapping[str, "Array | DeviceTensor"]
RunPiece = Callable[[Live, Sequence[str], Collection[str]], Mapping[str, "Array | DeviceTensor"]]


def on_host(value: Array | DeviceTensor) -> Array:
    """A tensor in the host's memory."""
    return value.numpy() if isinstance(value, DeviceTensor) else value


class ResidentPieces:
    """The sessions of one network's pieces.

    Args:
        options: How to run them.
        device: ONNX Runtime's name of the device.
    """

    def __init__(self, options: EngineOptions, device: str) -> None:
        self._options, self._device = options, device
        self._sessions: Recent[bytes, _BoundPiece | None] = Recent(_SESSIONS, close)

    def loaded(self, piece: onnx.ModelProto) -> RunPiece:
        """A function that runs a piece; its arguments are those of :meth:`_BoundPiece.run_bound`.

        Args:
            piece: The piece, as a model.

        Raises:
            OutOfMemory: The device has not enough memory for the weights.
            EngineError: ONNX Runtime refuses the piece.
        """
        bare, weights = _weights_apart(piece)
        session = self._session(bare)
        if session is None:  # an operator takes only stored weights
            weights, session = {}, _BoundPiece(piece, self._options, self._device)
        held = {name: session.held(values_of(tensor)) for name, tensor in weights.items()}
        return lambda feeds, outputs, stay: session.run_bound({**feeds, **held}, outputs, stay)

    def _session(self, bare: onnx.ModelProto) -> _BoundPiece | None:
        """The session of a piece, made the first time."""

        def made() -> _BoundPiece | None:
            try:
                return _BoundPiece(bare, self._options, self._device)
            except OutOfMemory:
                raise
            except EngineError:
                return None

        return self._sessions.get(bare.SerializeToString(deterministic=True), made)


class _BoundPiece(Session):
    """A session that takes and returns tensors of a device."""

    def __init__(self, model: onnx.ModelProto, options: EngineOptions, device: str) -> None:
        super().__init__(model, options, passing=True)
        self._device = device
        self._names = {spec.name for spec in self.inputs}

    def held(self, array: Array) -> DeviceTensor:
        """A copy on the device.

        Raises:
            OutOfMemory: It does not fit.
        """
        import onnxruntime

        try:
            return DeviceTensor(onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0))
        except (Exception, MemoryError) as error:
            raise engine_error("the weights could not be copied to the device", error) from error

    def run_bound(self, feeds: Live, outputs: Sequence[str], stay: Collection[str]) -> dict[str, Array | DeviceTensor]:
        """Run once.

        Args:
            feeds: Inputs, in either memory; others are ignored.
            outputs: Names of the outputs to compute.
            stay: Outputs that stay on the device.

        Raises:
            OutOfMemory: The device has not enough memory for this feed.
            EngineError: The feed does not fit, or an operator fails.
        """
        binding = self._session.io_binding()
        try:
            for name in sorted(self._names & feeds.keys()):
                value = feeds[name]
                if isinstance(value, DeviceTensor):
                    binding.bind_ortvalue_input(name, value.value)
                else:
                    binding.bind_cpu_input(name, np.ascontiguousarray(value))
            for name in outputs:
                binding.bind_output(name, self._device if name in stay else "cpu")
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            values = binding.get_outputs()
        except (Exception, MemoryError) as error:
            raise engine_error("the model could not be run", error) from error
        tensors = {name: DeviceTensor(value) for name, value in zip(outputs, values, strict=True)}
        return {name: tensor if name in stay else tensor.numpy() for name, tensor in tensors.items()}


def _weights_apart(piece: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, TensorProto]]:
    """A piece whose weights, biases and masks are inputs, and their values."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    inner: set[str] = set()
    for node in piece.graph.node:
        inner.update(captured(node))
        for name in node.input:
            readers.setdefault(name, []).append(node)
    apart = {
        tensor.name: tensor
        for tensor in piece.graph.initializer
        if tensor.data_type in _FLOATS and tensor.dims and tensor.name not in inner
        and all(traits(node) & _VARYING for node in readers.get(tensor.name, ()))
    }  # fmt: skip
    if not apart:
        return piece, {}
    bare = onnx.ModelProto(ir_version=piece.ir_version)
    bare.opset_import.extend(piece.opset_import)
    bare.graph.name = piece.graph.name
    bare.graph.node.extend(piece.graph.node)
    bare.graph.output.extend(piece.graph.output)
    bare.graph.initializer.extend(tensor for tensor in piece.graph.initializer if tensor.name not in apart)
    bare.graph.input.extend(copied(value) for value in piece.graph.input if value.name not in apart)
    for name, tensor in apart.items():
        bare.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    return bare, apart


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
