"""A table of times measured on another device, as `onnxcop profile` writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnxcop._base.documents import DocumentKind, list_in, table_in, text_in, time_in, whole_in, wholes_in
from onnxcop.errors import PlanMismatchError
from onnxcop.runtime.machine import Machine
from onnxcop.runtime.on_device import FORMAT, VERSION
from onnxcop.runtime.staircase import STEPS, Staircase, from_ratios

_KIND = DocumentKind(FORMAT, VERSION, "table of times", "`onnxcop profile MODEL -o TABLE.json` makes one")
_SHOWN = 3  # inputs to name in a line


@dataclass(frozen=True, slots=True)
class TimedCut:
    """A cut of the whole model, timed beside the original.

    Attributes:
        kept: How many indices each axis keeps.
        ratio: Its time as a share of the original's.
        error: Standard error of that.
    """

    kept: tuple[int, ...]
    ratio: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTable:
    """Times of a model's operators on a device.

    Attributes:
        source: The file, for messages.
        onnxcop: The version of onnxcop that chose what to time.
        model: Name of the model.
        sha256: Its SHA-256.
        input_shapes: Its input shapes.
        policy: The coupling policy of the analysis.
        machine: The device.
        grid: The timed widths.
        staircase: The widths that the device computes well; None if they could not be timed.
        axes: Sizes of the model's axes.
        seconds: Seconds of a run of the original.
        operators: Seconds by key; None for an operator that does not run alone.
        cuts: Timed cuts of the whole model.
    """

    source: str
    onnxcop: str
    model: str
    sha256: str
    input_shapes: Mapping[str, tuple[int, ...]]
    policy: str
    machine: Machine
    grid: Staircase
    staircase: Staircase | None
    axes: tuple[int, ...]
    seconds: float
    operators: Mapping[str, float | None]
    cuts: tuple[TimedCut, ...]

    @property
    def device(self) -> str:
        """Description of the device."""
        threads = "" if self.machine.threads is None else f", threads: {self.machine.threads}"
        provider = self.machine.provider.removesuffix("ExecutionProvider")
        settings = "".join(f", {name}={value}" for name, value in self.machine.settings.items())
        return f"{self.machine.processor} (ONNX Runtime {self.machine.runtime}, {provider}{settings}{threads})"

    @property
    def described(self) -> str:
        """Description of the contents, in a line."""
        stairs = "unknown widths" if self.staircase is None else f"blocks of {self.staircase.block} channels"
        return f"{len(self.operators)} operators and {len(self.cuts)} cuts on {self.device}, {stairs}"

    def summary(self) -> dict[str, Any]:
        """Summary of the contents as plain data."""
        stairs = None if self.staircase is None else asdict(self.staircase)
        return {
            "machine": self.machine.to_dict(), "staircase": stairs, "seconds": self.seconds,
            "operators": len(self.operators), "cuts": len(self.cuts),
        }  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> DeviceTable:
        """Read a table.

        Raises:
            PlanMismatchError: The file is missing, damaged, of another version, or not a table.
        """
        return cls.of(_KIND.load(path), str(path))

    @classmethod
    def of(cls, document: Any, source: str) -> DeviceTable:
        """Build a table from plain data; see :meth:`load`."""
        with _KIND.fields(document, source) as fields:
            return _read(fields, source)

    def check(
        self, sha256: str, input_shapes: Mapping[str, Sequence[int]], policy: str, axes: Sequence[int], again: str
    ) -> None:
        """Check that the table belongs to a model.

        Args:
            sha256: Identity of the model.
            input_shapes: Its input shapes.
            policy: The coupling policy of its analysis.
            axes: Sizes of its axes.
            again: How to make a table of it, for messages.

        Raises:
            PlanMismatchError: It belongs to another model, or to this one with other options.
        """
        if sha256 != self.sha256:
            raise PlanMismatchError(
                f"{self.source} holds times of another model, {self.model} (SHA-256 {self.sha256[:12]}…, not "
                f"{sha256[:12]}…); {again}"
            )
        given = {name: tuple(sizes) for name, sizes in input_shapes.items()}
        if self.input_shapes != given:
            own, other = (_shapes(dict(one.items() - two.items()))
                          for one, two in ((self.input_shapes, given), (given, self.input_shapes)))  # fmt: skip
            raise PlanMismatchError(
                f"{self.source} holds times of other inputs, {own}, not {other}; give --input-shape, or {again}"
            )
        if policy != self.policy:
            raise PlanMismatchError(
                f"{self.source} holds times of --policy {self.policy}, not of {policy}; give that, or {again}"
            )
        if tuple(axes) != self.axes:
            raise PlanMismatchError(
                f"{self.source} was made by onnxcop {self.onnxcop}, which finds other widths in the model; {again}"
            )

    def check_provider(self, provider: str) -> None:
        """Check that the table belongs to a provider.

        Raises:
            PlanMismatchError: It belongs to another provider.
        """
        if provider != self.machine.provider:
            raise PlanMismatchError(
                f"{self.source} holds times of the provider {self.machine.provider}, not of {provider}; leave "
                "--provider out, or run `onnxcop profile` with it on the device"
            )


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    """A few shapes, as `--input-shape` takes them."""
    texts = [f"{name}:{','.join(map(str, sizes))}" for name, sizes in sorted(shapes.items())]
    return " ".join(texts[:_SHOWN]) + (f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "") or "none"


def _read(document: Mapping[str, Any], source: str) -> DeviceTable:
    model, machine = table_in(document["model"]), table_in(document["machine"])
    axes = wholes_in(document["axes"])
    threads = machine["threads"]
    operators = {
        key: None if value is None else time_in(value) for key, value in table_in(document["operators"]).items()
    }
    return DeviceTable(
        source=source, onnxcop=text_in(document["onnxcop"]),
        model=text_in(model["name"]), sha256=text_in(model["sha256"]),
        input_shapes={name: wholes_in(sizes) for name, sizes in table_in(model["input_shapes"]).items()},
        policy=text_in(model["policy"]),
        machine=Machine(
            text_in(machine["processor"]), text_in(machine["runtime"]), text_in(machine["provider"]),
            None if threads is None else whole_in(threads),
            settings={name: text_in(value) for name, value in table_in(machine["settings"]).items()},
        ),
        grid=_staircase(document["grid"]), staircase=_stairs(document["stairs"]), axes=axes,
        seconds=time_in(document["seconds"]), operators=operators,
        cuts=tuple(_cut(table_in(one), axes) for one in list_in(document["cuts"])),
    )  # fmt: skip


def _cut(entry: Mapping[str, Any], axes: tuple[int, ...]) -> TimedCut:
    kept = wholes_in(entry["kept"])
    if len(kept) != len(axes) or any(left > size for left, size in zip(kept, axes, strict=True)):
        raise ValueError("a cut does not fit the axes")
    return TimedCut(kept, time_in(entry["ratio"]), time_in(entry["error"], zero=True))


def _staircase(value: Any) -> Staircase:
    entry = table_in(value)
    fine, block = whole_in(entry["fine"]), whole_in(entry["block"])
    if any(step < 1 or step & (step - 1) for step in (fine, block)) or fine > block:
        raise ValueError(f"no device has steps of {fine} and blocks of {block}")
    return Staircase(fine, block)


def _stairs(value: Any) -> Staircase | None:
    """Staircases by kind of layer, from the times of narrower layers; kinds that do not run are left out."""
    kinds = {kind: ratios for kind, ratios in table_in(value).items() if ratios is not None}
    times = {kind: [time_in(ratio) for ratio in list_in(ratios)] for kind, ratios in kinds.items()}
    if any(len(ratios) != len(STEPS) for ratios in times.values()):
        raise ValueError(f"the stairs of a kind of layer are {len(STEPS)} times")
    if not times:
        return None
    return from_ratios({step: {kind: times[kind][place] for kind in times} for place, step in enumerate(STEPS)})
