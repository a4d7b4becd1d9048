"""Devices that are not at hand: the widths that the documentation of each asks for, by name."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcop.errors import BudgetError
from onnxcop.runtime.staircase import Staircase


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of device with the program that runs models on it.

    Attributes:
        name: What it is called on the command line.
        staircase: Fine steps for narrow groups, blocks for wide ones.
        source: What says so.
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
    """The target of a name.

    Raises:
        BudgetError: There is none.
    """
    for entry in TARGETS:
        if entry.name == name:
            return entry
    raise BudgetError(f"no target is called {name!r}; choose one of {', '.join(entry.name for entry in TARGETS)}")
