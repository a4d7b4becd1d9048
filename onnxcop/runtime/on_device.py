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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxcop._base.types import Array
from onnxcop.runtime.kernel_times import (
    CPU,
    TOGETHER,
    feed_of,
    kernel_times,
    machine,
    provider_name,
    quiet_settings,
    run_of,
    times_of,
)
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


class TimedSet:
    """Models to time, and how to run them.

    Args:
        text: The packed models.
        providers: Execution providers, as ONNX Runtime takes them.
        threads: Threads of one operator on the CPU, None for ONNX Runtime's own choice.
        libraries: Paths of libraries with custom operators.
        seconds: Longest time for one cut of the whole model beside the original.
    """

    def __init__(
        self, text: str, providers: Sequence[Any], threads: int | None, *, libraries: Sequence[str] = (),
        seconds: float = USUAL_SECONDS,
    ) -> None:  # fmt: skip
        self.header, self.blobs = unpacked(text)
        self.providers, self.threads, self.libraries, self.seconds = list(providers), threads, libraries, seconds

    @property
    def names(self) -> list[str]:
        """Names of the providers."""
        return [provider_name(one) for one in self.providers]

    def parts(self) -> list[tuple[str, Any]]:
        """What to time, one after the other or on several machines: kinds of it, and its names or numbers."""
        together = TOGETHER if self.names == [CPU] else 1
        keys, cuts = sorted(self.header["operators"]), len(self.header["cuts"])
        return [
            *(("widths", kind) for kind in sorted(self.header["stairs"])),
            *(("operators", keys[start : start + together]) for start in range(0, len(keys), together)),
            *(("whole models", number) for number in range(max(cuts, 1))),
        ]

    def timed(self, part: tuple[str, Any]) -> Any:
        """Time a part on this machine.

        Returns:
            For widths, times of narrower layers as shares of that of the first, None if such layers do not run. For
            operators, their seconds by key. For a whole model, seconds of the original by turn, the time of the cut as
            a share of that, and its error.
        """
        kind, what = part
        if kind == "widths":
            models = [self.blobs[place] for place in self.header["stairs"][what]]
            return _stairs(models, self.run, self.clock(), _STAIRS_SHARE * self.seconds)
        if kind == "operators":
            return times_of(what, self._operators, len(what), _silent)
        return self._cut(what)

    def session(self, model: bytes) -> Any:
        """A session of a model.

        Raises:
            RuntimeError: ONNX Runtime would run it on another provider.
        """
        session = _opened(model, self.providers, self.threads, self.libraries)
        if self.names[0] not in session.get_providers():
            raise RuntimeError(
                f"{self.names[0]} does not start here, and ONNX Runtime would use {session.get_providers()[0]} "
                "instead: check its driver and libraries"
            )
        return session

    def check(self) -> None:
        """Try the provider on a small model.

        Raises:
            RuntimeError: It does not start here.
        """
        self.session(self.blobs[next(iter(self.header["stairs"].values()))[0]])

    def run(self, model: bytes, feed: Mapping[str, Any] | None = None) -> Callable[[], object]:
        """A run of a model, by default on ones."""
        session = self.session(model)
        return run_of(session, feed_of(session) if feed is None else feed, self.names[0])

    def clock(self) -> Callable[[], float]:
        """The clock to time with."""
        return clock_of(self.threads == 1 and self.names == [CPU])

    def _operators(self, keys: Sequence[str]) -> dict[str, float]:
        header, operators = self.header, self.header["operators"]
        # Messages of a protobuf one after the other are one message with the fields of all.
        parts = [
            header["imports"],
            *([header["reference"]] if len(keys) > 1 else []),
            *(operators[key] for key in keys),
        ]
        model = b"".join(self.blobs[place] for place in parts)
        found = kernel_times(model, self.providers, self.threads)
        return {key: found[operators[key]] for key in keys if operators[key] in found}

    def _cut(self, number: int) -> tuple[list[float], float, float]:
        feed = {name: _values(dtype, shape) for name, dtype, shape in self.header["inputs"]}
        models = [self.header["original"], *(cut["model"] for cut in self.header["cuts"][number : number + 1])]
        runs = [self.run(self.blobs[place], feed) for place in models]
        times = take_turns(runs, seconds=self.seconds, clock=self.clock(), enough=_CUT_ENOUGH)
        return (times[:, 0].tolist(), *(ratio_of(times, 1) if len(runs) > 1 else (1.0, 0.0)))


def _silent(done: int, total: int) -> None:
    pass


def timed_part(part: tuple[str, Any], models: TimedSet) -> tuple[dict[str, Any], Any]:
    """The machine that this runs on, and what it finds for a part of what is to be timed."""
    return machine(models.providers[0], models.threads), models.timed(part)


def _here(parts: Sequence[Any], models: TimedSet) -> Iterable[Any]:
    return (timed_part(part, models) for part in parts)


def table_of(
    models: TimedSet, tell: Callable[[str, int, int], None],
    carried: Callable[[Sequence[Any], TimedSet], Iterable[Any]] = _here,
) -> dict[str, Any]:  # fmt: skip
    """Time a packed set of models.

    Args:
        models: What to time, and how to run it.
        tell: Called with (stage, done, total).
        carried: Returns what :func:`timed_part` finds for each part, in order, on machines that are alike; by default
            on this one.

    Returns:
        The table, as plain data for JSON.
    """
    began, parts, header = time.perf_counter(), models.parts(), models.header
    stairs: dict[str, Any] = {}
    times: dict[str, Any] = {}
    every: list[float] = []
    cuts, facts = [], None
    counts = {kind: sum(one == kind for one, _ in parts) for kind, _ in parts}
    done = dict.fromkeys(counts, 0)
    results = iter(carried(parts, models))
    for kind, what in parts:
        tell(kind, done[kind], counts[kind])
        done[kind] += 1
        facts, found = next(results)
        if kind == "widths":
            stairs[what] = found
        elif kind == "operators":
            times.update(found)
        else:
            turns, ratio, error = found
            every += turns
            cuts += [{"kept": cut["kept"], "ratio": ratio, "error": error} for cut in header["cuts"][what : what + 1]]
    return {
        "format": FORMAT, "version": VERSION, "onnxcop": header["onnxcop"], "model": header["model"],
        "machine": facts, "grid": header["grid"], "axes": header["axes"], "stairs": stairs,
        "seconds": float(np.median(every)), "operators": times, "cuts": cuts,
        "took": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def _opened(model: bytes, providers: Sequence[Any], threads: int | None, libraries: Sequence[str]) -> Any:
    import onnxruntime as ort

    settings = quiet_settings(threads)
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    for library in libraries:
        settings.register_custom_ops_library(os.path.abspath(library))
    return ort.InferenceSession(model, settings, providers=list(providers))


def _stairs(
    models: Sequence[bytes], run: Callable[[bytes], Callable[[], object]], clock: Callable[[], float], seconds: float
) -> list[float] | None:
    """Times of narrower layers as shares of the time of the first; None if such layers do not run."""
    try:
        runs = [run(model) for model in models]
        times = take_turns(runs, seconds, clock, _STAIRS_ENOUGH)
    except Exception:
        return None
    return [ratio_of(times, place)[0] for place in range(1, len(runs))]


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
    part = given.output + ".part"
    try:
        if given.threads is not None and given.threads < 1:
            raise ValueError(f"--threads is {given.threads}; give 1 or more, or leave it out")
        models = TimedSet(text, _chosen(given.provider, given.provider_option), given.threads, seconds=given.seconds)
        models.check()
        with open(part, "w", encoding="utf-8") as file:  # opened before the time is spent
            table = table_of(models, _show)
            json.dump(table, file, indent=1)
        os.replace(part, given.output)
    except Exception as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    finally:
        if os.path.exists(part):
            os.remove(part)
    print(f"wrote {given.output} in {table['took']} s; copy it back and give it to onnxcop --latency-table")
    return 0


def _chosen(provider: str, options: Sequence[str]) -> list[Any]:
    """The providers of ONNX Runtime for the options of the script."""
    import onnxruntime as ort

    names: list[Any] = list(_KNOWN.get(provider.lower(), [provider, CPU]))
    known = ort.get_available_providers()
    if names[0] not in known:
        raise ValueError(f"ONNX Runtime here has no {names[0]}, but {', '.join(known)}; choose one with --provider")
    wrong = [entry for entry in options if "=" not in entry]
    if wrong:
        raise ValueError(f"--provider-option {wrong[0]} is not of the form KEY=VALUE, e.g. trt_fp16_enable=1")
    settings = dict(entry.split("=", 1) for entry in options)
    return [(names[0], settings), *names[1:]] if settings else names


def _show(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)
