"""Which filters may not be removed, and for which of them what the model is for forbids it."""

from __future__ import annotations

import numpy as np
import pytest
from ops.builder import Builder
from ops.oracle import CPU

import onnxcop
from onnxcop.analysis.inspect import inspect


def _classifier(ending: str) -> onnxcop.Analysis:
    """A convolution of 6 filters, one of a single filter, and a layer of 4 classes with some ending."""
    b = Builder(17, seed=0, dynamic=False)
    x = b.leaky(b.conv(b.input("x", (1, 3, 4, 4)), 6, 3))
    y = b.linear(b.add("Flatten", [b.add("GlobalAveragePool", [x])]), 4)
    if ending == "softmax":
        y = b.add("Softmax", [y], axis=-1)
    elif ending == "written":
        spread = b.add("Exp", [b.add("Sub", [y, b.add("ReduceMax", [y], axes=[-1], keepdims=1)])])
        y = b.add("Div", [spread, b.add("ReduceL1", [spread], axes=[-1], keepdims=1)])
    elif ending == "order":
        y = b.add("CumSum", [y, b.constant(np.array(1))])
        y = b.linear(y, 2)
    return onnxcop.analyze(b.model([y, b.conv(x, 1)]), options=CPU)


@pytest.mark.parametrize("ending", ["output", "softmax", "written"])
def test_outputs_softmaxes_and_single_filters_are_given(ending: str) -> None:
    found = inspect(_classifier(ending))
    assert (found.filters, found.given) == (6 + 4 + 1, 4 + 1)
    assert found.prunable == pytest.approx(6 / 11)
    assert found.prunable_inner == 1
    assert sum(found.frozen.values()) == 5


def test_an_order_of_channels_is_not_given() -> None:
    found = inspect(_classifier("order"))
    assert (found.filters, found.given) == (6 + 4 + 1 + 2, 1 + 2)
    assert found.prunable_inner == pytest.approx(6 / 10)
    assert sum(found.frozen.values()) == 13 - 6
    assert found.frozen_layers[0].reasons[0].startswith("CumSum over this axis")
