"""Pictures: reading them, and turning them into what an image model expects."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnxcop._base.types import Array
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".tga", ".jp2", ".avif"}
)
DEFAULT_SIZE = 224  # pixels, where neither the model nor the user says how large pictures are
_SMALLEST_VIEW = 0.8  # of the largest window of the wanted shape, for other views of a picture

Layout = Literal["nchw", "nhwc"]
Channels = Literal["rgb", "bgr", "gray"]


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How a picture becomes an input: resized, centre-cropped, `(x * scale - mean) / std`.

    A picture that already has the wanted size is neither resized nor cropped.

    Attributes:
        size: Height and width in pixels, None for those of the model's input.
        crop: The share of the shorter side that the centre crop keeps: the shorter side is first
            resized to `size / crop`.
        scale: Factor for the pixel values 0..255.
        mean: Subtracted after scaling, one number or one per channel (in the order of `channels`).
        std: Divided by last, likewise.
        layout: Order of the axes, None for that of the model's input.
        channels: Order of the channels, None for rgb, or gray where the input has one channel.
    """

    size: tuple[int, int] | None = None
    crop: float = 0.875
    scale: float = 1 / 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: Layout | None = None
    channels: Channels | None = None

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise CalibrationError(f"crop is {self.crop}; give a share above 0 and up to 1")
        if any(value == 0 for value in self.std):
            raise CalibrationError("std holds a zero; give positive numbers")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in {0, 1, 3}:
                raise CalibrationError(f"{name} has {len(values)} numbers; give one or three")

    @classmethod
    def named(cls, name: str) -> Preprocess:
        """A preprocessing by name; :data:`PREPROCESSES` holds them all."""
        try:
            return PREPROCESSES[name.lower()]
        except KeyError:
            known = ", ".join(PREPROCESSES)
            raise CalibrationError(f"no preprocessing is called '{name}'; choose one of: {known}") from None

    def fitted(self, spec: InputSpec) -> Preprocess:
        """This preprocessing with what it leaves open taken from a model's input of rank 4.

        Integer inputs get the raw values 0..255.

        Raises:
            CalibrationError: The input is no picture, or contradicts the preprocessing.
        """
        layout = self.layout or image_layout(spec)
        if layout is None or len(spec.shape) != 4:
            raise CalibrationError(
                f"the model's input {spec} does not look like a picture (rank 4, 1 or 3 channels); "
                "give its data as .npz or .npy"
            )
        places = (1, 2, 3) if layout == "nchw" else (3, 1, 2)
        depth, height, width = (spec.shape[place] for place in places)
        channels = self.channels or ("gray" if depth == 1 else "rgb")
        if isinstance(depth, int) and depth != (1 if channels == "gray" else 3):
            raise CalibrationError(
                f"{channels} pictures in {layout} do not fit the model's input {spec}; "
                "give other --channels or another --layout"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if channels == "gray" and len(values) > 1:
                raise CalibrationError(
                    f"{name} has {len(values)} numbers, but the model's input {spec} has one channel; give one number"
                )
        size = self.size or _size_from(height, width)
        if not all(have == want for have, want in zip(size, (height, width), strict=True) if isinstance(want, int)):
            raise CalibrationError(f"pictures of {size[0]}×{size[1]} do not fit the model's input {spec}")
        whole = replace(self, size=size, layout=layout, channels=channels)
        if spec.dtype.kind in "iu":
            whole = replace(whole, scale=1.0, mean=(), std=())
        return whole

    def __str__(self) -> str:
        parts = [f"{self.size[0]}×{self.size[1]}"] if self.size else []
        parts += [word for word in (self.channels, self.layout) if word]
        if self.crop < 1:
            parts.append(f"centre crop {self.crop:g}")
        if np.isclose(self.scale, 1 / 255):
            parts.append("x/255")
        elif self.scale != 1:
            parts.append(f"x*{self.scale:g}")
        for word, values in (("minus", self.mean), ("over", self.std)):
            if values:
                parts.append(f"{word} ({', '.join(f'{value:g}' for value in values)})")
        return ", ".join(parts)

    def from_file(self, path: Path, view: int = 0) -> Array:
        """Reads and prepares one picture; the preprocessing must be :meth:`fitted`.

        Args:
            path: Of the picture.
            view: 0 for the centre crop; any other number for a crop elsewhere and of another scale, at random
                mirrored, the same one whenever that number is asked for.

        Returns:
            float32 (uint8 where nothing is scaled) of shape (C, H, W) or (H, W, C), by layout.

        Raises:
            CalibrationError: The file is no picture that Pillow can read.
        """
        module = _pillow()
        try:
            with module.open(path) as image:
                if self.size is not None:
                    # Lets a JPEG decoder skip detail that would be thrown away anyway.
                    edge = round(2 * max(self.size) / self.crop)
                    image.draft(None, (edge, edge))
                whole = self._converted(image)
                if not view:
                    return self._finished(self._placed(whole))
                rng = np.random.default_rng([view, *path.name.encode()])
                return self._finished(self._elsewhere(whole, rng))
        except (OSError, ValueError, SyntaxError, module.DecompressionBombError) as error:
            raise CalibrationError(f"{path}: this picture cannot be read ({error}); repair or remove it") from error

    def from_pixels(self, pixels: Array) -> Array:
        """Prepares one picture of shape (H, W, C), uint8; returns the same as :meth:`from_file`."""
        gray = self.channels == "gray"
        if pixels.shape[:2] == self.size or self.size is None:
            if pixels.shape[2] == 1 and not gray:
                return self._finished(np.repeat(pixels, 3, axis=2))
            if pixels.shape[2] == (1 if gray else 3):
                return self._finished(pixels)
        image = _pillow().fromarray(np.ascontiguousarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels))
        return self._finished(self._placed(self._converted(image)))

    def _converted(self, image: Any) -> Any:
        if image.mode.startswith("I"):  # 16 bits of gray, which convert() would clip
            image = _pillow().fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("L" if self.channels == "gray" else "RGB")

    def _placed(self, image: Any) -> Array:
        if self.size is not None and image.size != self.size[::-1]:
            height, width = self.size
            ratio = max(height / image.height, width / image.width) / self.crop
            wide = max(width, round(image.width * ratio))
            high = max(height, round(image.height * ratio))
            if (wide, high) != image.size:
                image = image.resize((wide, high), _pillow().Resampling.BILINEAR)
            left, top = (wide - width) // 2, (high - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image)

    def _elsewhere(self, image: Any, rng: np.random.Generator) -> Array:
        """As :meth:`_placed`, of a random window, enlarged only where the whole picture has to be."""
        height, width = self.size or image.size[::-1]
        whole = min(image.height / height, image.width / width)
        share = whole * rng.uniform(np.clip(1 / whole, _SMALLEST_VIEW, 1.0), 1.0)
        wide, high = min(share * width, image.width), min(share * height, image.height)
        left, top = rng.uniform(0, image.width - wide), rng.uniform(0, image.height - high)
        box = (left, top, min(left + wide, image.width), min(top + high, image.height))
        image = image.resize((width, height), _pillow().Resampling.BILINEAR, box=box)
        return np.asarray(image)[:, :: int(rng.choice((1, -1)))]

    def _finished(self, pixels: Array) -> Array:
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if self.channels == "bgr":
            pixels = pixels[:, :, ::-1]
        if self.scale != 1 or self.mean or self.std:
            std = np.asarray(self.std or 1, np.float64)
            factor = np.float32(self.scale / std)
            shift = np.float32(np.asarray(self.mean or 0, np.float64) / std)
            pixels = pixels * factor - shift
        return np.ascontiguousarray(pixels if self.layout == "nhwc" else pixels.transpose(2, 0, 1))


PREPROCESSES: dict[str, Preprocess] = {
    "imagenet": Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "inception": Preprocess(mean=(0.5,), std=(0.5,)),
    "clip": Preprocess(
        crop=1.0,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
    "caffe": Preprocess(scale=1.0, mean=(103.939, 116.779, 123.68), channels="bgr"),
    "cifar": Preprocess(crop=1.0, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
    "mnist": Preprocess(crop=1.0, mean=(0.1307,), std=(0.3081,), channels="gray"),
    "unit": Preprocess(crop=1.0),
    "none": Preprocess(crop=1.0, scale=1.0),
}


def image_layout(spec: InputSpec) -> Layout | None:
    """The layout of an input that looks like a picture, else None."""
    if len(spec.shape) != 4:
        return None
    if spec.shape[1] in (1, 3):
        return "nchw"
    if spec.shape[3] in (1, 3):
        return "nhwc"
    return None


def guess_preprocess(spec: InputSpec) -> tuple[Preprocess, str]:
    """A preprocessing from the shape and type of an input alone, and a line that says so.

    Three channels are taken for ImageNet's normalization, one channel for gray values 0..1;
    integer inputs get the raw values 0..255.

    Raises:
        CalibrationError: The input does not look like a picture.
    """
    scaled = "unit" if 1 in (spec.shape[1:2] + spec.shape[3:4]) else "imagenet"
    name = "none" if spec.dtype.kind in "iu" else scaled
    fitted = PREPROCESSES[name].fitted(spec)
    return fitted, f"guessed preprocessing '{name}' for the input {spec}: {fitted}"


def _size_from(height: int | str | None, width: int | str | None) -> tuple[int, int]:
    known = [size for size in (height, width) if isinstance(size, int)]
    other = known[0] if known else DEFAULT_SIZE
    return (
        height if isinstance(height, int) else other,
        width if isinstance(width, int) else other,
    )


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError(
            "reading pictures needs Pillow; install it with: pip install 'onnxcop[images]'"
        ) from error
    return Image
