"""Calibration: statistics gathered inside the graph against numpy on the raw feature maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcop.analysis import layers
from onnxcop.calibration import calibrate as calibration
from onnxcop.calibration import statistics as stats
from onnxcop.calibration.calibrate import calibrate, merge
from onnxcop.calibration.instrument import instrument
from onnxcop.calibration.statistics import CalibrationStats, Moments
from onnxcop.calibration.taps import taps_of
from onnxcop.coupling import groups, tracing
from onnxcop.data.open import CalibrationData, open_source
from onnxcop.errors import CalibrationError, PlanMismatchError
from onnxcop.graph import io as models
from onnxcop.runtime.input_shapes import settle_shapes, shapes_of
from onnxcop.runtime.session import EngineOptions, OutOfMemory, Session

CPU = EngineOptions("cpu", threads=1)
Array = np.ndarray[Any, Any]


def _model(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, Array],
    input_shape: Sequence[int | str],
    *,
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    extra_outputs: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model from x to y; the weights take the type of x."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    stored = [
        numpy_helper.from_array(w if w.dtype == np.int64 else w.astype(dtype), name) for name, w in weights.items()
    ]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", kind, input_shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in ("y", *extra_outputs)],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model)
    return model


def _weights(seed: int = 0, **shapes: Sequence[int]) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape) / math.sqrt(max(1, math.prod(shape[1:]))) for name, shape in shapes.items()
    }


def _convs(rank: int = 2, size: int | str = 9, **options: Any) -> onnx.ModelProto:
    """Conv, Relu, Conv, Relu, Conv over `rank` spatial axes."""
    node, kernel = helper.make_node, [3] * rank
    pads = [1] * (2 * rank)
    return _model(
        [
            node("Conv", ["x", "w1"], ["a"], pads=pads),
            node("Relu", ["a"], ["b"]),
            node("Conv", ["b", "w2"], ["c"], pads=pads, strides=[2] * rank),
            node("Relu", ["c"], ["d"]),
            node("Conv", ["d", "w3"], ["y"]),
        ],
        _weights(w1=[8, 3, *kernel], w2=[12, 8, *kernel], w3=[4, 12, *[1] * rank]),
        ["N", 3, *[size if isinstance(size, int) else f"{size}{i}" for i in range(rank)]],
        **options,
    )


def _layers(model: onnx.ModelProto) -> list[layers.Layer]:
    shapes = shapes_of(model, settle_shapes(model, None, CPU), CPU)
    return layers.layers_of(model, groups.structure_of(tracing.trace(model, shapes)))


def _source(model: onnx.ModelProto, x: Array, batch_size: int = 4) -> CalibrationData:
    with Session(model, CPU) as session:
        return open_source({"x": x}, session.inputs, samples=len(x), batch_size=batch_size)


def _gathered(
    model: onnx.ModelProto,
    x: Array,
    positions: int | None = None,
    batch_size: int = 4,
    options: EngineOptions = CPU,
) -> CalibrationStats:
    return calibrate(
        model,
        _layers(model),
        _source(model, x, batch_size),
        options,
        sha=models.sha256(model),
        positions=positions,
    )


def _observations(values: Array, layer: layers.Layer) -> Array:
    """float64 [observations, channels] of a feature map."""
    moved = np.moveaxis(values.astype(np.float64), layer.axis, -1)
    split = moved.reshape(*moved.shape[:-1], layer.outer, layer.channels, layer.inner)
    return np.moveaxis(split, -2, -1).reshape(-1, layer.channels)


def _maps(model: onnx.ModelProto, x: Array, names: set[str]) -> dict[str, Array]:
    """Raw feature maps, from ONNX Runtime."""
    exposed = models.load(model)
    have = {value.name for value in exposed.graph.output}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=n) for n in sorted(names - have))
    with Session(exposed, CPU) as session:
        maps = session.run({"x": x}, sorted(names - {"x"}))
    return maps | {"x": x}


def _distance(found: Moments, rows: Array) -> float:
    """The largest error of mean and covariance, in units of the channels' deviations."""
    mean, count = rows.mean(axis=0), len(rows)
    assert found.count == count
    scatter = (rows - mean).T @ (rows - mean)
    scale = np.sqrt(np.maximum(np.diag(scatter), 1e-30))
    live = scale > 1e-12 * scale.max()
    errors = np.abs(found.scatter - scatter)[np.ix_(live, live)] / np.outer(scale, scale)[np.ix_(live, live)]
    means = np.abs(found.mean - mean) / (np.abs(mean) + scale / math.sqrt(count))
    return float(max(errors.max(), means[live].max()))


def _check(model: onnx.ModelProto, x: Array, expected: Sequence[str], bound: float = 1e-5) -> None:
    """All statistics of a model against numpy."""
    found = _gathered(model, x)
    read = {stats.tap_key(layer): layer for layer in _layers(model)}
    assert sorted(layer.tensor for layer in read.values()) == sorted(expected)
    assert found.taps.keys() == read.keys()
    assert found.samples == len(x)
    maps = _maps(model, x, set(expected))
    for key, layer in read.items():
        assert _distance(found.taps[key], _observations(maps[layer.tensor], layer)) <= bound


def _x(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("opset", [9, 12, 17])
def test_convolutions_of_any_rank_and_opset(rank: int, opset: int) -> None:
    _check(_convs(rank, 7, opset=opset), _x(10, 3, *[7] * rank), ["b", "d"])


def _products(**options: Any) -> onnx.ModelProto:
    """Three matrix products over a sequence."""
    node = helper.make_node
    return _model(
        [
            node("MatMul", ["x", "w1"], ["a"]),
            node("Relu", ["a"], ["b"]),
            node("MatMul", ["b", "w2"], ["c"]),
            node("Tanh", ["c"], ["d"]),
            node("MatMul", ["d", "w3"], ["y"]),
        ],
        _weights(w1=[6, 16], w2=[16, 5], w3=[5, 2]),
        ["N", 11, 6],
        **options,
    )


def test_matrix_products_with_channels_last() -> None:
    _check(_products(), _x(9, 11, 6), ["b", "d"])


@pytest.mark.parametrize("opset", [9, 17])
def test_dense_layers(opset: int) -> None:
    node = helper.make_node
    model = _model(
        [
            node("Gemm", ["x", "w1", "b1"], ["a"], transB=1),
            node("Relu", ["a"], ["b"]),
            node("Gemm", ["b", "w2", "b2"], ["y"], transB=1),
        ],
        _weights(w1=[16, 6], b1=[16], w2=[3, 16], b2=[3]),
        ["N", 6],
        opset=opset,
    )
    _check(model, _x(50, 6), ["b"])


@pytest.mark.parametrize("channels_last", [False, True])
def test_positions_of_a_flattened_map_are_observations(channels_last: bool) -> None:
    node = helper.make_node
    order = [node("Transpose", ["b"], ["t"], perm=[0, 2, 3, 1])] if channels_last else []
    model = _model(
        [
            node("Conv", ["x", "w1"], ["a"]),
            node("Relu", ["a"], ["b"]),
            *order,
            node("Flatten", ["t" if channels_last else "b"], ["f"]),
            node("Gemm", ["f", "w2", "b2"], ["y"]),
        ],
        _weights(w1=[8, 2, 3, 3], w2=[8 * 20, 3], b2=[3]),
        ["N", 2, 6, 7],
    )
    (layer,) = _layers(model)
    assert (layer.channels, layer.outer, layer.inner) == ((8, 20, 1) if channels_last else (8, 1, 20))
    _check(model, _x(7, 2, 6, 7), ["f"])


def test_graph_outputs_may_be_watched() -> None:
    model = _convs(extra_outputs=["b"])
    watched = [layer for layer in _layers(_convs()) if layer.tensor == "b"]
    x = _x(6, 3, 9, 9)
    found = calibrate(model, watched, _source(model, x), CPU, sha="", positions=None)
    rows = _observations(_maps(model, x, {"b"})["b"], watched[0])
    assert _distance(found.taps[stats.tap_key(watched[0])], rows) <= 1e-5


def test_graph_inputs_may_be_watched() -> None:
    model = _convs()
    (kernel,) = {layer.kernel for layer in _layers(model) if layer.tensor == "b"}
    layer = layers.Layer(0, kernel, "x", axis=1, units=np.arange(3))
    x = _x(6, 3, 9, 9)
    found = calibrate(model, [layer], _source(model, x), CPU, sha="", positions=None)
    assert _distance(found.taps[stats.tap_key(layer)], _observations(x, layer)) <= 1e-5


def test_double_precision_is_kept() -> None:
    model = _products(kind=TensorProto.DOUBLE)
    x = np.random.default_rng(1).standard_normal((9, 11, 6))
    _check(model, x, ["b", "d"], bound=1e-12)


def test_half_precision_is_summed_in_single() -> None:
    model = _convs(kind=TensorProto.FLOAT16)
    _check(model, _x(40, 3, 9, 9).astype(np.float16), ["b", "d"], bound=1e-5)


def test_means_far_above_the_deviation_do_not_cancel() -> None:
    node = helper.make_node
    offset = np.array([1000.0, -1000.0, 0.0, 5.0, 1000.0, 3000.0]).reshape(1, 6, 1, 1)
    model = _model(
        [
            node("Conv", ["x", "w1"], ["a"]),
            node("Add", ["a", "offset"], ["b"]),
            node("Conv", ["b", "w2"], ["y"]),
        ],
        _weights(w1=[6, 3, 1, 1], w2=[4, 6, 1, 1]) | {"offset": offset},
        ["N", 3, 16, 16],
    )
    x = _x(32, 3, 16, 16)
    rows = _observations(_maps(model, x, {"b"})["b"], _layers(model)[0])
    assert (np.abs(rows.mean(axis=0)) / rows.std(axis=0)).max() > 1000
    _check(model, x, ["b"])


@pytest.mark.parametrize("positions", [None, 4, "auto"])
def test_batch_size_does_not_matter(positions: int | None) -> None:
    model, x = _convs(size=24), _x(13, 3, 24, 24)
    one, many = (_gathered(model, x, positions, batch_size) for batch_size in (1, 13))
    assert one.samples == many.samples == 13
    _assert_same(one, many)


def _assert_same(one: CalibrationStats, other: CalibrationStats, bound: float = 1e-5) -> None:
    assert one.taps.keys() == other.taps.keys()
    assert one.samples == other.samples
    for key, moments in one.taps.items():
        against = other.taps[key]
        assert moments.count == against.count > 0
        scale = np.sqrt(np.diag(against.scatter))
        assert scale.min() > 0
        assert (np.abs(moments.scatter - against.scatter) <= bound * np.outer(scale, scale)).all()
        deviation = scale / math.sqrt(against.count)
        assert (np.abs(moments.mean - against.mean) <= bound * deviation).all()


def test_samples_of_different_sizes_are_counted_right() -> None:
    model = _convs(size="s")
    xs = [_x(1, 3, size, size, seed=size) for size in (8, 12, 30)]
    with Session(model, CPU) as session:
        source = open_source([{"x": x} for x in xs], session.inputs, batch_size=4)
    found = calibrate(model, _layers(model), source, CPU, sha="", positions=None)
    for layer in _layers(model):
        rows = [_observations(_maps(model, x, {layer.tensor})[layer.tensor], layer) for x in xs]
        assert _distance(found.taps[stats.tap_key(layer)], np.concatenate(rows)) <= 1e-5


@pytest.mark.parametrize("rank", [1, 2])
def test_maps_of_different_sizes_are_thinned_alike(rank: int) -> None:
    """The first sample settles the stride; of smaller maps at least one position is taken."""
    model = _convs(rank, size="s")
    xs = [_x(1, 3, *[size] * rank, seed=size) for size in (48, 31, 6, 3)]
    with Session(model, CPU) as session:
        source = open_source([{"x": x} for x in xs], session.inputs, samples=4)
    sizes = [feed["x"].shape[2] for feed in source.batches(1)]
    xs = [feed["x"] for feed in source.batches(1)]
    found = calibrate(model, _layers(model), source, CPU, sha="", positions=4**rank)
    layer = next(layer for layer in _layers(model) if layer.tensor == "b")
    moments = found.moments(layer)
    assert moments is not None
    step = 2 * round(sizes[0] / 4 / 2)
    rows = []
    for x, size in zip(xs, sizes, strict=True):
        taken = range(step // 2, size, step) if size > step // 2 else [0]
        values = _maps(model, x, {"b"})["b"]
        for axis in range(2, 2 + rank):
            values = np.take(values, list(taken), axis)
        rows.append(_observations(values, layer))
    assert _distance(moments, np.concatenate(rows)) <= 1e-5


@pytest.mark.parametrize("opset", [10, 17])
def test_thinned_maps_are_read_on_an_even_grid(opset: int) -> None:
    """The grid lies inside the map, in the middles of equal parts."""
    model = _convs(size=48, opset=opset)
    x = _x(5, 3, 48, 48)
    layer = next(layer for layer in _layers(model) if layer.tensor == "b")
    found = _gathered(model, x, positions=9).moments(layer)
    assert found is not None
    values = _maps(model, x, {"b"})["b"]
    picked = values[:, :, 8:48:16, 8:48:16]
    assert picked.shape[2:] == (3, 3)
    assert _distance(found, _observations(picked, layer)) <= 1e-5


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.DOUBLE])
def test_sequences_are_thinned_on_an_even_grid(kind: int) -> None:
    model = _products(kind=kind)
    x = _x(5, 11, 6).astype(helper.tensor_dtype_to_np_dtype(kind))
    layer = next(layer for layer in _layers(model) if layer.tensor == "b")
    found = _gathered(model, x, positions=3).moments(layer)
    assert found is not None
    picked = _maps(model, x, {"b"})["b"][:, [2, 6, 10]]
    assert _distance(found, _observations(picked, layer)) <= 1e-5


def test_old_models_are_not_thinned() -> None:
    model, x = _convs(opset=9), _x(6, 3, 9, 9)
    thinned = _gathered(model, x, positions=4)
    _assert_same(thinned, _gathered(model, x))


def test_one_spatial_axis_is_thinned_on_an_even_grid() -> None:
    model = _convs(rank=1, size=40)
    x = _x(5, 3, 40)
    layer = next(layer for layer in _layers(model) if layer.tensor == "b")
    found = _gathered(model, x, positions=4).moments(layer)
    assert found is not None
    picked = _maps(model, x, {"b"})["b"][:, :, 5::10]
    assert _distance(found, _observations(picked, layer)) <= 1e-5


def test_automatic_positions_spend_a_share_of_the_model() -> None:
    model = _convs(size=64)
    shapes = shapes_of(model, {"x": (1, 3, 64, 64)}, CPU)
    taps = taps_of(model, _layers(model), shapes, 1, 4096)
    assert [tap.positions for tap in taps] == [4096, 1024]
    assert calibration.affordable_positions(taps, 1e12) == 4096
    assert calibration.affordable_positions(taps, 0.0) == calibration.FEWEST
    first, second = (tap.channels * (tap.channels + calibration._OVERHEAD) for tap in taps)
    assert calibration.affordable_positions(taps, 100 * (first + second)) == 100
    # What the first map has beyond the second is paid for the first alone.
    assert calibration.affordable_positions(taps, 1024 * second + 2000 * first) == 2000


def test_shards_add_up(tmp_path: Path) -> None:
    model, x = _convs(), _x(24, 3, 9, 9)
    x[12:] += 3.0
    whole = _gathered(model, x)
    parts = [_gathered(model, x[:12]), _gathered(model, x[12:17]), _gathered(model, x[17:])]
    _assert_same(merge(parts), whole)
    _assert_same(merge(list(reversed(parts))), whole)
    for number, part in enumerate(parts):
        part.save(tmp_path / f"{number}.npz")
    loaded = [CalibrationStats.load(tmp_path / f"{number}.npz") for number in range(3)]
    _assert_same(loaded[0], parts[0], bound=0.0)
    _assert_same(merge(loaded), merge(parts), bound=0.0)
    merge(loaded).check(models.sha256(model))


def test_statistics_of_another_model_are_refused() -> None:
    x = _x(4, 3, 9, 9)
    first = _gathered(_convs(), x)
    other_model = _convs()
    changed = numpy_helper.to_array(other_model.graph.initializer[0]) + 1
    other_model.graph.initializer[0].CopyFrom(numpy_helper.from_array(changed, "w1"))
    other = _gathered(other_model, x)
    with pytest.raises(PlanMismatchError, match="another model"):
        first.check(models.sha256(other_model))
    with pytest.raises(PlanMismatchError, match="different models"):
        merge([first, other])
    with pytest.raises(CalibrationError, match="no statistics"):
        merge([])


def test_the_model_is_left_alone() -> None:
    model = _convs()
    before = model.SerializeToString()
    _gathered(model, _x(4, 3, 9, 9))
    assert model.SerializeToString() == before


@pytest.mark.parametrize("positions", [None, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 5])
def test_what_is_not_finite_is_an_error(positions: int | None, value: float, place: int) -> None:
    size = 9 if positions is None else 48
    x = _x(8, 3, size, size)
    x[place] = value
    found = {
        "nan": f"sample {place + 1}: .* 'x' .* holds NaN",
        "inf": f"sample {place + 1}: .* 'x' .* holds infinity",
        "-inf": f"tensor '[bd]' holds NaN.*; input 'x' of sample {place + 1} holds minus infinity",
    }[str(value)]
    with pytest.raises(CalibrationError, match=found):
        _gathered(_convs(size=size), x, positions)


def test_overflow_is_an_error() -> None:
    node = helper.make_node
    model = _model(
        [node("MatMul", ["x", "w1"], ["a"]), node("MatMul", ["a", "w2"], ["y"])],
        _weights(w1=[4, 6], w2=[6, 2]),
        ["N", 4],
    )
    with pytest.raises(CalibrationError, match="tensor 'a'"):
        _gathered(model, 1e25 * _x(8, 4), "auto")


def test_data_without_samples_is_an_error() -> None:
    model = _convs()
    source = _source(model, _x(4, 3, 9, 9))
    empty = CalibrationData(source._store, np.empty(0, int), source.layout, 4, "nothing")
    with pytest.raises(CalibrationError, match="no samples"):
        calibrate(model, _layers(model), empty, CPU, sha="")
    with pytest.raises(CalibrationError, match="positions is -3"):
        calibrate(model, _layers(model), source, CPU, sha="", positions=-3)


def test_wide_tensors_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibration.WIDEST == 4096
    monkeypatch.setattr(calibration, "WIDEST", 10)
    found = _gathered(_convs(), _x(4, 3, 9, 9))
    assert [key.split("|")[0] for key in found.taps] == ["b"]
    monkeypatch.setattr(calibration, "WIDEST", 4)
    assert _gathered(_convs(), _x(4, 3, 9, 9)).taps == {}


def test_batches_that_do_not_fit_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Small(Session):
        def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
            sizes.append(len(feeds["x"]))
            if sizes[-1] > 3:
                raise OutOfMemory("too large")
            return super().run(feeds, outputs)

    model, x = _convs(), _x(13, 3, 9, 9)
    plain = _gathered(model, x, batch_size=8)
    monkeypatch.setattr(calibration, "Session", Small)
    halved = _gathered(model, x, batch_size=8)
    assert 8 in sizes and sum(size for size in sizes[1:] if size <= 3) == 13
    _assert_same(halved, plain)


def test_progress_counts_samples() -> None:
    model, x = _convs(), _x(10, 3, 9, 9)
    calls: list[tuple[str, float, float | None]] = []
    source = _source(model, x)
    calibrate(model, _layers(model), source, CPU, sha="", progress=lambda *call: calls.append(call))
    assert calls == [("calibration", done, 10) for done in (4, 8, 10)]


def test_only_statistics_leave_the_graph_and_only_what_they_need_is_run() -> None:
    model = _convs(size=32)
    shapes = shapes_of(model, {"x": (1, 3, 32, 32)}, CPU)
    taps = taps_of(model, _layers(model), shapes, 1, 4096)
    watched = instrument(model, taps, None)
    onnx.checker.check_model(watched.model)
    with Session(watched.model, CPU) as session:
        largest = max(math.prod(map(int, spec.shape)) for spec in session.outputs)  # type: ignore[arg-type]
    assert largest == 12 * 12
    assert "y" not in {name for node in watched.model.graph.node for name in node.output}


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu() -> None:
    model, x = _convs(size=24), _x(40, 3, 24, 24)
    for positions in (None, 16):
        cpu = _gathered(model, x, positions)
        cuda = _gathered(model, x, positions, options=EngineOptions("cuda"))
        _assert_same(cuda, cpu, bound=1e-3)


@pytest.mark.zoo
def test_exact_on_a_trained_network(zoo: Path) -> None:
    model = models.load(zoo / "trained" / "cifar_resnet20.onnx")
    name = model.graph.input[0].name
    with np.load(zoo / "data" / "cifar10_calib.npz") as file:
        pictures = file["images"][:48].astype(np.float32) / 255
    x = np.ascontiguousarray(((pictures - 0.45) / 0.225).transpose(0, 3, 1, 2))
    found = calibrate(
        model,
        _layers(model),
        open_source({name: x}, probe_inputs(model), samples=len(x)),
        CPU,
        sha="",
        positions=None,
    )
    read = {stats.tap_key(layer): layer for layer in _layers(model)}
    assert len(read) == len(found.taps) == 19
    exposed = models.load(model)
    exposed.graph.output.extend(onnx.ValueInfoProto(name=la.tensor) for la in read.values())
    with Session(exposed, CPU) as session:
        maps = session.run({name: x})
    for key, layer in read.items():
        assert _distance(found.taps[key], _observations(maps[layer.tensor], layer)) <= 1e-5


def probe_inputs(model: onnx.ModelProto) -> Any:
    with Session(model, CPU) as session:
        return session.inputs
