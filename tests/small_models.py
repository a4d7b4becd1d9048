"""Small models that tests build for themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ELEMENT = {
    np.float16: TensorProto.FLOAT16,
    np.float32: TensorProto.FLOAT,
    np.float64: TensorProto.DOUBLE,
}


def weights(name: str, shape: Sequence[int], dtype: Any = np.float32) -> onnx.TensorProto:
    """Random weights that depend on their name alone."""
    rng = np.random.default_rng([ord(letter) for letter in name])
    fan = max(int(np.prod(shape[1:])), 1)
    return numpy_helper.from_array((rng.standard_normal(shape) / fan**0.5).astype(dtype), name)


def chain(dtype: Any = np.float32, widths: Sequence[int] = (8, 16), classes: int = 5) -> onnx.ModelProto:
    """Two 3×3 convolutions, global pooling and a linear head, on dynamic batches `[N, 3, 8, 8]`."""
    first, second = widths
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4, doc_string="one"),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["g"], "head", transB=1),
        helper.make_node("Add", ["g", "shift"], ["y"], "shift_add"),
    ]
    shapes = {
        "w1": (first, 3, 3, 3), "b1": (first,), "w2": (second, first, 3, 3), "b2": (second,),
        "w3": (classes, second), "b3": (classes,), "shift": (classes,),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", ELEMENT[dtype], ["N", 3, 8, 8], "pictures")],
        [helper.make_tensor_value_info("y", ELEMENT[dtype], ["N", classes])],
        [weights(name, shape, dtype) for name, shape in shapes.items()],
        doc_string="a small graph",
    )
    return finished(graph)


def disturbed(scale: float = 0.3) -> onnx.ModelProto:
    """The small model with noise in its weights, as a student."""
    model, rng = chain(), np.random.default_rng(1)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        noise = scale * array.std() * rng.standard_normal(array.shape)
        tensor.CopyFrom(numpy_helper.from_array((array + noise).astype(np.float32), tensor.name))
    return model


def linear(dtype: Any = np.float32, width: int = 16) -> onnx.ModelProto:
    """Three linear layers on `[N, 8]`, which ONNX Runtime also computes in double precision."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m1"], "one"),
        helper.make_node("Relu", ["m1"], ["r1"], "relu1"),
        helper.make_node("Gemm", ["r1", "w2", "b2"], ["g2"], "two"),
        helper.make_node("Tanh", ["g2"], ["t2"], "tanh2"),
        helper.make_node("Gemm", ["t2", "w3"], ["y"], "three", transB=1),
    ]
    shapes = {"w1": (8, width), "w2": (width, width), "b2": (width,), "w3": (4, width)}
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", ELEMENT[dtype], ["N", 8])],
        [helper.make_tensor_value_info("y", ELEMENT[dtype], ["N", 4])],
        [weights(name, shape, dtype) for name, shape in shapes.items()],
    )
    return finished(graph)


def finished(graph: onnx.GraphProto, opset: int = 17) -> onnx.ModelProto:
    """A checked model with everything that people write into one."""
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, model_version=7,
        producer_name="a trainer", producer_version="3", doc_string="a small model",
    )  # fmt: skip
    helper.set_model_props(model, {"license": "free", "classes": "a,b,c"})
    onnx.checker.check_model(model, full_check=True)
    return model


def nothing_to_prune() -> onnx.ModelProto:
    """One linear layer whose features are the model's input and output."""
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], "only")],
        "fixed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [weights("w", (4, 3))],
    )
    return finished(graph)


def written(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model as one file."""
    path.write_bytes(model.SerializeToString())
    return path


def written_with_data(model: onnx.ModelProto, path: Path, location: str) -> Path:
    """Write a model with all weights in a file beside it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(
        copy, str(path), save_as_external_data=True, location=location, size_threshold=0,
        convert_attribute=False,
    )  # fmt: skip
    return path


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of all initializers."""
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def outputs(model: onnx.ModelProto | Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The output of a model with the input `x` and one output."""
    from onnxcop.runtime.session import EngineOptions, Session

    with Session(model, EngineOptions(provider="cpu", threads=1)) as session:
        (result,) = session.run({session.inputs[0].name: x}).values()
    return result


def times_in_blocks(model: bytes, padded: Callable[[int], float]) -> dict[int, float]:
    """Times that the kernels of a model of operators are given: convolutions by what they compute, all else nothing.

    Args:
        model: As `onnxcop.runtime.kernel_times.kernel_times` takes it.
        padded: How many channels are computed for a width.
    """
    graph, found = onnx.load_from_string(model).graph, dict[int, float]()
    sizes = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer}
    for node in graph.node:
        number = int(node.output[0].removeprefix("timed_").split("_")[0])
        found.setdefault(number, 1e-9)
        if node.op_type == "Conv":
            out, inner, *_rest = sizes[f"{node.input[1]}_shape"]
            found[number] = 9.0 * padded(out) * (inner if inner == 3 else padded(inner))
    return found


def brightest_channels(count: int, side: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images float32 [count, 3, side, side] with their brightest channel as class, int64 [count]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.standard_normal((count, 3, side, side)).astype(np.float32)
    images[np.arange(count), labels] += 1.0
    return images, labels
