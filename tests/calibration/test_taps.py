"""How densely the positions of what is watched are sampled."""

from __future__ import annotations

import math

import pytest
from onnx import TensorProto

from onnxcop.calibration.taps import Tap, stride


def _tap(shape: tuple[int, ...], outer: int = 1, inner: int = 1) -> Tap:
    return Tap("k", "t", 1, outer, 8, inner, shape, 1, TensorProto.FLOAT, recurrent=False)


@pytest.mark.parametrize("positions", [1, 2, 7, 9, 64, 500])
@pytest.mark.parametrize("space", [(1,), (7,), (4000,), (7, 7), (3, 900), (48, 320), (9, 10, 11)])
def test_strides_keep_within_the_requested_positions(space: tuple[int, ...], positions: int) -> None:
    def left(step: int) -> int:
        return math.prod(1 if step > 1 and size <= step // 2 else len(range(step // 2, size, step)) for size in space)

    step = stride(_tap((1, 8, *space)), positions)
    assert step == 1 or step % 2 == 0
    assert 1 <= left(step) <= positions
    others = [left(s) for s in (1, *range(2, 2 * max(space), 2)) if left(s) <= positions]
    assert left(step) >= 0.7 * max(others)


def test_strides_count_positions_on_the_channel_and_the_batch_axis() -> None:
    assert stride(_tap((1, 32, 12, 12), outer=4), 36) == 4
    assert stride(_tap((1, 32, 12, 12), inner=4), 4 * 144) == 1
    assert stride(_tap((9, 8, 12, 12)), 9 * 36) == 2
    assert stride(_tap((9, 8)), 1) == 1
