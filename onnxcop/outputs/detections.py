"""Boxes with scores from detectors, in one output or in two.

Known forms: `[N, 4 + C, A]` (box, then a score per class), `[N, A, 4 + C]`, `[N, A, 5 + C]` (box, objectness, scores
per class), `[N, A, 6]` (corners, score, class number), and two outputs `[N, A, 4]` and `[N, A, C]` or `[N, A]`, for A
anchors or boxes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import Array, FloatArray
from onnxcop.outputs.kind import Batches, Finding, MeasureSettings, OutputEvidence, OutputKind
from onnxcop.outputs.values import ErrorMeasure, within_one

_SHOWN = 0.25  # lowest score of a box that counts
_OVERLAP = 0.45  # overlap of two boxes of one network that are the same object
_MATCH = 0.5  # overlap of boxes of two networks that agree
_MOST = 300  # boxes of a sample to compare, those with the highest scores
_FEWEST = 16  # anchors; an output with fewer holds no detections
_PIXELS = 2.0  # larger coordinates are in pixels, not shares
_BOX = 4


@dataclass(frozen=True, slots=True)
class Boxes:
    """The detections in one sample.

    Attributes:
        corners: float64 [boxes, 4].
        classes: int64 [boxes].
    """

    corners: FloatArray
    classes: Array


@dataclass(frozen=True, slots=True)
class BoxLayout:
    """Layout of boxes and scores.

    Attributes:
        across: Whether anchors are the last axis, `[N, 4 + C, A]`.
        objectness: Whether an objectness score comes before the class scores.
        numbered: Whether only a score and the number of the class follow.
        classes: Number of class scores; entries after them (masks, key points) are ignored. None for all.
        cornered: Whether boxes are two corners; else centre, width and height.
    """

    across: bool = False
    objectness: bool = False
    numbered: bool = False
    classes: int | None = None
    cornered: bool = False

    def rows(self, values: Array) -> FloatArray:
        """An output of one sample as [anchors, entries]."""
        entries = values.astype(np.float64)
        return entries.T if self.across and entries.ndim == 2 else entries.reshape(len(entries), -1)

    def shown(self, boxes: FloatArray, scores: FloatArray) -> Boxes:
        """The boxes that a user sees: confident ones and, among overlapping ones, the most confident.

        Args:
            boxes: [places, 4].
            scores: [anchors, entries], the entries after the boxes.
        """
        if self.numbered:
            best, classes = scores[:, 0], np.rint(scores[:, 1]).astype(np.int64)
        else:
            given = scores[:, 1:] if self.objectness else scores
            given = given if self.classes is None else given[:, : self.classes]
            classes = given.argmax(axis=1)
            best = given[np.arange(len(given)), classes] * (scores[:, 0] if self.objectness else 1.0)
        sure = np.flatnonzero(np.isfinite(boxes).all(axis=1) & (best >= _SHOWN))
        order = sure[np.argsort(-best[sure], kind="stable")][:_MOST]
        corners = boxes[order] if self.cornered else corners_of(boxes[order])
        kept = distinct(corners, classes[order])
        return Boxes(corners[kept], classes[order][kept])


def corners_of(boxes: FloatArray) -> FloatArray:
    """Convert boxes from centre, width and height to two corners."""
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)


def overlaps(one: FloatArray, other: FloatArray) -> FloatArray:
    """Intersection over union, float64 [boxes of one, boxes of the other]."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    common = np.prod(np.maximum(high - low, 0.0), axis=-1)
    areas = [np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0), axis=-1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1][None, :] - common
    return np.asarray(np.where(union > 0, common / np.where(union > 0, union, 1.0), 0.0))


def distinct(corners: FloatArray, classes: Array) -> list[int]:
    """Indices, in order, of boxes that overlap none before them of the same class (non-maximum suppression)."""
    apart = (overlaps(corners, corners) < _OVERLAP) | (classes[:, None] != classes[None, :])
    kept: list[int] = []
    for place in range(len(corners)):
        if apart[place, kept].all():
            kept.append(place)
    return kept


def matched(one: Boxes, other: Boxes) -> int:
    """The number of boxes that can be paired one to one with boxes of the other network: same class, nearest first."""
    shares = overlaps(one.corners, other.corners) * (one.classes[:, None] == other.classes[None, :])
    count = 0
    while shares.size and shares.max() >= _MATCH:
        row, column = np.unravel_index(int(shares.argmax()), shares.shape)
        shares[row] = shares[:, column] = 0.0
        count += 1
    return count


class DetectionMeasure:
    """Relative error of every output, by parts of different magnitude, and the boxes that both networks detect.

    Args:
        outputs: One output, or boxes and scores, batch by batch.
        settings: The measurement settings.
    """

    def __init__(self, outputs: Sequence[Batches], settings: MeasureSettings) -> None:
        self._errors = [ErrorMeasure([batches], settings) for batches in outputs]
        self._form = form_of(outputs, settings.metadata)
        self._shown = [self._shown_in(values) for values in zip(*outputs, strict=True)]

    def terms(self, place: int, theirs: Sequence[Array]) -> FloatArray:
        """The terms of the relative errors, side by side."""
        terms = [error.terms(place, [values]) for error, values in zip(self._errors, theirs, strict=True)]
        return np.concatenate(terms, axis=1)

    def value(self, totals: FloatArray) -> FloatArray:
        """The mean of the relative errors."""
        parts = np.split(totals, np.cumsum([error.width for error in self._errors])[:-1], axis=-1)
        return np.asarray(np.mean([e.value(part) for e, part in zip(self._errors, parts, strict=True)], axis=0))

    def hits(self, place: int, theirs: Sequence[Array]) -> FloatArray | None:
        """Twice the boxes that match, and the boxes of both networks."""
        other = self._shown_in(theirs)
        return np.array(
            [
                (2.0 * matched(a, b), len(a.classes) + len(b.classes))
                for a, b in zip(self._shown[place], other, strict=True)
            ]
        )

    def _shown_in(self, values: Sequence[Array]) -> list[Boxes]:
        form, shown = self._form, []
        for sample in zip(*values, strict=True):
            rows = form.rows(sample[0])
            boxes, scores = (rows[:, :_BOX], rows[:, _BOX:]) if len(sample) == 1 else (rows, form.rows(sample[1]))
            shown.append(form.shown(boxes, scores))
        return shown


def form_of(outputs: Sequence[Batches], metadata: Mapping[str, str]) -> BoxLayout:
    """The layout of boxes and scores in outputs that hold them, derived from their values."""
    first = outputs[0]
    across = len(outputs) == 1 and first[0].ndim == 3 and first[0].shape[1] < first[0].shape[2]
    rows = np.concatenate([BoxLayout(across).rows(sample) for batch in first for sample in batch])
    boxes, scores = rows[:, :_BOX], rows[:, _BOX:]
    cornered = bool((boxes[:, 2:] >= boxes[:, :2]).mean() > 0.99) and bool((boxes[:, 2:] > 0).any())
    if len(outputs) == 2:
        return BoxLayout(across, cornered=cornered)
    named = _names(metadata)
    if named:
        objectness = scores.shape[1] == named + 1 and not across
        return BoxLayout(across, objectness, classes=named, cornered=cornered and not across)
    if scores.shape[1] == 2 and _whole(scores[:, 1]) and scores[:, 1].max() > 1:
        return BoxLayout(across, numbered=True, cornered=True)
    objectness = not across and scores.shape[1] > 1
    return BoxLayout(across, objectness, cornered=cornered and not across)


def _whole(values: FloatArray) -> bool:
    return bool(np.array_equal(values, np.rint(values)))


def _names(metadata: Mapping[str, str]) -> int:
    """The number of classes in the metadata; 0 if they name none."""
    try:
        return len(ast.literal_eval(metadata.get("names", "")))
    except (ValueError, SyntaxError, TypeError):
        return 0


_TASKS = {"detect", "segment", "pose", "obb"}  # models with boxes and scores in the first output


def _detections(outputs: Sequence[OutputEvidence]) -> Iterator[Finding]:
    used: set[str] = set()
    for boxes in outputs:
        if not _holds_boxes(boxes):
            continue
        for scores in outputs:
            if scores.name not in used and scores is not boxes and _scores_of(boxes, scores):
                used |= {boxes.name, scores.name}
                yield Finding((boxes.name, scores.name), "boxes in one output, scores in the other")
                break
    for output in outputs:
        if output.name in used or len(output.shape) != 3:
            continue
        if output.metadata.get("task") in _TASKS and max(output.shape[1:]) >= _FEWEST and min(output.shape[1:]) > _BOX:
            yield Finding((output.name,), "the model's metadata")
        elif _boxes_and_scores(output):
            yield Finding((output.name,), "its form: boxes in pixels, then scores from 0 to 1")


def _holds_boxes(output: OutputEvidence) -> bool:
    return len(output.shape) == 3 and output.shape[2] == _BOX and output.shape[1] >= _FEWEST


def _scores_of(boxes: OutputEvidence, scores: OutputEvidence) -> bool:
    """Whether an output holds scores from 0 to 1 for the same anchors."""
    shape = scores.shape
    return (
        len(shape) in (2, 3) and shape[:2] == boxes.shape[:2] and shape[2:] != (_BOX,)
        and all(within_one(batch) for batch in scores.batches)
    )  # fmt: skip


def _boxes_and_scores(output: OutputEvidence) -> bool:
    across = output.shape[1] < output.shape[2]
    places, entries = (output.shape[2], output.shape[1]) if across else output.shape[1:]
    if places < _FEWEST or entries <= _BOX:
        return False
    turned = [np.moveaxis(batch, 1, 2) if across else batch for batch in output.batches]
    pixels = all(float(batch[..., :_BOX].max(initial=0.0)) > _PIXELS for batch in turned)
    rest = [batch[..., _BOX:] for batch in turned]
    numbered = entries == _BOX + 2 and all(_whole(batch[..., 1].astype(np.float64)) for batch in rest)
    scores = [batch[..., :1] for batch in rest] if numbered else rest
    return pixels and all(within_one(batch) for batch in scores)


DETECTIONS = OutputKind(
    name="detections",
    title="boxes and scores",
    distance="relative error",
    compared_by="relative error, parts of different size alike, and matched boxes",
    agreement="boxes matched",
    tasks={"detect": (3,)},
    recognize=_detections,
    measure=DetectionMeasure,
    threshold=0.9,
    meaning="{share:.0%} of the boxes that either model shows are not matched by one of the other",
)
