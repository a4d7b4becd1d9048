"""`--then-quantize`: the int8 model beside the pruned one, and its line on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcop._base.formatting import percent, sized
from onnxcop.cli.arguments import data_arguments, engine_from

if TYPE_CHECKING:
    import onnx

    from onnxcop.pipeline.compare import Comparison


@dataclass(frozen=True, slots=True)
class Quantized:
    """An int8 model.

    Attributes:
        mode: `static` or `dynamic`.
        path: Its path.
        model: The model.
        comparison: Comparison with the original, on the data of the run.
    """

    mode: str
    path: Path
    model: onnx.ModelProto
    comparison: Comparison

    def line(self) -> str:
        """Cost and agreement with the original, in a line."""
        a, b, latency = self.comparison.a.cost, self.comparison.b.cost, self.comparison.latency
        parts = [f"file size {sized(b.bytes)}, {percent(b.bytes, a.bytes)}"]
        if latency is not None:
            parts.append(f"latency {latency.after}, {latency.share} of the original's")
        figures = None if self.comparison.agreement is None else self.comparison.agreement.figures
        if figures is not None:
            parts.append(f"divergence {figures.divergence.number()}")
            parts += [
                f"{one.agreement_name} {one.agreement.percent()}"
                for one in figures.outputs
                if one.agreement is not None
            ]
        return f"int8 ({self.mode}): {'; '.join(parts)}"

    def record(self) -> dict[str, Any]:
        """The same for `--json`."""
        return {"mode": self.mode, "path": str(self.path), "comparison": self.comparison.to_dict()}


def int8_path(target: Path) -> Path:
    """Path of the int8 model: `small.onnx` → `small.int8.onnx`."""
    return target.with_name(f"{target.name.removesuffix('.onnx')}.int8.onnx")


def quantized(original: Path, pruned: onnx.ModelProto, target: Path, values: Mapping[str, Any]) -> Quantized | None:
    """Quantize a pruned model as `--then-quantize` says, and compare the result with the original.

    Both are calibrated and compared on the data of the run; without data, `dynamic` is compared on synthetic inputs.
    """
    mode = values["then_quantize"]
    if mode is None:
        return None
    from onnxcop.pipeline.compare import compare
    from onnxcop.pipeline.quantize import quantize

    shared = {
        "options": engine_from(values), "input_shapes": dict(values["input_shape"]) or None, **data_arguments(values),
    }  # fmt: skip
    model = quantize(pruned, mode, **shared)
    found = compare(original, model, latency_seconds=values["latency_seconds"], task=values["task"], **shared)
    return Quantized(mode, int8_path(target), model, found)
