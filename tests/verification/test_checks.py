"""Checks of a pruned file that need no masked original: it is valid, it runs, and its outputs are finite."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import onnxcop
from onnxcop.errors import ModelError, VerificationError
from onnxcop.verification.verify import check_runs, check_valid, require_running

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
SHAPES = {"x": (3, 2)}


def model(body: str, outputs: str = "float[N,2] y") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> g (float[N,2] x) => ({outputs}) {{ {body} }}'
    )


def test_an_invalid_file_is_refused_unless_the_original_is_invalid_too() -> None:
    good, bad = model("y = Relu(x)"), model("y = NoSuchOperator(x)")
    assert check_valid(good, bad) == ()
    with pytest.raises(VerificationError, match=r"fails the ONNX checker: .*NoSuchOperator"):
        check_valid(bad, good)
    (note,) = check_valid(bad, bad)
    assert note.startswith("the ONNX checker refuses the original too")


def test_outputs_that_are_not_finite_are_refused_unless_the_original_has_them_too() -> None:
    finite, infinite = model("y = Add(x, x)"), model("z = Sub(x, x) y = Log(z)")
    assert check_runs(finite, finite, SHAPES, CPU)
    with pytest.raises(VerificationError, match="output 'y' of the pruned model is not finite"):
        check_runs(finite, infinite, SHAPES, CPU)
    assert check_runs(infinite, infinite, SHAPES, CPU)
    assert check_runs(infinite, finite, SHAPES, CPU)
    whole = ("y = Cast<to = 7>(x)", "int64[N,2] y")
    assert check_runs(model(*whole), model(*whole), SHAPES, CPU)


def test_a_sequence_hides_no_output_behind_it() -> None:
    outputs = "seq(float[N,2]) s, float[N,M] y"
    original = model("s = SequenceConstruct(x, x) y = Add(x, x)", outputs)
    wider = model("s = SequenceConstruct(x, x) y = Concat<axis = 1>(x, x)", outputs)
    assert check_runs(original, original, SHAPES, CPU)
    with pytest.raises(VerificationError, match=r"output 'y' is float32\[3, 4\], the original's is float32\[3, 2\]"):
        check_runs(original, wider, SHAPES, CPU)


def test_a_file_that_does_not_run_is_refused() -> None:
    good = model("y = Add(x, x)")
    broken = model("c = Constant<value = float[3] {1, 2, 3}>() y = Add(x, c)")
    with pytest.raises(VerificationError, match="the pruned model does not run"):
        check_runs(good, broken, SHAPES, CPU)


def test_a_format_that_is_too_new_is_refused_with_the_remedy() -> None:
    feed = {"x": np.zeros((3, 2), np.float32)}
    require_running(model("y = Relu(x)"), feed, CPU)
    new = model("y = Relu(x)")
    new.ir_version = 99
    with pytest.raises(ModelError, match=r"its IR version is 99, .* up to \d+; save it with an older ir_version, or"):
        require_running(new, feed, CPU)
    new = model("y = Relu(x)")
    new.opset_import[0].version = 99
    with pytest.raises(
        ModelError, match=r"its opset of ai\.onnx is 99, .* up to \d+; export it with an older opset, or"
    ):
        require_running(new, feed, CPU)
