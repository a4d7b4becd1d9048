"""The kinds of outputs, in the order in which they are tried."""

from __future__ import annotations

from onnxcop.outputs.classes import CLASSES, POSITIONS
from onnxcop.outputs.detections import DETECTIONS
from onnxcop.outputs.kind import OutputKind
from onnxcop.outputs.labels import LABELS
from onnxcop.outputs.sequences import SEQUENCES
from onnxcop.outputs.values import VALUES, VECTORS

KINDS: tuple[OutputKind, ...] = (DETECTIONS, CLASSES, SEQUENCES, POSITIONS, LABELS, VECTORS, VALUES)
