"""Kinds of operators: one table that every stage uses instead of comparing names.

Rules (:mod:`onnxcop.coupling.ops`) describe the effect on labels. A trait says less, but of operators outside coupling
too: whether an operator is a linear layer, or only moves elements. An operator without an entry has no trait.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Flag, auto

import onnx

MICROSOFT = "com.microsoft"


class Trait(Flag):
    """A property of an operator, whatever its attributes."""

    NONE = 0
    LINEAR = auto()
    """A layer: sums the channels of its first input with weights, its second; a bias may follow."""
    BIASED = auto()
    """A linear layer that takes a bias as its third input."""
    SLIDES = auto()
    """A convolution, transposed or not: its weights slide over space, and channels are axis 1."""
    SPREADS = auto()
    """A transposed convolution: every input position adds to several output positions."""
    RECURRENT = auto()
    """A recurrent layer, whose weights are its second input and those after it."""
    PRODUCT = auto()
    """Sums products over channels, of two activations too: matrix products, attention."""
    KEEPS = auto()
    """Reorders or reshapes the elements of its first input, or leaves them unchanged."""
    PICKS = auto()
    """Picks, repeats or regroups elements of its first input by position."""
    SELECTS = auto()
    """Picks elements of its first input by value."""
    JOINS = auto()
    """Joins elements of several inputs."""
    AVERAGES = auto()
    """Sums or averages over space, with the same weights for every channel."""
    SUMS = auto()
    """Adds its inputs element by element, with sign."""
    ADDS = auto()
    """The same, without sign."""
    MULTIPLIES = auto()
    """Multiplies its inputs element by element."""
    DIVIDES = auto()
    """Divides its first input by its second, element by element."""
    SIZES = auto()
    """Reads sizes of its input, not its elements."""
    ACTIVATES = auto()
    """An activation that ONNX Runtime fuses with the convolution before it."""
    SQUASHES = auto()
    """Maps scores to bounded numbers, or leaves them unchanged."""


MOVES = Trait.KEEPS | Trait.PICKS | Trait.JOINS
"""Elements are moved, not computed."""

_LAYER = Trait.LINEAR | Trait.PRODUCT
_WITH_BIAS = _LAYER | Trait.BIASED
_CONV = _WITH_BIAS | Trait.SLIDES

TRAITS: dict[tuple[str, str], Trait] = {
    ("", "Conv"): _CONV,
    ("", "ConvTranspose"): _CONV | Trait.SPREADS,
    ("", "Gemm"): _WITH_BIAS,
    ("", "MatMul"): _LAYER,
    (MICROSOFT, "FusedConv"): _CONV,
    (MICROSOFT, "FusedGemm"): _WITH_BIAS,
    (MICROSOFT, "FusedMatMul"): _LAYER,
    ("", "Einsum"): _LAYER,
    ("", "Attention"): Trait.PRODUCT,
    (MICROSOFT, "Attention"): Trait.PRODUCT,
    (MICROSOFT, "MultiHeadAttention"): Trait.PRODUCT,
    (MICROSOFT, "GroupQueryAttention"): Trait.PRODUCT,
    ("", "LSTM"): Trait.RECURRENT,
    ("", "GRU"): Trait.RECURRENT,
    ("", "RNN"): Trait.RECURRENT,
    ("", "Identity"): Trait.KEEPS | Trait.SQUASHES,
    ("", "Dropout"): Trait.KEEPS,
    ("", "Transpose"): Trait.KEEPS,
    ("", "Reshape"): Trait.KEEPS,
    ("", "Flatten"): Trait.KEEPS,
    ("", "Squeeze"): Trait.KEEPS,
    ("", "Unsqueeze"): Trait.KEEPS,
    ("", "DepthToSpace"): Trait.PICKS,
    ("", "SpaceToDepth"): Trait.PICKS,
    ("", "Expand"): Trait.PICKS,
    ("", "Gather"): Trait.PICKS,
    ("", "Slice"): Trait.PICKS,
    ("", "Split"): Trait.PICKS,
    ("", "Tile"): Trait.PICKS,
    ("", "MaxPool"): Trait.SELECTS,
    ("", "Concat"): Trait.JOINS,
    ("", "AveragePool"): Trait.AVERAGES,
    ("", "GlobalAveragePool"): Trait.AVERAGES,
    ("", "ReduceMean"): Trait.AVERAGES,
    ("", "ReduceSum"): Trait.AVERAGES,
    ("", "Add"): Trait.SUMS | Trait.ADDS,
    ("", "Sub"): Trait.SUMS,
    ("", "Sum"): Trait.SUMS | Trait.ADDS,
    ("", "Div"): Trait.DIVIDES,
    ("", "Mul"): Trait.MULTIPLIES,
    ("", "Shape"): Trait.SIZES,
    ("", "Size"): Trait.SIZES,
    ("", "Clip"): Trait.ACTIVATES,
    ("", "LeakyRelu"): Trait.ACTIVATES,
    ("", "Relu"): Trait.ACTIVATES,
    ("", "HardSigmoid"): Trait.ACTIVATES | Trait.SQUASHES,
    ("", "LogSoftmax"): Trait.SQUASHES,
    ("", "Sigmoid"): Trait.ACTIVATES | Trait.SQUASHES,
    ("", "Softmax"): Trait.SQUASHES,
    ("", "Tanh"): Trait.ACTIVATES | Trait.SQUASHES,
}


def traits(node: onnx.NodeProto) -> Trait:
    """The traits of a node's operator."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    return TRAITS.get((domain, node.op_type), Trait.NONE)


def scales(node: onnx.NodeProto, names: Sequence[str]) -> bool:
    """Whether a node multiplies or divides one of its inputs element by element (all others are in `names`)."""
    known = traits(node)
    first = names[0] == node.input[0] if len(names) == 1 else None
    return first is not None and bool(known & Trait.MULTIPLIES or (known & Trait.DIVIDES and first))
