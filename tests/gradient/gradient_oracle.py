"""Central differences, which every rule is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from onnxcop.gradient import Gradients, differentiate

Arrays = Mapping[str, np.ndarray[Any, Any]]
Run = Callable[[Arrays], list[np.ndarray[Any, Any]]]


def one_node(
    kind: str,
    inputs: Sequence[Any],
    *,
    outputs: int = 1,
    opset: int = 18,
    used: Sequence[int] = (0,),
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray[Any, Any]], list[str]]:  # fmt: skip
    """A model of one operator, whose loss is the sum of its outputs times random weights.

    Args:
        kind: The operator.
        inputs: Arrays; floating-point ones are inputs of the graph whose gradient is wanted, others are stored, and
            None is left out.
        outputs: How many outputs the node has.
        opset: The opset.
        used: Which of the outputs the loss reads.
        attributes: Attributes of the node.

    Returns:
        The model, its inputs, and the names of those whose gradient is wanted.
    """
    names = ["" if value is None else f"x{place}" for place, value in enumerate(inputs)]
    arrays = {name: np.asarray(value) for name, value in zip(names, inputs, strict=True) if name}
    floats = {name: value for name, value in arrays.items() if value.dtype.kind == "f"}
    stored = [numpy_helper.from_array(value, name) for name, value in arrays.items() if name not in floats]
    results = [f"y{place}" for place in range(outputs)]
    nodes = [helper.make_node(kind, names, results, **attributes)]
    summands = []
    for place in used:
        nodes.append(helper.make_node("Mul", [f"y{place}", f"r{place}"], [f"m{place}"]))
        nodes.append(helper.make_node("ReduceSum", [f"m{place}"], [f"s{place}"], keepdims=0))
        summands.append(f"s{place}")
    nodes.append(helper.make_node("Sum", summands, ["loss"]))
    listed = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape) for name, value in floats.items()
    ]
    probe = helper.make_model(
        helper.make_graph(nodes[:1], "probe", listed, [onnx.ValueInfoProto(name=name) for name in results], stored),
        opset_imports=[helper.make_opsetid("", opset)], ir_version=9,
    )  # fmt: skip
    shapes = [result.shape for result in runner(probe)(floats)]
    rng = np.random.default_rng(7)
    stored += [
        numpy_helper.from_array(rng.uniform(0.5, 1.5, shapes[place]).astype(np.float32), f"r{place}") for place in used
    ]
    loss = helper.make_tensor_value_info("loss", onnx.TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "one", listed, [loss], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    return model, floats, list(floats)


def runner(model: onnx.ModelProto) -> Run:
    """Runs a model with ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, dict(feeds))  # type: ignore[no-any-return]


def in_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with double-precision inputs, weights and constants."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    for value in (*found.graph.input, *found.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for tensor in found.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name != "scales":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    return found


def finest_runner(model: onnx.ModelProto) -> tuple[Run, type[np.floating[Any]]]:
    """Runs a model in double precision if ONNX Runtime has the kernels, else in single; and which it is."""
    try:
        return runner(in_double(model)), np.float64
    except Exception:  # no kernel for doubles
        return runner(model), np.float32


def central_differences(model: onnx.ModelProto, feeds: Arrays, names: Sequence[str]) -> tuple[Arrays, float]:
    """d loss / d input, element by element, by a stencil of four points; and the error to expect.

    The error is that of rounding, since the stencil is exact for polynomials of the fourth degree.
    """
    weighted = {node.input[0]: node.input[1] for node in model.graph.node[1:] if node.op_type == "Mul"}
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.node[1:], bare.graph.output[:]
    bare.graph.output.extend(onnx.ValueInfoProto(name=name) for name in weighted)
    run, dtype = finest_runner(bare)
    step = 4e-3 if dtype is np.float64 else 2e-2

    def loss(values: Arrays) -> float:
        results = zip(run(values), weighted.values(), strict=True)  # summed up here, in double precision
        return float(sum((result.astype(np.float64) * weights[name]).sum() for result, name in results))

    wide = {name: value.astype(dtype) for name, value in feeds.items()}
    found = {}
    for name in names:
        slope = np.zeros(wide[name].shape)
        for index in np.ndindex(*slope.shape):
            for times, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
                moved = wide[name].copy()
                moved[index] += times * step
                slope[index] += weight * loss(wide | {name: moved}) / (12 * step)
        found[name] = slope
    return found, 2e-4 if dtype is np.float64 else 3e-4


def agree(kind: str, inputs: Sequence[Any], *, without: Sequence[str] = (), **settings: Any) -> Gradients:
    """Assert that the gradient of one operator equals its central differences, and that it is standard ONNX."""
    model, feeds, names = one_node(kind, inputs, **settings)
    wanted = [name for name in names if name not in without]
    expected, tolerance = central_differences(model, feeds, wanted)
    lead = next(name for name in names if name not in without)
    for dynamic in [True, False] if feeds[lead].ndim > 2 else [False]:
        if dynamic:
            model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
        found = differentiate(model, "loss", wanted, input_shapes={n: v.shape for n, v in feeds.items()})
        assert not found.stops and not found.missing, (found.stops, found.missing)
        onnx.checker.check_model(found.model, full_check=True)
        assert {node.domain for node in found.model.graph.node} <= {""}
        results = dict(zip([value.name for value in found.model.graph.output], runner(found.model)(feeds), strict=True))
        for name in wanted:
            mine = results[found.names[name]]
            assert mine.shape == feeds[name].shape and mine.dtype == feeds[name].dtype
            scale = max(1.0, float(np.abs(expected[name]).max()))
            np.testing.assert_allclose(mine / scale, expected[name] / scale, atol=tolerance, rtol=0)
    return found
