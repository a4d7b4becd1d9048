"""Every operator rule against the real operator in ONNX Runtime."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcop.coupling.ops import DEFAULT_RULES
from ops import (
    cases_attention,
    cases_blocked,
    cases_contraction,
    cases_elementwise,
    cases_fused,
    cases_movement,
    cases_quantized,
    cases_scatter,
    cases_shapes,
    cases_space,
    cases_statistics,
)
from ops.oracle import check_labels, check_moves, check_removal

CASES = (
    cases_attention.CASES
    | cases_blocked.CASES
    | cases_contraction.CASES
    | cases_elementwise.CASES
    | cases_fused.CASES
    | cases_movement.CASES
    | cases_quantized.CASES
    | cases_scatter.CASES
    | cases_shapes.CASES
    | cases_space.CASES
    | cases_statistics.CASES
)
RELAXED = settings(
    deadline=None,
    derandomize=True,
    max_examples=20,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def test_every_table_entry_has_a_case() -> None:
    assert DEFAULT_RULES.keys() == CASES.keys()


@pytest.mark.parametrize("key", sorted(CASES), ids="".join)
@RELAXED
@given(data=st.data())
def test_rule(key: tuple[str, str], data: st.DataObject) -> None:
    sample = data.draw(CASES[key])
    if sample.moves:
        check_labels(sample)
    check_moves(sample)
    check_removal(sample, seed=data.draw(st.integers(0, 99)))
