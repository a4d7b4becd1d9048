"""What an ONNX file costs, and how well it does on pictures, judged by nothing of the package or of its peers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper

Array = npt.NDArray[Any]
Shapes = dict[str, tuple[int, ...]]
Feeds = dict[str, Array]
REPOSITORY = Path(__file__).resolve().parent.parent
ZOO = Path(os.environ.get("ONNXCOP_ZOO") or REPOSITORY.parent / "shared" / "zoo")
EVAL_DATA = {
    "cifar10": ZOO / "data" / "cifar10_eval.npz",
    "imagenet": ZOO / "data" / "imagenet_eval",
    "mnist": ZOO / "data" / "mnist_eval.npz",
    "digits": REPOSITORY / "models" / "digits_test.npz",
}
CALIB_DATA = {
    "cifar10": ZOO / "data" / "cifar10_calib.npz",
    "imagenet": ZOO / "data" / "imagenet_calib",
    "mnist": ZOO / "data" / "mnist_calib.npz",
    "digits": REPOSITORY / "models" / "digits_calib.npz",
}
KINDS = {
    "cifar_resnet20": "cifar10",
    "imagenet_mobilenet_v2": "imagenet",
    "digit_cnn": "mnist",
    "digits_resnet": "digits",
}
MAC_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
BATCH = 50
PICTURE_SIDE = 224  # stands for an unknown height or width


GIVEN_SHAPES: Shapes = {}  # what a caller knows better than `fixed_shapes` can guess


def fixed_shapes(model: onnx.ModelProto) -> Shapes:
    """The shape of every input, its unknown first axis taken as 1 and any other as a picture's."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: GIVEN_SHAPES.get(value.name)
        or tuple(
            dim.dim_value if dim.dim_value > 0 else (1 if axis == 0 else PICTURE_SIDE)
            for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        )
        for value in model.graph.input
        if value.name not in initializers
    }


def example(model: onnx.ModelProto, seed: int = 0) -> Feeds:
    """One seeded random sample for every input: normal floats, zeros for any other type."""
    draw = np.random.default_rng(seed)
    types_ = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    feeds: Feeds = {}
    for name, shape in fixed_shapes(model).items():
        dtype = helper.tensor_dtype_to_np_dtype(types_[name])
        floating = np.issubdtype(dtype, np.floating)
        feeds[name] = (draw.standard_normal(shape) if floating else np.zeros(shape)).astype(dtype)
    return feeds


def tensor_shapes(model: onnx.ModelProto) -> Shapes:
    """Every shape that ONNX's inference finds for one sample, and those of constants."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]  # a tool may have left the shapes of the larger model there
    for name, shape in fixed_shapes(model).items():
        value = next(value for value in fixed.graph.input if value.name == name)
        for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            dim.dim_value = size
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    found: Shapes = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.dim_value for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    for tensor in graph.initializer:
        found[tensor.name] = tuple(tensor.dims)
    return found


def run_shapes(model: onnx.ModelProto, names: Sequence[str]) -> Shapes:
    """The shapes of `names` as they are when onnxruntime runs one sample."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.value_info[:]
    own = {value.name for value in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in own)
    arrays = session(probe).run(list(names), example(model))
    return {name: array.shape for name, array in zip(names, arrays, strict=True)}


def count_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of one sample in the Conv, ConvTranspose, Gemm and MatMul nodes of the
    main graph.

    Shapes come from ONNX's inference and, where it gives up, from running the model once.

    Args:
        model: a model whose unknown sizes may be set as `fixed_shapes` does.

    Returns:
        The sum over those nodes.
    """
    nodes = [node for node in model.graph.node if node.op_type in MAC_OPS]
    shapes = tensor_shapes(model)
    needed = {name for node in nodes for name in (node.input[0], node.input[1], node.output[0])}
    if missing := sorted(needed - shapes.keys()):
        shapes |= run_shapes(model, missing)
    total = 0
    for node in nodes:
        x, weight, y = (shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
        if node.op_type == "Conv":
            total += math.prod(y) * math.prod(weight[1:])
        elif node.op_type == "ConvTranspose":
            total += math.prod(x) * math.prod(weight[1:])
        elif node.op_type == "Gemm":
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            total += math.prod(y) * x[0 if transposed else 1]
        else:
            total += math.prod(y) * x[-1]
    return total


def count_params(model: onnx.ModelProto) -> int:
    """Elements of the floating-point initializers and Constant nodes of the main graph."""
    constants = [
        attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return sum(
        math.prod(tensor.dims) for tensor in (*model.graph.initializer, *constants) if tensor.data_type in floating
    )


def conv_widths(model: onnx.ModelProto) -> list[int]:
    """Output channels of every Conv with a constant weight, in the order of the graph."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    return [constants[node.input[1]].dims[0] for node in convs if node.input[1] in constants]


def convs_cut(original: onnx.ModelProto, pruned: onnx.ModelProto) -> int | None:
    """How many convolutions lost output channels; None where the two do not correspond."""
    before, after = conv_widths(original), conv_widths(pruned)
    if len(before) != len(after):
        return None
    return sum(new < old for old, new in zip(before, after, strict=True))


# --- running -----------------------------------------------------------------------------------


def session(model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    """A quiet CPU session with as many threads as OMP_NUM_THREADS says (all when unset)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def load_failure(original: onnx.ModelProto, pruned: onnx.ModelProto) -> str:
    """Why onnxruntime cannot use `pruned` in place of `original`; empty when it can."""
    feeds = example(original)
    expected = session(original).run(None, feeds)
    try:
        arrays = session(pruned).run(None, feeds)
    except Exception as error:  # whatever onnxruntime raises is the answer
        return one_line(error)
    before, after = [array.shape for array in expected], [array.shape for array in arrays]
    if before != after:
        return f"output shapes {after}, the original's are {before}"
    if any(np.isfinite(old).all() and not np.isfinite(new).all() for old, new in zip(expected, arrays, strict=True)):
        return "the output is not finite"
    return ""


def one_line(error: BaseException) -> str:
    """The type and the first line of an exception, cut to a readable length."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


# --- data --------------------------------------------------------------------------------------


def normalize(images: Array, mean: Sequence[float], deviation: Sequence[float]) -> Array:
    """uint8 [N, H, W, C] to float32 [N, C, H, W], (x / 255 - mean) / deviation per channel."""
    scaled = (images.astype(np.float32) / 255 - np.float32(mean)) / np.float32(deviation)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32)


def load_samples(path: Path, limit: int | None = None) -> tuple[Array, Array]:
    """Preprocessed samples and labels of a folder of pictures or an .npz file.

    Args:
        path: a folder of JPEG pictures named by their class (ImageNet preprocessing, centre crop
            224), or an .npz with `labels` and either `images` uint8 ([N, H, W, 3]: CIFAR-10,
            [N, H, W]: MNIST) or `input`, preprocessed already.
        limit: take this many, drawn without replacement by a fixed seed.

    Returns:
        float32 [N, C, H, W] and int64 [N].
    """

    def chosen(count: int) -> npt.NDArray[np.int64]:
        if limit is None or limit >= count:
            return np.arange(count)
        return np.sort(np.random.default_rng(0).choice(count, limit, replace=False))

    rgb = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if path.is_dir():
        from PIL import Image

        files = sorted(path.glob("*.jpg"))
        files = [files[index] for index in chosen(len(files))]
        crops = []
        for file in files:
            picture = Image.open(file).convert("RGB")
            left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
            crops.append(np.asarray(picture.crop((left, top, left + 224, top + 224))))
        return normalize(np.stack(crops), *rgb), np.array([int(file.stem) for file in files])
    with np.load(path) as arrays:
        index, labels = chosen(len(arrays["labels"])), arrays["labels"]
        if "input" in arrays:
            return arrays["input"][index], labels[index]
        images = arrays["images"][index]
    if images.ndim == 3:
        return normalize(images[..., None], (0.1307,), (0.3081,)), labels[index]
    return normalize(images, *rgb), labels[index]


def predictions(path: Path, samples: Array) -> npt.NDArray[np.int64]:
    """The class that the model gives each sample, one at a time where its batch is fixed."""
    runner = session(path)
    first = runner.get_inputs()[0]
    step = first.shape[0] if isinstance(first.shape[0], int) else BATCH
    parts = [
        runner.run(None, {first.name: samples[start : start + step]})[0].argmax(axis=1)
        for start in range(0, len(samples), step)
    ]
    return np.concatenate(parts)


def accuracy(path: Path, kind: str, against: Path | None = None) -> dict[str, float]:
    """Top-1 in percent on all samples of a kind, and the agreement with another model there."""
    samples, labels = load_samples(EVAL_DATA[kind])
    own = predictions(path, samples)
    result = {"samples": len(labels), "accuracy": round(100 * float(np.mean(own == labels)), 2)}
    if against is not None:
        other = predictions(against, samples)
        result["base_accuracy"] = round(100 * float(np.mean(other == labels)), 2)
        result["agreement"] = round(100 * float(np.mean(own == other)), 2)
    return result
