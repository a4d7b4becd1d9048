"""The inner tensor that distillation compares: which it is, and which of its channels the student has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from small_models import chain

import onnxcop
from onnxcop.gradient.prepare import raised
from onnxcop.graph.edit import copied
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.training.distill import _in_one_basis
from onnxcop.training.features import Feature, last_feature

ENGINE = EngineOptions("cpu", 1)
IMAGES = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)


def value(model: onnx.ModelProto, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if all(output.name != name for output in model.graph.output):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    with Session(model, ENGINE) as session:
        return np.asarray(session.run({"x": IMAGES}, [name])[name])


def test_both_models_return_the_same_channels() -> None:
    analysis = onnxcop.analyze(chain())
    feature = last_feature(analysis, np.empty(0, np.int64), analysis.model)
    assert feature is not None and feature.tensor == "r2" and feature.axis == 1
    group = next(g for g in analysis.structure.groups if g.width == len(feature.kept))
    removed = np.sort(group.units[[1, 4, 5]])
    pruned = apply(copied(analysis.model), analysis.structure, removed)
    feature = last_feature(analysis, removed, pruned)
    assert feature is not None and feature.kept.tolist() == [c for c in range(group.width) if c not in (1, 4, 5)]
    ours, theirs = value(feature.of_student(pruned), feature.name), value(feature.of_teacher(chain()), feature.name)
    assert ours.shape == (6, group.width - 3, 8, 8)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_model_without_a_tensor_with_positions_has_none() -> None:
    text = '<ir_version: 9, opset_import: ["" : 18]> g (float[N,4] x) => (float[N,2] y)'
    body = " { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"
    model = onnx.parser.parse_model(text + body)
    rng = np.random.default_rng(0)
    for name, shape in (("a", (4, 8)), ("b", (8, 2))):
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    analysis = onnxcop.analyze(model)
    assert last_feature(analysis, analysis.structure.groups[0].units[:2], analysis.model) is None


def test_a_tensor_in_another_basis_is_not_matched() -> None:
    feature = Feature("c2", 1, np.arange(value(chain(), "c2").shape[1]), rank=4)

    def found(teachers: Feature) -> object:
        models = feature.of_student(chain()), teachers.of_teacher(chain())
        return _in_one_basis(feature.name, *models, {"x": IMAGES}, ENGINE)

    assert found(feature) is not None
    assert found(replace(feature, kept=feature.kept[::-1])) is None


def test_a_tensor_whose_shape_cannot_be_inferred_is_matched_in_a_model_of_an_old_opset() -> None:
    text = '<ir_version: 8, opset_import: ["" : 12]> g (float[N,3,8,8] x, int64[K] sizes) => (float[N,C,P] y)'
    model = onnx.parser.parse_model(text + " { r = Relu(x) y = Reshape(r, sizes) h = Reshape(r, sizes) }")
    feature = Feature("h", 1, np.arange(3), rank=3)
    for returned in (feature.of_student(model), feature.of_teacher(model)):
        assert raised(returned).graph.output[-1].name == feature.name
        assert len(returned.graph.output[-1].type.tensor_type.shape.dim) == 3
