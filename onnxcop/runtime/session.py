"""The only module that runs models: ONNX Runtime is used through it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx

from onnxcop._base.scratch import scratch_folder
from onnxcop._base.types import Array, Feed
from onnxcop.errors import EngineError
from onnxcop.graph.input_spec import InputSpec
from onnxcop.graph.io import WeightFile, save_externally, weight_bytes
from onnxcop.graph.serialize import serialized
from onnxcop.runtime.providers import (
    TENSORRT,
    OutOfMemory,
    create_session,
    engine_error,
    resolve_provider,
    resolved_name,
)

__all__ = [
    "EngineOptions", "KeptSession", "OutOfMemory", "Runner", "Session", "close", "providers_of",
    "resolve_provider", "run_batched",
]  # fmt: skip

log = logging.getLogger("onnxcop")

_UNPACKED = {"session.disable_prepacking": "1"}  # weights stay memory-mapped and are not copied into another layout
LARGEST_IN_MEMORY = 1_900_000_000  # bytes; a serialized ModelProto may not reach 2 GiB


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run models.

    Attributes:
        provider: `auto`, `cpu`, `cuda`, `tensorrt`, `dml`, `coreml`, `openvino`, or the full name
            of an execution provider of ONNX Runtime.
        threads: Threads of one operator on the CPU; None leaves the choice to ONNX Runtime.
        provider_options: Extra (key, value) settings of the first provider.
        custom_ops: Paths of shared libraries with custom operators.
    """

    provider: str = "auto"
    threads: int | None = None
    provider_options: tuple[tuple[str, str], ...] = ()
    custom_ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for library in self.custom_ops:
            if not os.path.isfile(library):
                raise EngineError(f"{library}: there is no such library of operators; check --custom-ops")
        if self.threads is not None and self.threads < 1:
            raise EngineError(f"threads is {self.threads}; give 1 or more, or leave it out")
        if self.threads is not None and self.threads > _most_threads():
            raise EngineError(
                f"threads is {self.threads}, but this machine has {os.cpu_count()} processors; give {_most_threads()} "
                "or less, or leave it out"
            )

    def for_computing(self) -> EngineOptions:
        """How to run graphs that change all the time: TensorRT would build an engine for each of them, so CUDA does."""
        if resolved_name(self.provider) != TENSORRT:
            return self
        return replace(self, provider="cuda", provider_options=())


def providers_of(options: EngineOptions) -> list[Any]:
    """The execution providers in order of precedence, as ONNX Runtime takes them: the first with its settings.

    Raises:
        EngineError: The provider cannot be used.
    """
    first, *others = resolve_provider(options.provider)
    return [(first, dict(options.provider_options)) if options.provider_options else first, *others]


def _most_threads() -> int:
    """The thread count above which threads only wait for each other; thousands hang the machine."""
    return max(64, 4 * (os.cpu_count() or 1))


class Runner(Protocol):
    """The part of a session that :func:`run_batched` needs."""

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> Feed: ...


class Session:
    """A loaded model.

    Args:
        model: A model, its serialized bytes, or the path of its file. The model is not changed.
        options: How to run it.
        optimize: Whether ONNX Runtime may rewrite the graph before it runs it.
        config: Further settings of the session, by ONNX Runtime's keys.
        passing: Whether it is one of many short-lived sessions: these share one arena of memory, which is not returned
            and requested again each time.

    Attributes:
        inputs: The inputs of :meth:`run`, without initializers that are listed as inputs.
        outputs: The outputs.
        providers: The execution providers in use, in order of precedence.

    Raises:
        EngineError: The provider cannot be used, or ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: onnx.ModelProto | bytes | str | os.PathLike[str],
        options: EngineOptions = EngineOptions(),
        *,
        optimize: bool = True,
        config: Mapping[str, str] | None = None,
        passing: bool = False,
    ) -> None:
        names = resolve_provider(options.provider)
        self._session: Any = None
        self._remove: Callable[[], object] | None = None
        source: bytes | str
        shared = WeightFile.of(model) if isinstance(model, onnx.ModelProto) else None
        if isinstance(model, onnx.ModelProto) and shared is not None:
            path = shared.written(model)
            source, self._remove = str(path), lambda: path.unlink(missing_ok=True)
            config = _UNPACKED | dict(config or {})
        elif isinstance(model, onnx.ModelProto):
            if weight_bytes(model) > LARGEST_IN_MEMORY:
                folder, self._remove = scratch_folder(self)
                source = str(save_externally(model, folder))
            else:
                source = serialized(model)
        else:
            source = model if isinstance(model, bytes) else os.fspath(model)
        try:
            self._session = create_session(
                source,
                names,
                threads=options.threads,
                provider_options=dict(options.provider_options),
                optimize=optimize,
                config=config,
                custom_ops=options.custom_ops,
                shared_arena=passing,
            )
        except BaseException:
            self.close()
            raise
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        self.inputs = tuple(map(_spec_from_node_arg, self._session.get_inputs()))
        self.outputs = tuple(map(_spec_from_node_arg, self._session.get_outputs()))

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> Feed:
        """Run the model once.

        Args:
            feeds: Arrays by input name, of the dtypes and shapes of :attr:`inputs`.
            outputs: Names of the outputs to compute, None for all.

        Returns:
            Arrays by output name.

        Raises:
            OutOfMemory: The device has not enough memory for this feed.
            EngineError: The feed does not fit the model, or an operator fails.
        """
        if self._session is None:
            raise EngineError("the session is closed; open another one")
        names = list(outputs) if outputs is not None else [spec.name for spec in self.outputs]
        try:
            values = self._session.run(names, dict(feeds))
        except (Exception, MemoryError) as error:
            raise engine_error("the model could not be run", error) from error
        return dict(zip(names, values, strict=True))

    def on_device(self, feeds: Mapping[str, Array], device: str) -> Callable[[], None]:
        """A function that runs the model on copies of the inputs on a device, and leaves the outputs there.

        Args:
            feeds: Arrays by input name.
            device: ONNX Runtime's name of the device.

        Raises:
            OutOfMemory: The device has not enough memory.
            EngineError: The inputs do not fit, or cannot be on a device.
        """
        import onnxruntime

        try:
            binding = self._session.io_binding()
            for name, array in feeds.items():
                value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
                binding.bind_ortvalue_input(name, value)
            for spec in self.outputs:
                binding.bind_output(spec.name, device)
            binding.synchronize_inputs()
        except (Exception, MemoryError) as error:
            raise engine_error("the inputs could not be copied to the device", error) from error

        def run() -> None:
            try:
                self._session.run_with_iobinding(binding)
                binding.synchronize_outputs()
            except (Exception, MemoryError) as error:
                raise engine_error("the model could not be run", error) from error

        return run

    def close(self) -> None:
        """Free the model and remove its temporary files."""
        self._session = None
        if self._remove is not None:
            self._remove()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class KeptSession:
    """A model whose session is made when it is needed; a copy for another process carries only the model.

    Attributes:
        model: The model; empty once it made a session.
        options: How to run it.
        passing: As for :class:`Session`.
        made: The session, once there is one.
    """

    model: onnx.ModelProto
    options: EngineOptions
    passing: bool = False
    made: Session | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"made": None}

    @property
    def session(self) -> Session:
        """The session."""
        if self.made is None:
            self.made = Session(self.model, self.options, passing=self.passing)
            self.model = onnx.ModelProto()
        return self.made

    def close(self) -> None:
        """Close the session if there is one."""
        if self.made is not None:
            self.made.close()


def close(session: Session | KeptSession | None) -> None:
    """Close a session if there is one."""
    if session is not None:
        session.close()


def run_batched(
    session: Runner,
    feeds: Iterable[Mapping[str, Array]],
    axes: Mapping[str, int | None],
    outputs: Sequence[str] | None = None,
) -> Iterator[tuple[Feed, Feed]]:
    """Run a model over batches, halving those that do not fit into the device's memory.

    The size that fits is kept for later batches.

    Args:
        session: The model.
        feeds: Batches.
        axes: The batch axis of every input, None for inputs that have none.
        outputs: Names of the outputs to compute, None for all.

    Yields:
        The feed and the outputs of every batch, or part of one, in order.

    Raises:
        OutOfMemory: A single sample does not fit.
    """
    limit: int | None = None
    for feed in feeds:
        batch = dict(feed)
        size = next((batch[name].shape[axis] for name, axis in axes.items() if axis is not None), 1)
        start = 0
        while start < size or size == start == 0:
            stop = size if limit is None else min(size, start + limit)
            part = batch if stop - start == size else _part(batch, axes, start, stop)
            try:
                result = session.run(part, outputs)
            except OutOfMemory as error:
                if stop - start <= 1:
                    raise OutOfMemory(f"{error}; a single sample does not fit") from error
                limit = (stop - start) // 2
                log.info("out of memory with %d samples, continuing with %d", stop - start, limit)
                continue
            yield part, result
            start = stop
            if size == 0:
                break


def _part(feed: Feed, axes: Mapping[str, int | None], start: int, stop: int) -> Feed:
    part = {}
    for name, array in feed.items():
        axis = axes.get(name)
        index = (slice(None),) * (axis or 0) + (slice(start, stop),)
        part[name] = array if axis is None else np.ascontiguousarray(array[index])
    return part


def _spec_from_node_arg(arg: Any) -> InputSpec:
    # A dynamic size is a name, None, or in some versions an empty name or a question mark.
    shape = tuple(size if size not in ("", "?") else None for size in arg.shape or ())
    return InputSpec(arg.name, _dtype_from_ort(arg.type), shape)


def _dtype_from_ort(text: str) -> np.dtype[Any]:
    """`tensor(float)` → float32; object for strings, sequences, maps and optionals."""
    names = {"float": "FLOAT", "float16": "FLOAT16", "double": "DOUBLE", "bfloat16": "BFLOAT16"}
    inner = text.removeprefix("tensor(").removesuffix(")")
    if not text.startswith("tensor(") or inner == "string":
        return np.dtype(object)
    kind = names.get(inner, inner.upper())
    value = getattr(onnx.TensorProto, kind, None)
    if not isinstance(value, int):
        return np.dtype(object)
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value))
