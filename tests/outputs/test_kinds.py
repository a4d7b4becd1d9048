"""The kind of an output, the evidence for it, and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from scipy.special import softmax

from onnxcop.errors import CalibrationError
from onnxcop.outputs.evidence import activations, by_sample, sample_axis
from onnxcop.outputs.judgement import Judgements, judge
from onnxcop.outputs.kinds import KINDS
from onnxcop.outputs.sequences import decoded
from onnxcop.outputs.tasks import TASKS
from onnxcop.reconstruction.divergence import OutputFigures, Reference

Array = np.ndarray[Any, Any]


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def kinds(found: Judgements) -> dict[tuple[str, ...], str]:
    return {entry.outputs: entry.kind.name for entry in found.entries}


def kind(values: Array, model: onnx.ModelProto | None = None) -> str:
    (name,) = kinds(judge([{"y": values}], [len(values)], model)).values()
    return name


def ending(op: str, metadata: Mapping[str, str] | None = None, **attributes: Any) -> onnx.ModelProto:
    """A model whose output `y` ends in an operator, then a Reshape."""
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node(op, ["h"], ["a"], **attributes),
        helper.make_node("Reshape", ["a", "shape"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [0, -1])
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], [shape]))
    helper.set_model_props(model, dict(metadata or {}))
    return model


def predictions(count: int = 64, classes: int = 10) -> Array:
    """Scores of a classifier that is mostly sure, of all classes."""
    scores = rng().standard_normal((count, classes))
    scores[np.arange(count), np.arange(count) % classes] += 6
    return scores.astype(np.float32)


def unit(values: Array) -> Array:
    return np.asarray(values / np.linalg.norm(values, axis=-1, keepdims=True))


def test_an_embedding_of_length_one_is_no_classifier() -> None:
    """Its softmax is all but uniform, whatever is cut: the divergence of that would be next to nothing."""
    vectors = unit(rng().standard_normal((40, 384))).astype(np.float32)
    assert kind(vectors) == "vectors"
    elsewhere = np.roll(vectors, 1, axis=0)
    (found,) = Reference([{"y": vectors}]).figures([{"y": elsewhere}]).outputs
    assert found.divergence.value == pytest.approx(np.sqrt(2), rel=0.05)
    assert found.agreement is not None
    assert abs(found.agreement.value) < 0.05
    assert "1 - cosine is" in found.warning


def test_relative_error_of_vectors_of_length_one_is_a_cosine_distance() -> None:
    a, b = unit(rng().standard_normal((30, 16))), unit(rng().standard_normal((30, 16)) + 2)
    (found,) = Reference([{"y": a}]).figures([{"y": b}]).outputs
    assert found.agreement is not None
    assert found.divergence.value**2 / 2 == pytest.approx(1 - found.agreement.value)
    assert found.agreement.value == pytest.approx((a * b).sum(axis=1).mean())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (predictions(), "classes"),
        (predictions()[:, :, None, None], "classes"),
        (softmax(rng().standard_normal((20, 5)), axis=1), "classes"),
        (np.log(softmax(rng().standard_normal((20, 5)), axis=1)), "classes"),
        (rng().standard_normal((64, 10)), "values"),  # unsure
        (rng().standard_normal((64, 2)), "values"),
        (np.tanh(rng().standard_normal((64, 48))), "values"),  # codes
        (predictions() * 0 + np.arange(10) * 5, "values"),  # always the same
        (rng().uniform(0, 320, (64, 136)), "values"),  # coordinates in pixels
        (rng().standard_normal((64, 1)), "values"),
        (predictions()[:3], "values"),  # too few to tell
        (rng().standard_normal((8, 3, 16, 16)), "values"),
        (softmax(rng().standard_normal((8, 5, 16, 16)), axis=1), "positions"),
        (softmax(rng().standard_normal((8, 16, 7)), axis=2), "positions"),
        (predictions(60, 10).reshape(6, 10, 10), "positions"),
    ],
)
def test_what_values_prove(values: Array, expected: str) -> None:
    assert kind(values.astype(np.float32)) == expected


def test_a_sigmoid_in_the_graph_makes_labels() -> None:
    values = rng().uniform(0, 0.01, (20, 7)).astype(np.float32)
    assert activations(ending("Sigmoid")) == {"y": "sigmoid"}
    assert kind(values, ending("Sigmoid")) == "labels"
    assert kind(values, ending("Relu")) == "values"
    picture = rng().uniform(0, 1, (4, 3, 8, 8)).astype(np.float32)
    assert kind(picture, ending("Sigmoid")) == "values"
    assert kind(np.round(picture), ending("Sigmoid")) == "labels"
    assert kind(0.1 + 0.3 * picture, ending("Sigmoid")) == "labels"  # all say no
    mine = np.array([[0.9, 0.1, 0.8], [0.2, 0.1, 0.1]])
    other = np.array([[0.9, 0.7, 0.2], [0.2, 0.1, 0.1]])
    found = Reference([{"y": mine}], judgements=judge([{"y": mine}], [2], ending("Sigmoid")))
    assert found.compare([{"y": other}]).agreement == pytest.approx(2 * 1 / (2 + 2))


def test_a_softmax_may_be_written_out() -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("ReduceSum", ["e", "axes"], ["s"]),
        helper.make_node("Div", ["e", "s"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in "xy"]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    assert activations(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], [axes]))) == {
        "y": "softmax"
    }


def test_metadata_are_evidence() -> None:
    unsure = rng().standard_normal((20, 5)).astype(np.float32)
    assert kind(unsure, ending("Relu", {"task": "classify"})) == "classes"
    normalized = rng().uniform(0, 1, (4, 9, 40)).astype(np.float32)
    assert kind(normalized, ending("Relu", {"task": "detect", "names": "{0: 'a'}"})) == "detections"
    assert kind(normalized, ending("Relu")) == "values"


def test_outputs_are_judged_one_by_one() -> None:
    batch = {
        "logits": predictions(),
        "embedding": unit(rng().standard_normal((64, 32))).astype(np.float32),
        "map": rng().standard_normal((64, 3, 4)).astype(np.float32),
        "count": np.arange(64),
    }
    reference = Reference([batch])
    assert kinds(reference.judgements) == {("logits",): "classes", ("embedding",): "vectors", ("map",): "values"}
    other = dict(batch, embedding=-batch["embedding"])
    found = reference.figures([other])
    by_name = {figures.outputs[0]: figures for figures in found.outputs}
    assert by_name["logits"].divergence.value == by_name["map"].divergence.value == 0
    assert by_name["embedding"].divergence.value == pytest.approx(2)
    assert found.divergence.value == pytest.approx(2 / 3)
    assert reference.compare([other]).value == pytest.approx(2 / 3)
    assert reference.compare([other]).kind == "mixed"
    assert str(reference.judgements.entries[1]) == (
        "output embedding: vectors, compared by cosine and relative error (all of length one)"
    )


@pytest.mark.parametrize(
    ("task", "expected"),
    [("classify", "classes"), ("regress", "values"), ("embed", "vectors"), (None, "values")],
)
def test_the_user_knows_best(task: str | None, expected: str) -> None:
    values = rng().standard_normal((20, 5)).astype(np.float32)
    (entry,) = judge([{"y": values}], task=task).entries
    assert entry.kind.name == expected
    assert (entry.why == f"--task {task}") == (task is not None)


def test_a_task_that_no_output_can_be_of() -> None:
    with pytest.raises(CalibrationError, match=r"--task sequence: no output has the form of that \(y \[20, 5\]\)"):
        judge([{"y": np.ones((20, 5), np.float32)}], task="sequence")
    with pytest.raises(CalibrationError, match="unknown task 'cook'; choose one of classify, detect"):
        judge([{"y": np.ones((20, 5), np.float32)}], task="cook")


def written(strings: list[list[int]], steps: int = 12, classes: int = 8, blank: int = 0) -> Array:
    """Scores [N, steps, classes] whose greedy reading is the strings."""
    top = np.full((len(strings), steps), blank)
    for row, string in enumerate(strings):
        top[row, 1 : 1 + 2 * len(string) : 2] = string
        top[row, 2 : 2 + 2 * len(string) : 2] = string  # every letter twice
    return 9.0 * np.eye(classes)[top]


def figures(values: Array, other: Array, **how: Any) -> OutputFigures:
    told = judge([{"y": values}], [len(values)], **how)
    (found,) = Reference([{"y": values}], judgements=told, counts=[len(values)]).figures([{"y": other}]).outputs
    return found


@pytest.mark.parametrize("blank", [0, 7])
def test_sequences_agree_if_the_same_string_is_read(blank: int) -> None:
    strings = [[1, 2, 3], [4, 5], [6, 1], [2, 2]]
    mine = written(strings, blank=blank)
    longer = mine.copy()
    longer[0, 0] = longer[0, 1]  # the first letter starts a step earlier: the same string
    longer[1, 1:3] = mine[2, 1:3]  # another letter
    found = figures(mine, longer)
    assert found.kind == "sequences"
    assert found.agreement_name == "same string"
    assert found.agreement is not None
    assert found.agreement.value == 3 / 4
    assert "25% of the sequences are read differently" in found.warning


def test_what_is_read() -> None:
    assert decoded(np.array([0, 3, 3, 0, 3, 1, 1]), 0) == (3, 3, 1)
    assert decoded(np.array([0, 3, 3, 0, 3, 1, 1]), None) == (0, 3, 0, 3, 1)
    assert decoded(np.array([], np.int64), 0) == ()


def boxes(shift: float = 0.0) -> Array:
    """A detector's output [2, 40, 4 + 3]: two clear boxes in each sample, by centre and size in pixels."""
    found = np.concatenate([rng().uniform(20, 30, (2, 40, 4)), rng().uniform(0, 0.1, (2, 40, 3))], axis=2)
    found[:, 5, :4], found[:, 9, :4] = (100, 100, 40, 40), (200 + shift, 150, 30, 60)
    found[:, 5, 4], found[:, 9, 5] = 0.9, 0.8
    return found.astype(np.float32)


@pytest.mark.parametrize("across", [False, True])
def test_boxes_are_matched(across: bool) -> None:
    mine, near, far = (boxes(shift).swapaxes(1, 2) if across else boxes(shift) for shift in (0, 3, 60))
    how = {"model": ending("Relu", {"names": "['a', 'b', 'c']"})}
    for other, expected in ((near, 1.0), (far, 0.5)):
        found = figures(mine, other, **how)
        assert found.kind == "detections"
        assert found.agreement is not None
        assert found.agreement.value == pytest.approx(expected)
    lost = mine.copy()
    lost[:, slice(4, None) if across else slice(None), :][..., 0:0] = 0
    (lost if not across else lost.swapaxes(1, 2))[:, 9, 5] = 0.1  # one of two boxes is no longer shown
    found = figures(mine, lost, **how)
    assert found.agreement is not None
    assert found.agreement.value == pytest.approx(2 * 1 / (2 + 1))
    assert "33% of the boxes" in found.warning


def test_boxes_and_scores_may_be_two_outputs() -> None:
    whole = boxes()
    corners = np.concatenate([whole[..., :2] - whole[..., 2:4] / 2, whole[..., :2] + whole[..., 2:4] / 2], axis=2) / 320
    mine = {"scores": whole[..., 4:], "boxes": corners}
    reference = Reference([mine])
    assert kinds(reference.judgements) == {("boxes", "scores"): "detections"}
    gone = dict(mine, scores=np.where(mine["scores"] == np.float32(0.8), 0, mine["scores"]))
    found = reference.compare([gone])
    assert found.agreement == pytest.approx(2 / 3)
    error = np.linalg.norm(gone["scores"] - mine["scores"]) / np.linalg.norm(mine["scores"])
    assert found.value == pytest.approx(error / 2)


def test_a_yolo_that_says_whether_there_is_anything() -> None:
    whole = boxes()
    mine = np.insert(whole, 4, 0.9, axis=2)
    unsure = mine.copy()
    unsure[:, 9, 4] = 0.1
    found = figures(mine, unsure)
    assert found.kind == "detections"
    assert found.agreement is not None
    assert found.agreement.value == pytest.approx(2 / 3)


def test_boxes_that_are_listed_with_the_number_of_their_class() -> None:
    whole = boxes()
    low, high = whole[..., :2] - whole[..., 2:4] / 2, whole[..., :2] + whole[..., 2:4] / 2
    mine = np.concatenate(
        [low, high, whole[..., 4:].max(axis=2, keepdims=True), whole[..., 4:].argmax(axis=2)[..., None]], axis=2
    ).astype(np.float32)
    other = mine.copy()
    other[:, 9, 5] = 2  # another class
    found = figures(mine, other)
    assert found.kind == "detections"
    assert found.agreement is not None
    assert found.agreement.value == pytest.approx(1 / 2)


def test_the_axis_of_the_samples() -> None:
    assert sample_axis([(20, 8, 37), (20, 3, 37)], [8, 3]) == 1
    assert sample_axis([(8, 5), (3, 5)], [8, 3]) == 0
    assert sample_axis([(16, 5), (6, 5)], [8, 3]) == 0
    assert by_sample(np.arange(12).reshape(6, 2), 0, 3).shape == (3, 2, 2)
    assert sample_axis([(7, 5), (7, 5)], [8, 3]) is None
    assert by_sample(np.ones((7, 5)), None, 8).shape == (1, 7, 5)
    assert sample_axis([(1, 5), (1, 7)], [1, 1]) == 0


def test_every_task_names_a_kind() -> None:
    assert {task for kind in KINDS for task in kind.tasks} == set(TASKS)
