"""The rules on the node test cases that the ONNX package ships."""

from __future__ import annotations

import pytest
from onnx import helper

from onnxcop.coupling.ops import DEFAULT_RULES
from onnxcop.coupling.result import Coupling
from onnxcop.coupling.tracing import trace
from onnxcop.errors import EngineError
from onnxcop.graph.shapes import infer
from onnxcop.runtime.session import Session
from ops.corpus import Case, cases
from ops.oracle import CPU, check_moves, check_removal
from ops.sample import Sample

OPERATORS = sorted(op for domain, op in DEFAULT_RULES if not domain)
# Their cases have a single channel, or their results do not carry the axes of their operands.
NOTHING_LIVE = {"Conv", "EyeLike", "GridSample", "QLinearConv", "Range", "Resize", "RoiAlign", "Shape", "Size",
                "Upsample"}  # fmt: skip


def _traced(case: Case) -> Coupling:
    """Trace a case; the labels of its outputs must be as long as the real outputs."""
    model = case.stored_model()
    shapes = infer(model, {})
    if shapes.unknown:
        known = {n: (helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in case.outputs.items()}
        shapes = infer(model, {}, known)
    coupling = trace(model, shapes)
    for name, array in case.outputs.items():
        label = coupling.labels.get(name)
        if label is not None:
            assert len(label) == array.ndim, case.name
            for axis, atoms in enumerate(label):
                assert atoms is None or len(atoms) == array.shape[axis], case.name
    return coupling


@pytest.mark.parametrize("op", ["", *OPERATORS])
def test_labels_fit_the_real_outputs(op: str) -> None:
    if op and op not in cases():
        pytest.skip("the ONNX package ships no case")
    live = 0
    for case in cases()[op]:
        coupling = _traced(case)
        live += any(name in coupling.labels for name in case.outputs)
    assert bool(live) == (op not in NOTHING_LIVE)


def _runs(sample: Sample) -> bool:
    """Whether ONNX Runtime has a kernel for these types."""
    try:
        Session(sample.fed_model([]), CPU, optimize=False).run({})
    except EngineError:
        return False
    return True


@pytest.mark.parametrize("op", OPERATORS)
def test_removal(op: str) -> None:
    seen: set[str] = set()
    for case in cases().get(op, []):
        sample = case.sample()
        if sample is None or not _runs(sample) or _traced(case).declined:
            continue
        form = repr((sample.attributes, [None if a is None else (a.shape, a.dtype) for a in sample.inputs]))
        if form in seen:
            continue
        seen.add(form)
        check_moves(sample)
        check_removal(sample)
    if not seen:
        pytest.skip("no case that ONNX Runtime can run on floats")
