"""Exports of a Keras 3 network through tf2onnx: from TensorFlow and from TFLite.

    python from_keras.py FOLDER

Both keep TensorFlow's NHWC layout at the input, with Transposes between layers where tf2onnx
cannot cancel them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import tensorflow as tf
import tf2onnx
from keras import layers

OPSET = 17


def block(x: Any, filters: int, side: int = 3, stride: int = 1, depthwise: bool = False, relu: bool = True) -> Any:
    """Convolution, BatchNormalization with non-default statistics, and optionally ReLU."""
    if depthwise:
        x = layers.DepthwiseConv2D(side, stride, "same", use_bias=False)(x)
    else:
        x = layers.Conv2D(filters, side, stride, "same", use_bias=False)(x)
    spread = keras.initializers.RandomUniform
    x = layers.BatchNormalization(
        beta_initializer=spread(-0.3, 0.3),
        gamma_initializer=spread(0.5, 1.5),
        moving_mean_initializer=spread(-0.3, 0.3),
        moving_variance_initializer=spread(0.5, 1.5),
    )(x)
    return layers.ReLU()(x) if relu else x


def convolutional() -> Any:
    """A residual block, squeeze and excitation, a depthwise branch beside a pooled one, Concat and
    a linear head: `[N, 16, 16, 3]` to `[N, 10]`."""
    images = keras.Input((16, 16, 3), name="images")
    x = block(images, 16)
    y = block(block(x, 16), 16, relu=False)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
    gate = layers.Conv2D(8, 1, activation="relu")(gate)
    gate = layers.Conv2D(16, 1, activation="sigmoid")(gate)
    x = layers.ReLU()(layers.Add()([x, layers.Multiply()([y, gate])]))
    a = block(block(x, 24, 1), 24, stride=2, depthwise=True)
    b = block(layers.MaxPooling2D()(x), 8, 1)
    x = block(layers.Concatenate()([a, b]), 24, 1)
    x = layers.Dense(24, activation="relu")(x)  # over the last axis, so that the layout must turn around it
    return keras.Model(images, layers.Dense(10, name="scores")(layers.GlobalAveragePooling2D()(x)))


def main(folder: Path) -> None:
    """Write both exports to a folder."""
    keras.utils.set_random_seed(0)
    network = convolutional()
    signature = [tf.TensorSpec((None, 16, 16, 3), tf.float32, name="images")]
    function = tf.function(lambda images: {"scores": network(images, training=False)}, input_signature=signature)
    tf2onnx.convert.from_function(
        function, input_signature=signature, opset=OPSET, output_path=str(folder / "tf2onnx_keras.onnx")
    )
    flat = tf.lite.TFLiteConverter.from_keras_model(network).convert()
    lite = folder / "keras.tflite"
    lite.write_bytes(flat)
    tf2onnx.convert.from_tflite(str(lite), opset=OPSET, output_path=str(folder / "tf2onnx_tflite.onnx"))
    lite.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
