"""Top-1 accuracy of a digits model on the held-out pictures, for `onnxcop --metric`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort


def accuracy(model: onnx.ModelProto) -> float:
    """Fraction of the test pictures that the model names rightly."""
    with np.load(Path(__file__).with_name("digits_test.npz")) as test:
        pictures, labels = test["input"], test["labels"]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"input": pictures})
    return float((scores.argmax(axis=1) == labels).mean())
