"""Times of single operators, from the profile of a session that runs many of them.

A profile lists kernels separately, so it leaves out the copies and layout changes at the borders of a small model,
which distort times of operators that run alone. The source of this module is part of the script that times a model on
another device, so it needs only Python 3.8, NumPy and ONNX Runtime.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

log = logging.getLogger("onnxcop")

MARK = "timed_"  # prefix of the names of timed operators; a number follows
REFERENCE = 10**6  # number of an operator that does nothing; a profile adds its time to every other
TOGETHER = 24  # operators to time in one session
_RUNS = 12  # fewest runs of a session
_SECONDS = 0.15  # time to run a session for, if that gives more runs
_MOST_RUNS = 60
_QUICK = 0.4  # share of the runs that count: the fastest, which nothing interrupted
_LEAST = 0.05  # least share of a time that remains after the time of the reference is subtracted
CPU = "CPUExecutionProvider"
_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
_OUTPUT = re.compile(rf"^{MARK}(\d+)$")
_KERNEL = re.compile(rf"^{MARK}(\d+)(?:_\w+)?_kernel_time$")


def kernel_times(model: bytes, providers: Sequence[Any], threads: int | None) -> dict[int, float]:
    """Measure the seconds of every marked operator of a model on zeros.

    Args:
        model: A serialized model; operators with outputs named :data:`MARK` and a number are timed. The time of
            :data:`REFERENCE` is subtracted from the others.
        providers: Execution providers, as ONNX Runtime takes them.
        threads: Threads of one operator on the CPU, None for ONNX Runtime's own choice.

    Returns:
        Seconds by number.
    """
    if providers and provider_name(providers[0]) != CPU:
        return _by_session(model, providers, threads)
    import time

    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        settings = quiet_settings(threads)
        settings.enable_profiling = True
        settings.profile_file_prefix = os.path.join(folder, "profile")
        session = ort.InferenceSession(model, settings, providers=list(providers))
        feed = feed_of(session)
        session.run(None, feed)
        runs, start = 0, time.perf_counter()
        while runs < _RUNS or (time.perf_counter() - start < _SECONDS and runs < _MOST_RUNS):
            session.run(None, feed)
            runs += 1
        with open(session.end_profiling(), encoding="utf-8") as file:
            events = json.load(file)
    return from_events(events, runs + 1)


def times_of(
    keys: Sequence[str], timed: Callable[[Sequence[str]], Mapping[str, float]], together: int,
    tell: Callable[[int, int], None],
) -> dict[str, float | None]:  # fmt: skip
    """Seconds of operators by their keys; None for one that does not run alone.

    Args:
        keys: What to time.
        timed: Times several of them in one session; raises an error if one does not run.
        together: How many to time in one session.
        tell: Called with (done, total).
    """
    times: dict[str, float | None] = {}
    for start in range(0, len(keys), together):
        tell(start, len(keys))
        times.update(_by_halves(keys[start : start + together], timed))
    return times


def _by_halves(keys: Sequence[str], timed: Callable[[Sequence[str]], Mapping[str, float]]) -> dict[str, float | None]:
    """Time some operators together; if one of them does not run, time the others without it."""
    try:
        times = timed(keys)
    except Exception as error:
        if len(keys) == 1:
            log.debug("%s cannot be timed alone: %s", keys[0], error)
            return {keys[0]: None}
        half = len(keys) // 2
        first = _by_halves(keys[:half], timed)
        first.update(_by_halves(keys[half:], timed))
        return first
    return {key: times.get(key) for key in keys}


def _by_session(model: bytes, providers: Sequence[Any], threads: int | None) -> dict[int, float]:
    """The same on a device with a profile that lists only launches: the wall time of a model with one operator."""
    import time

    import onnxruntime as ort

    session = ort.InferenceSession(model, quiet_settings(threads), providers=list(providers))
    run = run_of(session, feed_of(session), provider_name(providers[0]))
    seconds = []
    for _ in range(_MOST_RUNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    (number,) = {int(found[1]) for one in session.get_outputs() if (found := _OUTPUT.match(one.name))} or {0}
    quick = sorted(seconds)[: max(1, int(_QUICK * len(seconds)))]
    return {number: statistics.fmean(quick)}


def quiet_settings(threads: int | None) -> Any:
    """Settings of a session that logs nothing, with threads for one operator, None for ONNX Runtime's own choice."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    if threads is not None:
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
    return settings


def run_of(session: Any, feed: Mapping[str, Any], provider: str) -> Callable[[], object]:
    """A run of a session on the same inputs, without copies between host and device where the model allows it."""
    device = _DEVICES.get(provider)
    if device is None:
        return partial(session.run, None, feed)
    import onnxruntime as ort

    try:
        bound = session.io_binding()
        for name, values in feed.items():
            bound.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values, device, 0))
        for one in session.get_outputs():
            bound.bind_output(one.name, device)
        session.run_with_iobinding(bound)
    except Exception as error:
        log.debug("inputs and outputs are copied while the model is timed: %s", error)
        return partial(session.run, None, feed)

    def run() -> None:
        session.run_with_iobinding(bound)
        bound.synchronize_outputs()

    return run


def provider_name(provider: Any) -> str:
    """The name of a provider, which may be given with its settings."""
    return str(provider[0] if isinstance(provider, tuple) else provider)


def feed_of(session: Any) -> dict[str, Any]:
    """Ones for every input of a session."""
    import numpy as np

    return {one.name: np.full(one.shape, 1, _DTYPES.get(one.type, "float32")) for one in session.get_inputs()}


def from_events(events: Sequence[Mapping[str, Any]], runs: int) -> dict[int, float]:
    """Seconds by number from the events of a profile of several runs."""
    durations: dict[int, dict[str, list[float]]] = {}
    for event in events:
        match = _KERNEL.match(str(event.get("name", "")))
        if match is not None and event.get("cat") == "Node":
            # whole microseconds are reported, rounded down
            durations.setdefault(int(match[1]), {}).setdefault(event["name"], []).append(float(event["dur"]) + 0.5)
    times = {}
    for number, kernels in durations.items():
        total = 0.0
        for seconds in kernels.values():
            quick = sorted(seconds)[: max(1, int(_QUICK * len(seconds)))]
            total += statistics.fmean(quick) * len(seconds) / runs
        times[number] = total * 1e-6
    nothing = times.pop(REFERENCE, 0.0)
    return {number: max(seconds - nothing, _LEAST * seconds) for number, seconds in times.items()}


_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64",
    "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(int8)": "int8", "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}  # fmt: skip

_KERNELS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "asimd",
    "sve",
)  # instruction sets that have kernels of their own


def processor() -> str:
    """Name of the processor, with the instruction sets that select its kernels."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = [line.partition(":")[::2] for line in file]
    except OSError:
        return name
    fields = {key.strip().lower(): value.strip() for key, value in lines if value.strip()}
    flags = f" {fields.get('flags', fields.get('features', ''))} "
    return " ".join([fields.get("model name") or _board() or name, *(one for one in _KERNELS if f" {one} " in flags)])


def _board() -> str:
    """Name of a board such as a Raspberry Pi or a Jetson; empty if the kernel does not report it."""
    try:
        with open("/proc/device-tree/model", encoding="utf-8", errors="replace") as file:
            return file.read().strip("\0 \n")
    except OSError:
        return ""


def devices() -> str:
    """Vendors and numbers of the graphics processors that ONNX Runtime sees."""
    import onnxruntime as ort

    try:
        devices = {entry.device for entry in ort.get_ep_devices()}
        return ", ".join(sorted({f"{one.vendor} {one.device_id:#x}" for one in devices if "GPU" in str(one.type)}))
    except Exception:  # older releases report no devices
        return "unknown device"


def machine(provider: Any, threads: int | None) -> dict[str, Any]:
    """The facts besides the model that times depend on, as plain data."""
    import onnxruntime as ort

    name = provider_name(provider)
    settings = sorted(provider[1].items()) if isinstance(provider, tuple) else ()
    return {
        "processor": processor() if name == CPU else f"{processor()}, {devices()}", "runtime": ort.__version__,
        "provider": name, "threads": threads, "settings": dict(settings),
    }  # fmt: skip
