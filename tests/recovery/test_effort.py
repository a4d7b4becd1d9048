"""How much a run computes: sessions that it builds, and multiply-accumulates that they run.

Both are counted, not timed, so they do not depend on the machine. The bounds are shares of what the first version with
measured allocation took for the same two runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxcop

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
FIRST = {"sessions": 927, "runs": 6632, "macs": 72.07e9}  # of the first version, budgets 0.6 and 0.8 together
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def work_of(model: onnx.ModelProto, shapes: Shapes) -> float:
    """Multiply-accumulates of the layers of a model for inputs of these shapes."""
    known = onnx.ModelProto()
    known.CopyFrom(model)
    given = dict(shapes)
    for value in known.graph.input:
        if value.name in given:
            value.type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto())
            for size in given[value.name]:
                value.type.tensor_type.shape.dim.add(dim_value=size)
    for value in known.graph.output:
        value.type.tensor_type.ClearField("shape")
    del known.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(known).graph
    sizes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output, *graph.value_info)
    } | {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    total = 0.0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            made, weights = sizes[node.output[0]], sizes[node.input[1]]
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            each = weights[1:] if node.op_type == "Conv" or transposed else weights[-2:-1]
            assert 0 not in made, node
            total += float(np.prod(made)) * float(np.prod(each))
    return total


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts of sessions, runs and multiply-accumulates of everything that runs meanwhile."""
    counts: Counter[str] = Counter()
    plain: Any = onnxruntime.InferenceSession

    class Counted(plain):  # type: ignore[misc]  # a class that is known at run time
        def __init__(self, source: bytes | str, *arguments: Any, **keywords: Any) -> None:
            super().__init__(source, *arguments, **keywords)
            counts["sessions"] += 1
            self._model = (
                onnx.load_from_string(source)
                if isinstance(source, bytes)
                else onnx.load(source, load_external_data=False)
            )
            self._work: dict[Shapes, float] = {}

        def run(self, outputs: Any, feeds: Mapping[str, Any], *arguments: Any) -> Any:
            shapes = tuple(sorted((name, tuple(value.shape)) for name, value in feeds.items()))
            if shapes not in self._work:
                self._work[shapes] = work_of(self._model, shapes)
            counts["runs"] += 1
            counts["macs"] += self._work[shapes]  # type: ignore[assignment]  # exact up to 2**53
            return super().run(outputs, feeds, *arguments)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Counted)
    yield counts


def test_a_run_computes_less_than_the_first_version_did(models_dir: Path, counted: Counter[str]) -> None:
    for share in (0.6, 0.8):
        result = onnxcop.prune(
            models_dir / "digits_resnet.onnx", macs=share, data=models_dir / "digits_calib.npz", options=CPU,
            limits=onnxcop.Limits(multiple_of=1),  # by default the kernels of this machine are timed first
            latency_seconds=0.0,
        )  # fmt: skip
        assert result.report.held_out["top-1 agreement"] > 0.95
    assert 0 < counted["sessions"] <= 0.9 * FIRST["sessions"]
    assert 0 < counted["runs"] <= 0.67 * FIRST["runs"]
    assert 0 < counted["macs"] <= 0.8 * FIRST["macs"]
