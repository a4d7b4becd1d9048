"""Resizing of an image to the size of a model's input, in one of four ways.

* `crop`: the shorter side is resized to `size / crop`, and the centre is cut out: ImageNet classifiers.
* `stretch`: both sides are resized without regard to proportions: Keras, DBNet.
* `letterbox`: the image keeps its proportions and is centred; the rest is filled: YOLO.
* `pad`: the same, but the image is at the top left: text recognition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcop._base.types import Array
from onnxcop.images.preprocess import Interpolation, Resize

_SMALLEST_VIEW = 0.8  # share of the largest window of the target shape, for other views of an image


@dataclass(frozen=True, slots=True)
class Resizing:
    """How to resize images of any size to one size.

    Attributes:
        method: See the module.
        interpolation: `area` averages over the pixels that an output pixel covers.
        crop: Share of the shorter side that `crop` keeps.
        fill: Value 0..255 of the pixels that `letterbox` and `pad` add.
    """

    method: Resize = "crop"
    interpolation: Interpolation = "bilinear"
    crop: float = 0.875
    fill: float = 0.0

    def __call__(self, image: Any, size: tuple[int, int]) -> Array:
        """Resize `image` (of Pillow) to `size`; an image of that size is returned unchanged.

        Returns:
            uint8, or float32 if the fill is no whole number, of shape (H, W) or (H, W, C).
        """
        if image.size == size[::-1]:
            return np.asarray(image)
        if self.method == "crop":
            return self._cropped(image, size)
        if self.method == "stretch":
            return np.asarray(self._resized(image, size))
        return self._boxed(image, size)

    def view(self, image: Any, size: tuple[int, int], rng: np.random.Generator) -> Array:
        """The same for a random window of the image; a centre crop becomes a crop anywhere, randomly mirrored."""
        height, width = size
        if self.method == "crop":
            # Enlarged only if the whole image must be.
            largest = min(image.height / height, image.width / width)
            share = largest * rng.uniform(np.clip(1 / largest, _SMALLEST_VIEW, 1.0), 1.0)
            wide, high = min(share * width, image.width), min(share * height, image.height)
        else:
            wide, high = (side * rng.uniform(_SMALLEST_VIEW, 1.0) for side in image.size)
        left, top = rng.uniform(0, image.width - wide), rng.uniform(0, image.height - high)
        box = (left, top, min(left + wide, image.width), min(top + high, image.height))
        if self.method == "crop":
            return np.asarray(self._resized(image, size, box))[:, :: int(rng.choice((1, -1)))]
        window = image.crop((int(left), int(top), max(int(box[2]), int(left) + 1), max(int(box[3]), int(top) + 1)))
        return np.asarray(self._resized(window, size)) if self.method == "stretch" else self._boxed(window, size)

    def _cropped(self, image: Any, size: tuple[int, int]) -> Array:
        height, width = size
        ratio = max(height / image.height, width / image.width) / self.crop
        wide, high = max(width, round(image.width * ratio)), max(height, round(image.height * ratio))
        if (wide, high) != image.size:
            image = self._resized(image, (high, wide))
        left, top = (wide - width) // 2, (high - height) // 2
        return np.asarray(image.crop((left, top, left + width, top + height)))

    def _boxed(self, image: Any, size: tuple[int, int]) -> Array:
        height, width = size
        ratio = min(height / image.height, width / image.width)
        high, wide = max(1, min(height, round(image.height * ratio))), max(1, min(width, round(image.width * ratio)))
        pixels = np.asarray(image if (wide, high) == image.size else self._resized(image, (high, wide)))
        dtype = np.uint8 if float(self.fill).is_integer() else np.float32
        canvas = np.full((height, width, *pixels.shape[2:]), self.fill, dtype)
        top, left = ((height - high) // 2, (width - wide) // 2) if self.method == "letterbox" else (0, 0)
        canvas[top : top + high, left : left + wide] = pixels
        return canvas

    def _resized(self, image: Any, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Any:
        from PIL import Image

        filters = {
            "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR,
            "bicubic": Image.Resampling.BICUBIC, "area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS,
        }  # fmt: skip
        return image.resize(size[::-1], filters[self.interpolation], box=box)

    def __str__(self) -> str:
        words = f"centre crop {self.crop:g}" if self.method == "crop" else self.method
        if self.method in ("letterbox", "pad"):
            words += f" with {self.fill:g}"
        return words if self.interpolation == "bilinear" else f"{words}, {self.interpolation}"
