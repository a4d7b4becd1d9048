"""The stairs of a machine: at which widths its kernels compute, and which fall off the fast ones.

Convolutions compute channels in blocks of 4, 8 or 16. A width between two multiples of the block is
padded and costs the time of the upper one; where it is no multiple of a finer step either, ONNX Runtime
leaves its blocked layout, reorders around the layer, and takes a slower kernel. Which they are depends
on the processor, the provider and the release, so a few small convolutions are timed, once a machine.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcop._base.cache import remember, remembered
from onnxcop.errors import BudgetError, EngineError
from onnxcop.runtime.latency import measure
from onnxcop.runtime.machine import Machine
from onnxcop.runtime.session import EngineOptions

log = logging.getLogger("onnxcop")

_WIDE = 64
_FINE, _BLOCKS = (1, 2, 4, 8), (1, 2, 4, 8, 16)
_KINDS = (("pointwise", 1, False), ("spatial", 3, False), ("depthwise", 3, True))
_LAYERS, _SIDE = 5, 14
_FALLEN = 1.15  # times the time of the full width, for one that is narrower: a slower kernel
_STAIR = 0.7  # of the share of channels that is left out, in time saved, makes a stair
_SECONDS, _ENOUGH = 1.5, 0.01


@dataclass(frozen=True, slots=True)
class Staircase:
    """The widths that a machine computes well.

    Attributes:
        fine: Widths that are no multiple of it leave the fast kernels; a power of two.
        block: Channels that are computed at once: widths between two multiples cost as much as the
            upper one; a power of two.
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
        """The distance of widths for so many channels: a block, or less where that leaves fewer steps than wanted."""
        grain = self.block
        while grain > self.fine and grain * steps > channels:
            grain //= 2
        return grain


def staircase_of(options: EngineOptions) -> Staircase | None:
    """The stairs of this machine, measured the first time and remembered; None where they cannot be measured."""
    try:
        machine = Machine.of(options).to_dict()
        known = remembered("staircase", machine)
        if known is None:
            found = from_ratios(_ratios(options))
            known = asdict(found)
            remember("staircase", machine, known)
        return Staircase(int(known["fine"]), int(known["block"]))
    except (EngineError, BudgetError, KeyError, TypeError, ValueError) as error:
        log.debug("the widths that suit this machine could not be measured: %s", error)
        return None


def from_ratios(ratios: Mapping[int, Mapping[str, float]]) -> Staircase:
    """Read stairs off measured times.

    Args:
        ratios: By number of channels left out of 64, and by kind of layer: time as a share of that of 64.
    """
    fine = next((step for step in _FINE if max(ratios[step].values()) <= _FALLEN), max(_FINE))
    usual = Staircase()
    saved = {step: 1.0 - float(np.mean(list(found.values()))) for step, found in ratios.items()}
    block = next((step for step in _BLOCKS if step >= fine and saved[step] >= _STAIR * step / _WIDE), None)
    return Staircase(min(fine, block or usual.block), block or max(fine, usual.block))


def _ratios(options: EngineOptions) -> dict[int, dict[str, float]]:
    """Time of a few layers with so many channels less than 64, as a share of that of 64, by kind."""
    found: dict[int, dict[str, float]] = {step: {} for step in _BLOCKS}
    for kind, taps, depthwise in _KINDS:
        widths = [_WIDE, *(_WIDE - step for step in _BLOCKS)]
        models = [_layers(width, taps, depthwise) for width in widths]
        feeds = [{"x": np.ones((1, width, _SIDE, _SIDE), np.float32)} for width in widths]
        times = measure(models, feeds, options, seconds=_SECONDS / len(_KINDS), enough=_ENOUGH)
        for place, step in enumerate(_BLOCKS, start=1):
            found[step][kind] = times.latency(place).ratio
    log.debug("time of layers with fewer channels than %d: %s", _WIDE, found)
    return found


def _layers(width: int, taps: int, depthwise: bool) -> onnx.ModelProto:
    """A few equal convolutions, one after the other."""
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
