"""The network that recovery expects against the written file."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper
from transformer_models import bert

import onnxcop
from onnxcop.data.synthetic import synthetic_data
from onnxcop.errors import InternalError
from onnxcop.recovery.rounds import Recovery, RecoverySettings
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions("cpu", threads=1)


@pytest.fixture(scope="module")
def recovery() -> Recovery:
    """A transformer without half of the units of every group."""
    analysis = onnxcop.analyze(bert(), options=CPU, biases=True)
    fit, held_out = synthetic_data(analysis, 12, 4, 0).split(0.5, 0)
    found = Recovery(analysis, fit, held_out, CPU, RecoverySettings())
    for group in analysis.structure.groups:
        found.working.alive[group.units[: group.width // 2]] = False
    return found


def test_the_written_file_gives_what_was_believed(recovery: Recovery) -> None:
    found = recovery.belief(recovery.working).check(recovery.written())
    assert found.value > 0.01
    assert found.value == pytest.approx(recovery.divergence().value, rel=1e-3)


def test_a_file_that_computes_something_else_is_refused_with_the_groups(recovery: Recovery) -> None:
    written = recovery.written()
    for tensor in written.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and values.ndim == 2:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(-values), tensor.name))
    with pytest.raises(InternalError, match=r"the search expected .* because of .* nothing was written"):
        recovery.belief(recovery.working).check(written)
