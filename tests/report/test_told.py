"""Log lines before a run is done: assumed sizes, and a long run."""

from __future__ import annotations

import logging

import pytest
from small_models import chain

import onnxcop
from onnxcop.pipeline import decide

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def told(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [line for line in caplog.messages if words in line]


def test_assumed_sizes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = chain()
    for axis, name in ((2, "H"), (3, "W")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    with caplog.at_level(logging.INFO, logger="onnxcop"):
        analysis = onnxcop.analyze(model, options=CPU)
        sizes = ",".join(map(str, analysis.input_shapes["x"]))
        assert told(caplog, f"assumed: --input-shape x:{sizes};")
        caplog.clear()
        onnxcop.analyze(model, input_shapes={"x": (1, 3, 8, 8)}, options=CPU)
        onnxcop.analyze(chain(), options=CPU)
        assert not told(caplog, "--input-shape")


@pytest.mark.parametrize("bound", ["_LONG", "_LARGE"])
def test_a_long_run_is_announced(bound: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.INFO, logger="onnxcop"):
        onnxcop.prune(chain(), macs=0.9, options=CPU)
        assert not told(caplog, "takes minutes")
        monkeypatch.setattr(decide, bound, 1.0)
        onnxcop.prune(chain(), macs=0.9, options=CPU)
    assert told(caplog, "takes minutes to measure; --allocate cop --recover merge is quicker")
