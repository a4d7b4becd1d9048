"""Exports of scikit-learn's multi-layer perceptrons through skl2onnx.

python from_sklearn.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import skl2onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier, MLPRegressor

OPSET = 17


def main(folder: Path) -> None:
    """Fit a classifier of digits and a regressor of their ink, and write their exports to a folder."""
    samples, labels = load_digits(return_X_y=True)
    samples = (samples / 16).astype(np.float32)
    ink = samples.reshape(-1, 8, 8).sum(axis=2) / 8
    classifier = MLPClassifier(hidden_layer_sizes=(32, 24), max_iter=60, tol=1e-2, random_state=0).fit(samples, labels)
    regressor = MLPRegressor(hidden_layer_sizes=(24, 16), activation="tanh", max_iter=60, tol=1e-2, random_state=0).fit(
        samples, ink
    )
    for name, network in (("classifier", classifier), ("regressor", regressor)):
        inputs = [("samples", FloatTensorType([None, samples.shape[1]]))]
        options = {id(network): {"zipmap": False}} if name == "classifier" else None
        model = skl2onnx.convert_sklearn(network, name, inputs, options=options, target_opset=OPSET)
        (folder / f"skl2onnx_{name}.onnx").write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
