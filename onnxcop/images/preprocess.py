"""Preprocessing of images, as far as the user or the model specifies it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from onnxcop._base.lookup import check_known
from onnxcop.errors import CalibrationError

Layout = Literal["nchw", "nhwc"]
Channels = Literal["rgb", "bgr", "gray"]
Resize = Literal["crop", "stretch", "letterbox", "pad"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "area", "lanczos"]

_NUMBERS = ("scale", "mean", "std")
_CHOICES = {"layout": Layout, "channels": Channels, "resize": Resize, "interpolation": Interpolation}


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How an image becomes an input: resized, then `(x * scale - mean) / std`.

    None leaves a field open; then the model's declaration decides, else a guess from its input. `scale`, `mean` and
    `std` belong together: if one of them is given, the others default to 1/255, 0 and 1. An image of the right size
    is not resized.

    Attributes:
        size: Height and width in pixels.
        resize: `crop` (shorter side resized to `size / crop`, then a centre crop), `stretch` (to both sides),
            `letterbox` (proportions kept, centred, the rest filled) or `pad` (the same at the top left).
        interpolation: `nearest`, `bilinear`, `bicubic`, `area` or `lanczos`.
        crop: Share of the shorter side that `crop` keeps.
        fill: Pixel value 0..255 of the area that `letterbox` and `pad` add.
        scale: Factor of the pixel values 0..255.
        mean: Subtracted after scaling, one number or one per channel (in the order of `channels`).
        std: Divided by last, likewise.
        layout: Order of the axes, `nchw` or `nhwc`.
        channels: Order of the channels, `rgb`, `bgr` or `gray`.
    """

    size: tuple[int, int] | None = None
    resize: Resize | None = None
    interpolation: Interpolation | None = None
    crop: float | None = None
    fill: float | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: Layout | None = None
    channels: Channels | None = None

    def __post_init__(self) -> None:
        if self.crop is not None and not 0 < self.crop <= 1:
            raise CalibrationError(f"crop is {self.crop}; give a share above 0 and up to 1")
        if any(value == 0 for value in self.std or ()):
            raise CalibrationError("std holds a zero; give positive numbers")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in {0, 1, 3}:
                raise CalibrationError(f"{name} has {len(values)} numbers; give one or three")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in get_args(known):
                raise CalibrationError(f"{name} is {value!r}; give one of: {', '.join(get_args(known))}")

    @classmethod
    def named(cls, name: str) -> Preprocess:
        """A preprocessing by name; :data:`onnxcop.images.presets.PRESETS` holds them all."""
        from onnxcop.images.presets import PRESETS

        check_known(name.lower(), PRESETS, "preprocessing", CalibrationError)
        return PRESETS[name.lower()].preprocess

    def over(self, base: Preprocess) -> Preprocess:
        """This preprocessing, with its open fields taken from `base`."""
        settled: dict[str, Any] = {}
        own_numbers = any(getattr(self, name) is not None for name in _NUMBERS)
        for field in fields(self):
            value = getattr(self, field.name)
            open_ = value is None and not (own_numbers and field.name in _NUMBERS)
            settled[field.name] = getattr(base, field.name) if open_ else value
        if own_numbers:
            settled["scale"] = 1 / 255 if self.scale is None else self.scale
            settled["mean"], settled["std"] = self.mean or (), self.std or ()
        return replace(self, **settled)
