"""The execution providers of ONNX Runtime that work on this machine, and sessions on exactly those."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxcop.errors import EngineError
from onnxcop.runtime.installation import installation_of, package_for, warn_of_clash

log = logging.getLogger("onnxcop")

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
_PROVIDERS = {
    "cpu": CPU,
    "cuda": CUDA,
    "tensorrt": TENSORRT,
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
}
_OPTIONS: dict[str, dict[str, str]] = {
    # TF32 keeps 10 bits of a product, too few for statistics and comparisons. An exhaustive
    # search of convolution algorithms is repeated for every new shape and takes seconds each time.
    CUDA: {
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    },
}
_NEW_IR = re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")
_NEW_OPSET = re.compile(r"Opset (\d+) is under development.* for domain (\S+) is till opset (\d+)")
_OUT_OF_MEMORY = (
    "failed to allocate memory",
    "out of memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "alloc_failed",
    "e_outofmemory",
    "cudaerrormemoryallocation",
    "cuda failure 2:",
)


class OutOfMemory(EngineError):
    """A run needed more memory than the device (or the host) has."""


class TooNew(EngineError):
    """The format of the model is newer than ONNX Runtime reads; the message says what to do."""


SHORT_NAMES = {"auto": "CUDA if a device is available, else the CPU", **_PROVIDERS}


def resolved_name(name: str) -> str:
    """ONNX Runtime's name of a provider that has a short one, whether or not it is there."""
    return _PROVIDERS.get(name.lower(), name)


def resolve_provider(name: str) -> list[str]:
    """The execution providers of ONNX Runtime for a name, in order of precedence.

    `auto` is CUDA if a device works, else the CPU; the debug log says why CUDA was not used.
    Operators that the provider does not have run on the CPU, so it ends every list.

    Raises:
        EngineError: The named provider is missing or does not start.
    """
    known = {provider.lower(): provider for provider in _available()}
    if name.lower() == "auto":
        if CUDA not in known.values():
            return [CPU]
        problem = _probe(CUDA)
        if problem is None:
            return [CUDA, CPU]
        log.debug("no usable CUDA device, running on the CPU: %s", problem)
        return [CPU]
    provider = _PROVIDERS.get(name.lower()) or known.get(name.lower(), name)
    if provider == CPU:
        return [CPU]
    if provider not in known.values():
        raise EngineError(
            f"provider '{name}' is not in this build of ONNX Runtime, which has: "
            f"{', '.join(known.values())}; choose one of those, or install the build that has it{_how(provider)}"
        )
    problem = _probe(provider)
    if problem is not None:
        raise EngineError(
            f"provider '{name}' does not start: {problem}; check its driver and libraries, or use the provider 'cpu'"
        )
    return [provider, *([CUDA] if provider.startswith("Tensorrt") else []), CPU]


def create_session(
    source: bytes | str,
    names: list[str],
    *,
    threads: int | None = None,
    provider_options: Mapping[str, str] | None = None,
    optimize: bool = True,
    config: Mapping[str, str] | None = None,
    custom_ops: Sequence[str] = (),
    shared_arena: bool = False,
) -> Any:
    """An `onnxruntime.InferenceSession` whose first provider is the first of `names`.

    Args:
        source: The model's serialized bytes or the path of its file.
        names: Providers in order of precedence.
        threads: Threads of one operator on the CPU; None leaves the choice to ONNX Runtime.
        provider_options: Extra settings of the first provider.
        optimize: Whether the graph may be rewritten before it runs.
        config: Further settings of the session, by ONNX Runtime's keys.
        custom_ops: Paths of libraries of operators.
        shared_arena: Whether CPU memory comes from one arena shared by all such sessions.

    Raises:
        EngineError: ONNX Runtime refuses the model or a library, or would replace the provider by another.
    """
    ort = _onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    if threads is not None:
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
    if shared_arena and _register_arena():
        settings.add_session_config_entry("session.use_env_allocators", "1")
    for key, value in (config or {}).items():
        settings.add_session_config_entry(key, value)
    load_operators(settings, custom_ops)
    if not optimize:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    chosen = [(name, dict(_OPTIONS.get(name, {}))) for name in names]
    chosen[0][1].update(provider_options or {})
    try:
        with _quiet(ort):
            # Otherwise ONNX Runtime replaces a provider that fails by another one.
            session = ort.InferenceSession(source, settings, providers=chosen, enable_fallback=0)
    except (Exception, MemoryError) as error:
        what = f"ONNX Runtime could not load {source if isinstance(source, str) else 'the model'}"
        raise engine_error(what, error) from error
    if session.get_providers()[:1] != names[:1]:
        raise EngineError(f"ONNX Runtime could not start {names[0]}: no such device, or its libraries are missing")
    return session


@functools.cache
def _register_arena() -> bool:
    """Create the arena that sessions may share; False if this build has none."""
    ort = _onnxruntime()
    try:
        kind, use = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
        ort.create_and_register_allocator(ort.OrtMemoryInfo("Cpu", kind, 0, use), None)
    except Exception as error:
        log.debug("sessions share no arena: %s", error)
        return False
    return True


def load_operators(settings: Any, libraries: Sequence[str]) -> None:
    """Register the operators of shared libraries with a session that is created from these settings.

    Raises:
        EngineError: A library has no operators for this ONNX Runtime.
    """
    for library in libraries:
        try:
            settings.register_custom_ops_library(os.path.abspath(library))
        except Exception as error:
            raise engine_error(f"ONNX Runtime could not load the operators of {library}", error) from error


def check_operators(libraries: Sequence[str]) -> None:
    """Check that libraries of operators can be loaded; see :func:`load_operators`."""
    if libraries:
        load_operators(_onnxruntime().SessionOptions(), libraries)


@functools.cache
def _probe(provider: str) -> str | None:
    """Return the reason why `provider` cannot run a tiny model here, or None if it can."""
    from onnx import TensorProto, helper

    if provider == CUDA or provider.startswith(("Tensorrt", "NvTensor")):
        _preload_cuda()
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "probe", [x], [y])
    opset = helper.make_opsetid("", 13)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=7).SerializeToString()
    try:
        session = create_session(model, [provider, CPU])
        (value,) = session.run(["y"], {"x": np.zeros(2, np.float32)})
    except EngineError as error:
        return str(error).removeprefix("ONNX Runtime could not load the model: ")
    except Exception as error:
        return _one_line(error)
    return None if np.allclose(value, 1) else "it computes wrong numbers"


def _preload_cuda() -> None:
    """Load the CUDA and cuDNN libraries that pip installed, if there are any."""
    preload = getattr(_onnxruntime(), "preload_dlls", None)
    if preload is not None:
        # It writes to standard output; the session created next is the proof in any case.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            preload()


@contextlib.contextmanager
def _quiet(ort: Any) -> Iterator[None]:
    """Keep messages of providers that do not start off the terminal: errors contain them."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)  # the default


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"ONNX Runtime cannot be imported ({_one_line(error)}); install the package onnxruntime or onnxruntime-gpu"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        fix = installation_of(onnxruntime).fix("onnxruntime-gpu")
        raise EngineError(
            f"ONNX Runtime is only partly installed, as happens when one of its packages is removed: {fix}"
        )
    warn_of_clash(onnxruntime)
    return onnxruntime


def _how(provider: str) -> str:
    """The command that installs the build of ONNX Runtime with a provider, if it is known."""
    package = package_for(provider)
    return f": {installation_of(_onnxruntime()).fix(package)}" if package else ""


def _available() -> list[str]:
    return list(_onnxruntime().get_available_providers())


def engine_error(what: str, error: BaseException) -> EngineError:
    """The error for a failure of ONNX Runtime; `OutOfMemory` or `TooNew` if that is the cause."""
    cause = _one_line(error)
    folded = str(error).lower()
    if isinstance(error, MemoryError) or any(sign in folded for sign in _OUT_OF_MEMORY):
        return OutOfMemory(f"{what}: out of memory: {cause}")
    newer = _too_new(" ".join(str(error).split()))
    return TooNew(f"{what}: {newer}") if newer else EngineError(f"{what}: {cause}")


def _too_new(refusal: str) -> str:
    """Which version of a format ONNX Runtime does not read, and what to do; empty if it refuses something else."""
    if found := _NEW_IR.search(refusal):
        return (
            f"its IR version is {found[1]}, and this ONNX Runtime reads versions up to {found[2]}; save it with an "
            "older ir_version, or install a newer ONNX Runtime"
        )
    if found := _NEW_OPSET.search(refusal):
        return (
            f"its opset of {found[2]} is {found[1]}, and this ONNX Runtime runs opsets up to {found[3]}; export it "
            "with an older opset, or install a newer ONNX Runtime"
        )
    return ""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : ", "", text)
    text = re.sub(r"(^| )/\S+\.(?:cc|cu|h):\d+ .*?\)( \[ONNXRuntimeError\] : \d+ : \w+ : )? ", r"\1", text)
    return text if len(text) <= 400 else text[:397] + "..."
