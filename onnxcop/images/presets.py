"""Preprocessings by name, as trainers and exporters use them; one line for each."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcop.images.preprocess import Channels, Interpolation, Preprocess, Resize

GRAY_FILL = 114.0  # the gray around letterboxed images in the training of YOLO models


@dataclass(frozen=True, slots=True)
class Preset:
    """A named preprocessing.

    Attributes:
        purpose: Which models are trained with it.
        preprocess: The preprocessing; only the size, the layout and usually the channels are open.
    """

    purpose: str
    preprocess: Preprocess


def _preset(
    purpose: str, *, scale: float = 1 / 255, mean: tuple[float, ...] = (), std: tuple[float, ...] = (),
    channels: Channels | None = None, resize: Resize = "crop", interpolation: Interpolation = "bilinear",
    crop: float = 0.875, fill: float = 0.0,
) -> Preset:  # fmt: skip
    return Preset(
        purpose,
        Preprocess(
            size=None,
            resize=resize,
            interpolation=interpolation,
            crop=crop,
            fill=fill,
            scale=scale,
            mean=mean,
            std=std,
            layout=None,
            channels=channels,
        ),
    )


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PRESETS: dict[str, Preset] = {
    "imagenet": _preset("ImageNet classifiers of torchvision and PaddleClas", mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "timm": _preset(
        "most ImageNet classifiers of timm", mean=_IMAGENET_MEAN, std=_IMAGENET_STD, interpolation="bicubic",
    ),
    "inception": _preset("Inception and most ViT, x in -1..1", mean=(0.5,), std=(0.5,)),
    "clip": _preset(
        "CLIP and SigLIP image encoders", mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711), crop=1.0, interpolation="bicubic",
    ),
    "ultralytics": _preset("YOLO detectors, segmenters, pose", resize="letterbox", fill=GRAY_FILL),
    "paddleocr": _preset(
        "PP-OCR text recognition and direction", mean=(0.5,), std=(0.5,), channels="bgr", resize="pad", fill=127.5
    ),
    "paddleocr-det": _preset(
        "PP-OCR text detection", mean=_IMAGENET_MEAN, std=_IMAGENET_STD, channels="bgr", resize="stretch"
    ),
    "paddledet": _preset(
        "detectors of PaddleDetection", mean=_IMAGENET_MEAN, std=_IMAGENET_STD, resize="stretch",
        interpolation="bicubic",
    ),
    "keras-tf": _preset(
        "Keras MobileNet, MobileNetV2, InceptionV3, Xception, NASNet, ResNetV2: x in -1..1",
        mean=(1.0,), std=(1.0,), scale=1 / 127.5, resize="stretch",
    ),
    "keras-caffe": _preset(
        "Keras VGG and ResNet", scale=1.0, mean=(103.939, 116.779, 123.68), channels="bgr", resize="stretch"
    ),
    "keras-torch": _preset("Keras DenseNet", mean=_IMAGENET_MEAN, std=_IMAGENET_STD, resize="stretch"),
    "keras-raw": _preset(
        "Keras EfficientNet, EfficientNetV2, ConvNeXt, MobileNetV3, RegNet: x in 0..255", scale=1.0, resize="stretch"
    ),
    "tflite": _preset(
        "float TensorFlow Lite models, x in -1..1", mean=(127.5,), std=(127.5,), scale=1.0, resize="stretch"
    ),
    "efficientnet-lite": _preset(
        "EfficientNet-Lite", mean=(127.0,), std=(128.0,), scale=1.0, interpolation="bicubic"
    ),
    "caffe": _preset("Caffe models, BGR", scale=1.0, mean=(103.939, 116.779, 123.68), channels="bgr"),
    "cifar": _preset("CIFAR-10 classifiers", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616), crop=1.0),
    "mnist": _preset("MNIST classifiers", mean=(0.1307,), std=(0.3081,), channels="gray", crop=1.0),
    "unit": _preset("x in 0..1", crop=1.0),
    "none": _preset("x in 0..255", scale=1.0, crop=1.0),
}  # fmt: skip
