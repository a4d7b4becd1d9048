"""Timing of a model on a device: its operators, its staircases, and some cuts of the whole model.

The models to time come packed in a text. The script that `onnxcop profile --script` writes consists of the sources of
kernel_times, turns and this module, so they need only Python 3.8, NumPy and ONNX Runtime. Names at the top of the three
modules differ.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from onnxcop._base.types import Array, FloatArray
from onnxcop.runtime.kernel_times import CPU, TOGETHER, feed_of, kernel_times, machine, times_of
from onnxcop.runtime.turns import clock_of, ratio_of, take_turns

FORMAT, VERSION = "onnxcop-times", 1
USUAL_SECONDS = 10.0  # seconds for one cut beside the original
_CUT_ENOUGH = 0.004
_STAIRS_SHARE, _STAIRS_ENOUGH = 0.15, 0.01  # of these seconds, for one kind of layer
_KNOWN = {
    "cpu": [CPU],
    "cuda": ["CUDAExecutionProvider", CPU],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", CPU],
    "xnnpack": ["XnnpackExecutionProvider", CPU],
}
_WIDTH = 120  # characters in a line of the script


def packed(header: Mapping[str, Any], blobs: Sequence[bytes]) -> str:
    """Pack the models to time as text: a description, and models that it refers to by index."""
    lengths = json.dumps([len(blob) for blob in blobs])
    content = b"\n".join([json.dumps(header).encode(), lengths.encode(), b"".join(blobs)])
    text = base64.b85encode(zlib.compress(content, 9)).decode()
    return "\n".join(text[start : start + _WIDTH] for start in range(0, len(text), _WIDTH))


def unpacked(text: str) -> tuple[dict[str, Any], list[bytes]]:
    """Inverse of :func:`packed`."""
    content = zlib.decompress(base64.b85decode(text.replace("\n", "")))
    header, lengths, rest = content.split(b"\n", 2)
    blobs, start = [], 0
    for length in json.loads(lengths):
        blobs.append(rest[start : start + length])
        start += length
    return json.loads(header), blobs


def table_of(
    text: str, providers: Sequence[Any], threads: int | None, tell: Callable[[str, int, int], None],
    libraries: Sequence[str] = (), seconds: float = USUAL_SECONDS,
) -> dict[str, Any]:  # fmt: skip
    """Time a packed set of models on this device.

    Args:
        text: The packed models.
        providers: Execution providers, as ONNX Runtime takes them.
        threads: Threads of one operator on the CPU, None for ONNX Runtime's own choice.
        tell: Called with (stage, done, total).
        libraries: Paths of libraries with custom operators.
        seconds: Longest time for one cut of the whole model beside the original.

    Returns:
        The table, as plain data for JSON.
    """
    began = time.perf_counter()
    header, blobs = unpacked(text)
    names = [one if isinstance(one, str) else one[0] for one in providers]
    alone = threads == 1 and names == [CPU]
    open_session = partial(_opened, providers=providers, threads=threads, libraries=libraries)
    clock = clock_of(alone)
    stairs = {}
    for done, (kind, models) in enumerate(sorted(header["stairs"].items())):
        tell("widths", done, len(header["stairs"]))
        stairs[kind] = _stairs([blobs[place] for place in models], open_session, clock, _STAIRS_SHARE * seconds)
    operators = header["operators"]

    def timed(keys: Sequence[str]) -> dict[str, float]:
        # Messages of a protobuf one after the other are one message with the fields of all.
        parts = [
            header["imports"],
            *([header["reference"]] if len(keys) > 1 else []),
            *(operators[key] for key in keys),
        ]
        model = b"".join(blobs[place] for place in parts)
        found = kernel_times(model, providers, threads)
        return {key: found[operators[key]] for key in keys if operators[key] in found}

    together = TOGETHER if names == [CPU] else 1
    times = times_of(sorted(operators), timed, together, partial(tell, "operators"))
    whole, cuts = _cuts(header, blobs, open_session, partial(take_turns, seconds=seconds, clock=clock), tell)
    return {
        "format": FORMAT, "version": VERSION, "onnxcop": header["onnxcop"], "model": header["model"],
        "machine": machine(names[0], threads), "grid": header["grid"], "axes": header["axes"], "stairs": stairs,
        "seconds": whole, "operators": times, "cuts": cuts, "took": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def _opened(model: bytes, providers: Sequence[Any], threads: int | None, libraries: Sequence[str]) -> Any:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
    for library in libraries:
        settings.register_custom_ops_library(os.path.abspath(library))
    return ort.InferenceSession(model, settings, providers=list(providers))


def _stairs(
    models: Sequence[bytes], open_session: Callable[[bytes], Any], clock: Callable[[], float], seconds: float
) -> list[float] | None:
    """Times of narrower layers as shares of the time of the first; None if such layers do not run."""
    try:
        sessions = [open_session(model) for model in models]
        runs = [partial(session.run, None, feed_of(session)) for session in sessions]
        times = take_turns(runs, seconds, clock, _STAIRS_ENOUGH)
    except Exception:
        return None
    return [ratio_of(times, place)[0] for place in range(1, len(runs))]


def _cuts(
    header: Mapping[str, Any], blobs: Sequence[bytes], open_session: Callable[[bytes], Any],
    timed: Callable[..., FloatArray], tell: Callable[[str, int, int], None],
) -> tuple[float, list[dict[str, Any]]]:  # fmt: skip
    """Seconds of the whole model, and its cuts with their times as shares of that."""
    feed = {name: _values(dtype, shape) for name, dtype, shape in header["inputs"]}
    original = partial(open_session(blobs[header["original"]]).run, None, feed)
    every, cuts = [], []
    for done, cut in enumerate(header["cuts"]):
        tell("whole models", done, len(header["cuts"]))
        other = partial(open_session(blobs[cut["model"]]).run, None, feed)
        times = timed([original, other], enough=_CUT_ENOUGH)
        ratio, error = ratio_of(times, 1)
        every.append(times[:, 0])
        cuts.append({"kept": cut["kept"], "ratio": ratio, "error": error})
    if not every:
        every.append(timed([original])[:, 0])
    return float(np.median(np.concatenate(every))), cuts


def _values(dtype: str, shape: Sequence[int]) -> Array:
    """Positive numbers, small integers, or booleans."""
    rng = np.random.default_rng(0)
    if dtype == "bool":
        return np.asarray(rng.random(shape) < 0.5)
    if np.dtype(dtype).kind in "iu":
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    return np.asarray(rng.random(shape)).astype(dtype)


def run_script(text: str) -> int:
    """The script: time the packed models and write the table.

    Returns:
        The exit code: 0, or 1 after a line that names the failure.
    """
    parser = argparse.ArgumentParser(description="Time a model on this device, for onnxcop --latency-table.")
    parser.add_argument("-o", "--output", default="times.json", metavar="TABLE.json", help="[default: %(default)s]")
    parser.add_argument(
        "--provider",
        default="cpu",
        metavar="NAME",
        help="cpu, cuda, tensorrt, xnnpack, or a full name of ONNX Runtime's. [default: %(default)s]",
    )
    parser.add_argument(
        "--provider-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of the provider, e.g. trt_fp16_enable=1; may be repeated",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads on the CPU [default: ONNX Runtime's choice]")
    parser.add_argument(
        "--seconds",
        type=float,
        default=USUAL_SECONDS,
        metavar="N",
        help="how long to time one cut of the whole model at most [default: %(default)s]",
    )
    given = parser.parse_args()
    try:
        import onnxruntime as ort

        names = _KNOWN.get(given.provider.lower(), [given.provider, CPU])
        missing = [name for name in names[:1] if name not in ort.get_available_providers()]
        if missing:
            raise ValueError(f"ONNX Runtime here has no {missing[0]}, but {', '.join(ort.get_available_providers())}")
        settings = dict(entry.split("=", 1) for entry in given.provider_option)
        chosen = [(names[0], settings), *names[1:]] if settings else names
        table = table_of(text, chosen, given.threads, _show, seconds=given.seconds)
        with open(given.output + ".part", "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1)
        os.replace(given.output + ".part", given.output)
    except Exception as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"wrote {given.output} in {table['took']} s; copy it back and give it to onnxcop --latency-table")
    return 0


def _show(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)
