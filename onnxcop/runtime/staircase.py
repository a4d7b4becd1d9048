"""The staircase of a machine: the widths at which its kernels are fast.

Convolutions compute channels in blocks of 4, 8 or 16. A width between two multiples of the block is padded and costs
the time of the upper one. If it is no multiple of a finer step either, ONNX Runtime leaves its blocked layout, reorders
data around the layer, and uses a slower kernel. These steps depend on the processor, the provider and the release, so a
few small convolutions are timed once per machine. For other devices the widths come from their documentation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcop._base.cache import remember, remembered
from onnxcop._base.lookup import entry_named
from onnxcop.errors import BudgetError, EngineError
from onnxcop.runtime.latency import measure_times
from onnxcop.runtime.machine import Machine
from onnxcop.runtime.providers import CPU
from onnxcop.runtime.session import EngineOptions, resolve_provider

log = logging.getLogger("onnxcop")

_WIDE = 64
STEPS = (1, 2, 4, 8, 16)  # channels left out of 64 to measure the staircase
_KINDS = (("pointwise", 1, False), ("spatial", 3, False), ("depthwise", 3, True))
_LAYERS, _SIDE = 5, 14
_FALLEN = 1.15  # times the time of the full width, for a narrower layer: it runs a slower kernel
_STAIR = 0.7  # share of the left-out channels that must be saved in time to make a step
_SECONDS, _ENOUGH = 1.5, 0.01


@dataclass(frozen=True, slots=True)
class Staircase:
    """The widths that a machine computes fast.

    Attributes:
        fine: Widths that are not a multiple of it leave the fast kernels; a power of two.
        block: Channels computed at once: a width between two multiples costs as much as the upper one; a power of two.
    """

    fine: int = 4
    block: int = 8

    def __post_init__(self) -> None:
        for value in (self.fine, self.block):
            if value < 1 or value & (value - 1):
                raise BudgetError(f"the widths of a machine come in powers of two, not in steps of {value}")
        if self.fine > self.block:
            raise BudgetError(f"steps of {self.fine} are coarser than blocks of {self.block}")

    def grain(self, channels: int, steps: int) -> int:
        """The step between widths for a number of channels: a block, or less if blocks leave too few steps."""
        grain = self.block
        while grain > self.fine and grain * steps > channels:
            grain //= 2
        return grain


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of device, with the runtime that runs models on it.

    Attributes:
        name: Its value for `--target`.
        staircase: Fine steps for narrow groups, blocks for wide ones.
        source: The documentation that it comes from.
    """

    name: str
    staircase: Staircase
    source: str


_MLAS = "ONNX Runtime, MLAS platform.cpp: blocks of channels (NCHWc) of"
_XNNPACK = "XNNPACK, gemm-config.c"
_GUIDE = "NVIDIA, Matrix Multiplication Background, Tensor Core Requirements"
_TENSORRT = "TensorRT, Optimizing for Tensor Cores"
_FORMATS = "Data Format Descriptions"

TARGETS: tuple[Target, ...] = (
    Target("x86-avx2", Staircase(4, 8), f"{_MLAS} 8; a layer's input is blocked in multiples of 4"),
    Target("x86-avx512", Staircase(4, 16), f"{_MLAS} 16 with AVX-512; a layer's input is blocked in multiples of 4"),
    Target("arm64", Staircase(4, 16), f"{_MLAS} 16 with NEON; a layer's input is blocked in multiples of 4"),
    Target("arm64-xnnpack", Staircase(4, 8), f"{_XNNPACK}: kernels of aarch64 make 8 channels; a vector holds 4"),
    Target("cuda-fp32", Staircase(4, 32), f"{_GUIDE}: TF32 in multiples of 4, on A100 of 32"),
    Target("cuda-fp16", Staircase(8, 64), f"{_GUIDE}: FP16 in multiples of 8, on A100 of 64"),
    Target("tensorrt-fp32", Staircase(4, 32), f"{_TENSORRT}: TF32 in multiples of 4; {_FORMATS}: CHW32"),
    Target("tensorrt-fp16", Staircase(8, 16), f"{_TENSORRT}: FP16 in multiples of 8 or 16; {_FORMATS}: HWC8"),
    Target("tensorrt-int8", Staircase(16, 32), f"{_TENSORRT}: INT8 in multiples of 32; {_FORMATS}: CHW32"),
)


def target_named(name: str) -> Target:
    """Look up a target by name.

    Raises:
        BudgetError: There is no target of this name.
    """
    return entry_named(name, TARGETS, "target")


def staircase_of(options: EngineOptions) -> Staircase | None:
    """The staircase of this machine, measured the first time and cached; None if it cannot be measured."""
    if resolve_provider(options.provider) == [
        CPU
    ]:  # several threads compute the same blocks, but one has a better clock
        options = replace(options, threads=1)
    try:
        machine = Machine.of(options).to_dict()
        known = remembered("staircase", machine)
        if known is None:
            stairs = from_ratios(_ratios(options))
            known = asdict(stairs)
            remember("staircase", machine, known)
        return Staircase(int(known["fine"]), int(known["block"]))
    except (EngineError, BudgetError, KeyError, TypeError, ValueError) as error:
        log.debug("the widths that suit this machine could not be measured: %s", error)
        return None


def from_ratios(ratios: Mapping[int, Mapping[str, float]]) -> Staircase:
    """Derive a staircase from measured times.

    Args:
        ratios: Time as a share of that of 64 channels, by number of channels left out and by kind of layer.
    """
    fine = next((step for step in STEPS[:-1] if max(ratios[step].values()) <= _FALLEN), STEPS[-2])
    usual = Staircase()
    saved = {step: 1.0 - float(np.mean(list(by_kind.values()))) for step, by_kind in ratios.items()}
    block = next((step for step in STEPS if step >= fine and saved[step] >= _STAIR * step / _WIDE), None)
    return Staircase(min(fine, block or usual.block), block or max(fine, usual.block))


def _ratios(options: EngineOptions) -> dict[int, dict[str, float]]:
    """Time of a few layers with some channels less than 64, as a share of the time of 64, by kind of layer."""
    ratios: dict[int, dict[str, float]] = {step: {} for step in STEPS}
    for kind, models in stair_models().items():
        feeds = [{"x": np.ones((1, width, _SIDE, _SIDE), np.float32)} for width in _widths()]
        times = measure_times(models, feeds, options, seconds=_SECONDS / len(_KINDS), enough=_ENOUGH)
        for place, step in enumerate(STEPS, start=1):
            ratios[step][kind] = times.latency(place).ratio
    log.debug("time of layers with fewer channels than %d: %s", _WIDE, ratios)
    return ratios


def stair_models() -> dict[str, list[onnx.ModelProto]]:
    """Models that measure the staircase: a few layers of every kind, at 64 channels and at fewer."""
    return {kind: [_layers(width, taps, depthwise) for width in _widths()] for kind, taps, depthwise in _KINDS}


def _widths() -> list[int]:
    return [_WIDE, *(_WIDE - step for step in STEPS)]


def _layers(width: int, taps: int, depthwise: bool) -> onnx.ModelProto:
    """A few equal convolutions in a row."""
    weights = np.full((width, 1 if depthwise else width, taps, taps), 1e-3, np.float32)
    nodes = [
        helper.make_node(
            "Conv", ["x" if not layer else f"x{layer}", "w"], [f"x{layer + 1}" if layer + 1 < _LAYERS else "y"],
            pads=[taps // 2] * 4, group=width if depthwise else 1,
        )
        for layer in range(_LAYERS)
    ]  # fmt: skip
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width, _SIDE, _SIDE]) for name in "xy")
    graph = helper.make_graph(nodes, "layers", [x], [y], [numpy_helper.from_array(weights, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
