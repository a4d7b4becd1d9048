"""Reading of images as inputs of one model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcop._base.types import Array
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec
from onnxcop.images.declared import Declared
from onnxcop.images.preprocess import Channels, Layout, Preprocess
from onnxcop.images.resizing import Resizing

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".tga", ".jp2", ".avif"}
)
DEFAULT_SIZE = 224  # pixels, if neither the model nor the user gives the size of images


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Turns images into inputs: a :class:`Preprocess` without open fields.

    Attributes:
        size: Height and width in pixels.
        resizing: How to resize images.
        scale: Factor of the pixel values 0..255.
        mean: Subtracted after scaling, one number or one per channel, or none.
        std: Divided by last, likewise.
        layout: Order of the axes.
        channels: Order of the channels.
        origin: Source of scale, mean and deviation: "guess NAME", the model's declaration, or "" for the user.
    """

    size: tuple[int, int]
    resizing: Resizing
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Layout
    channels: Channels
    origin: str = ""

    @property
    def guessed(self) -> bool:
        """Whether the normalization is a mere guess."""
        return self.origin.startswith("guess")

    def from_file(self, path: Path, view: int = 0) -> Array:
        """Read one image.

        Args:
            path: Path of the image.
            view: 0 for the standard view; any other number for a crop at another place and scale, always the same one
                for that number.

        Returns:
            float32 (uint8 if nothing is scaled) of shape (C, H, W) or (H, W, C), by layout.

        Raises:
            CalibrationError: Pillow cannot read the file as an image.
        """
        return self._read(path, str(path), path.name, view)

    def from_bytes(self, data: bytes, name: str, key: str, view: int = 0) -> Array:
        """Read one image from the bytes of its file, as :meth:`from_file`.

        Args:
            data: The bytes.
            name: A name for messages.
            key: What a crop depends on besides its number.
            view: As for a file.
        """
        return self._read(io.BytesIO(data), name, key, view)

    def _read(self, source: Path | io.BytesIO, name: str, key: str, view: int) -> Array:
        module = _pillow()
        try:
            with module.open(source) as image:
                # Lets a JPEG decoder skip detail that would be discarded anyway.
                edge = round(2 * max(self.size) / self.resizing.crop)
                image.draft(None, (edge, edge))
                whole = self._converted(image)
                if not view:
                    return self._finished(self.resizing(whole, self.size))
                rng = np.random.default_rng([view, *key.encode()])
                return self._finished(self.resizing.view(whole, self.size, rng))
        except (OSError, ValueError, SyntaxError, module.DecompressionBombError) as error:
            raise CalibrationError(f"{name}: this image cannot be read ({error}); repair or remove it") from error

    def from_pixels(self, pixels: Array) -> Array:
        """Prepare one image of shape (H, W, C), uint8; returns the same as :meth:`from_file`."""
        gray = self.channels == "gray"
        if pixels.shape[:2] == self.size:
            if pixels.shape[2] == 1 and not gray:
                return self._finished(np.repeat(pixels, 3, axis=2))
            if pixels.shape[2] == (1 if gray else 3):
                return self._finished(pixels)
        image = _pillow().fromarray(np.ascontiguousarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels))
        return self._finished(self.resizing(self._converted(image), self.size))

    def _converted(self, image: Any) -> Any:
        if image.mode.startswith("I"):  # 16 bits of gray, which convert() would clip
            image = _pillow().fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("L" if self.channels == "gray" else "RGB")

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

    def sentence(self, spec: InputSpec) -> str:
        """A sentence on how images are read for an input, and on whose authority."""
        if self.guessed:
            return f"guessed preprocessing {self.origin.removeprefix('guess ')} for the input {spec}: {self}"
        return f"images are read as {f'{self.origin} says' if self.origin else 'asked for'}: {self}"

    def __str__(self) -> str:
        parts = [f"{self.size[0]}×{self.size[1]}", self.channels, self.layout, str(self.resizing)]
        if np.isclose(self.scale, 1 / 255):
            parts.append("x/255")
        elif self.scale != 1:
            parts.append(f"x*{self.scale:g}")
        for word, values in (("minus", self.mean), ("over", self.std)):
            if values:
                parts.append(f"{word} ({', '.join(f'{value:g}' for value in values)})")
        return ", ".join(parts)


def image_reader(
    spec: InputSpec, wish: Preprocess | None = None, declared: Declared | None = None,
    settled: tuple[int, ...] | None = None,
) -> ImageReader:  # fmt: skip
    """Make the image reader of an input: as the user asks, else as the model declares, else by a guess.

    The size is the user's, else the input's, else that of the settled shape, else the declared one.
    Integer inputs get the raw values 0..255.

    Args:
        spec: The input, of rank 4.
        wish: The user's preprocessing.
        declared: The model's declaration.
        settled: A concrete shape of the input, for sizes that it leaves open.

    Raises:
        CalibrationError: The input is not an image, or contradicts the preprocessing.
    """
    wish = wish or Preprocess()
    layout = wish.layout or image_layout(spec)
    if layout is None or len(spec.shape) != 4:
        raise CalibrationError(
            f"the model's input {spec} does not look like an image (rank 4, 1 or 3 channels); "
            "give its data as .npz or .npy"
        )
    places = (1, 2, 3) if layout == "nchw" else (3, 1, 2)
    depth, height, width = (spec.shape[place] for place in places)
    guess = _guess(spec, layout)
    base = guess[1] if declared is None else declared.preprocess.over(guess[1])
    complete = wish.over(base)
    channels: Channels = complete.channels or ("gray" if depth == 1 else "rgb")
    _check_channels(spec, complete, layout, channels, depth)
    size = _size(spec, wish, [
        (height, width), (None, None) if settled is None else (settled[places[1]], settled[places[2]]),
        (declared and declared.preprocess.size) or (None, None),
    ])  # fmt: skip
    scale, mean, std = complete.scale, complete.mean, complete.std
    if spec.dtype.kind in "iu":
        scale, mean, std = 1.0, (), ()
    explicit = any(value is not None for value in (wish.scale, wish.mean, wish.std))
    origin = "" if explicit else f"guess '{guess[0]}'" if declared is None else declared.origin
    return ImageReader(
        size=size,
        resizing=_resizing(complete),
        scale=1 / 255 if scale is None else scale,
        mean=mean or (),
        std=std or (),
        layout=layout,
        channels=channels,
        origin=origin,
    )


def image_layout(spec: InputSpec) -> Layout | None:
    """The layout of an input that looks like an image, else None."""
    if len(spec.shape) != 4:
        return None
    if spec.shape[1] in (1, 3):
        return "nchw"
    if spec.shape[3] in (1, 3):
        return "nhwc"
    return None


def _guess(spec: InputSpec, layout: Layout) -> tuple[str, Preprocess]:
    """A preprocessing from the shape and type of an input alone.

    Gray images get values 0..1, three channels on the last axis Keras' -1..1, and others ImageNet's normalization.
    """
    if spec.dtype.kind in "iu":
        name = "none"
    elif 1 in (spec.shape[1:2] + spec.shape[3:4]):
        name = "unit"
    else:
        name = "imagenet" if layout == "nchw" else "keras-tf"
    return name, Preprocess.named(name)


def _check_channels(
    spec: InputSpec, whole: Preprocess, layout: Layout, channels: Channels, depth: int | str | None
) -> None:
    if isinstance(depth, int) and depth != (1 if channels == "gray" else 3):
        raise CalibrationError(
            f"{channels} images in {layout} do not fit the model's input {spec}; "
            "give other --channels or another --layout"
        )
    for name, values in (("mean", whole.mean), ("std", whole.std)):
        if channels == "gray" and len(values or ()) > 1:
            raise CalibrationError(
                f"{name} has {len(values or ())} numbers, but the model's input {spec} has one channel; give one number"
            )


def _resizing(whole: Preprocess) -> Resizing:
    plain = Resizing()
    return Resizing(
        whole.resize or plain.method, whole.interpolation or plain.interpolation,
        plain.crop if whole.crop is None else whole.crop, plain.fill if whole.fill is None else whole.fill,
    )  # fmt: skip


def _size(spec: InputSpec, wish: Preprocess, known: Sequence[Sequence[int | str | None]]) -> tuple[int, int]:
    """Height and width: as the user asks, else for each side the first known size, fixed sizes first.

    A side of unknown size is as long as the other one.
    """
    if wish.size is not None:
        if not all(have == want for have, want in zip(wish.size, known[0], strict=True) if isinstance(want, int)):
            raise CalibrationError(f"images of {wish.size[0]}×{wish.size[1]} do not fit the model's input {spec}")
        return wish.size
    sides = [next((size for size in side if isinstance(size, int)), None) for side in zip(*known, strict=True)]
    other = next((side for side in sides if side is not None), DEFAULT_SIZE)
    height, width = (other if side is None else side for side in sides)
    return height, width


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("reading images needs Pillow; install it with: pip install 'onnxcop[images]'") from error
    return Image
