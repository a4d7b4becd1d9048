"""Preprocessing that a model declares, in its metadata or in files beside it.

Four conventions are read: Ultralytics' metadata (`imgsz`, `task`, `names`), RapidOCR's `character` list, Hugging Face's
`preprocessor_config.json`, and timm's `config.json` with its `pretrained_cfg`.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxcop._base.documents import json_table
from onnxcop.images.preprocess import Interpolation, Preprocess, Resize

log = logging.getLogger("onnxcop")

_PIL_FILTERS: dict[int, Interpolation] = {
    0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "area", 5: "bilinear"
}  # fmt: skip
_LARGEST_FILE = 2**20  # bytes of a configuration; a larger file is something else


@dataclass(frozen=True, slots=True)
class Declared:
    """Preprocessing that a model declares.

    Attributes:
        origin: The source, in words.
        preprocess: The declared fields; the others are open.
    """

    origin: str
    preprocess: Preprocess


def read_declared(model: onnx.ModelProto, path: Path | None = None) -> Declared | None:
    """Read the preprocessing from a model's metadata or the files beside it; None if they declare none.

    Args:
        model: The model, for its `metadata_props`.
        path: Its file. The files of its folder are read, and those of the folder above if the model's own
            folder is called `onnx`, as Hugging Face repositories have it.
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    declared = _ultralytics(metadata) or _rapidocr(metadata)
    if declared is not None or path is None:
        return declared
    folders = [path.parent, path.parent.parent] if path.parent.name == "onnx" else [path.parent]
    readers: tuple[tuple[str, Callable[[Mapping[str, Any]], Declared | None]], ...] = (
        ("preprocessor_config.json", _huggingface),
        ("config.json", _timm),
    )
    for folder in folders:
        for name, reader in readers:
            document = json_table(folder / name, _LARGEST_FILE)
            declared = None if document is None else _tolerant(reader, document, folder / name)
            if declared is not None:
                return declared
    return None


def class_names(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of a model's classes as Ultralytics' metadata list them, by number; empty if they do not."""
    text = next((entry.value for entry in model.metadata_props if entry.key == "names"), "")
    names = _literal(text)
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        return tuple(str(names[place]) for place in range(len(names)))
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _ultralytics(metadata: Mapping[str, str]) -> Declared | None:
    if not {"task", "names"} <= set(metadata):
        return None
    size = _literal(metadata.get("imgsz", ""))
    pair = tuple(size) if isinstance(size, list) and len(size) == 2 and all(isinstance(s, int) for s in size) else None
    names = _literal(metadata["names"])
    count = f", {len(names)} classes" if isinstance(names, dict | list) else ""
    preset = "unit" if metadata["task"] == "classify" else "ultralytics"
    return Declared(
        f"the model's metadata (ultralytics, {metadata['task']}{count})",
        Preprocess(size=pair).over(Preprocess.named(preset)),
    )


def _rapidocr(metadata: Mapping[str, str]) -> Declared | None:
    """A list of characters marks a text recognizer of PaddleOCR."""
    if metadata.get("character", "").count("\n") < 9:
        return None
    return Declared(
        "the model's metadata (a list of characters: PaddleOCR text recognition)", Preprocess.named("paddleocr")
    )


def _huggingface(config: Mapping[str, Any]) -> Declared | None:
    if not any(key in config for key in ("image_mean", "do_rescale", "do_resize", "image_processor_type")):
        return None
    resize, size, crop = _huggingface_size(config)
    scale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
    normalized = config.get("do_normalize", True)
    mean = _numbers(config.get("image_mean")) if normalized else ()
    std = _numbers(config.get("image_std")) if normalized else ()
    if config.get("rescale_offset") and not mean:
        mean = (1.0,)
    preprocess = Preprocess(
        size=size, resize=resize, crop=crop, scale=scale, mean=mean, std=std,
        interpolation=_PIL_FILTERS.get(config.get("resample", 2), "bilinear"),
        channels="bgr" if config.get("do_flip_channel_order") else None,
    )  # fmt: skip
    return Declared("preprocessor_config.json", preprocess)


def _huggingface_size(config: Mapping[str, Any]) -> tuple[Resize, tuple[int, int] | None, float | None]:
    """How images are resized, to which size, and the share that a centre crop keeps."""
    size = config.get("size") if config.get("do_resize", True) else None
    cropped = _height_width(config.get("crop_size")) if config.get("do_center_crop") else None
    if (isinstance(size, Mapping) and "shortest_edge" in size) or (isinstance(size, int) and cropped):
        edge = int(size if isinstance(size, int) else size["shortest_edge"])
        if config.get("do_pad") or (isinstance(size, Mapping) and "longest_edge" in size):
            return "pad", None, None  # a box for images of any shape: the model's own size applies
        if cropped is not None:
            return "crop", cropped, min(1.0, min(cropped) / edge)
        return "crop", (edge, edge), float(config.get("crop_pct") or 1.0)
    target = _height_width(size)
    if cropped is None:
        return "stretch", target, None
    if target is None:
        return "crop", cropped, 1.0
    return "crop", cropped, min(1.0, min(cropped) / min(target))


def _timm(config: Mapping[str, Any]) -> Declared | None:
    settings = config.get("pretrained_cfg", config)
    if not isinstance(settings, Mapping) or not {"input_size", "mean", "std"} <= set(settings):
        return None
    depth, height, width = (int(size) for size in settings["input_size"])
    modes: dict[str, Resize] = {"center": "crop", "squash": "stretch", "border": "letterbox"}
    interpolation = str(settings.get("interpolation", "bilinear"))
    known: dict[str, Interpolation] = {name: name for name in _PIL_FILTERS.values()}
    preprocess = Preprocess(
        size=(height, width), resize=modes.get(str(settings.get("crop_mode", "center")), "crop"),
        interpolation=known.get(interpolation, "bicubic"), crop=float(settings.get("crop_pct") or 0.875), scale=1 / 255,
        mean=_numbers(settings["mean"]), std=_numbers(settings["std"]), channels="gray" if depth == 1 else None,
    )  # fmt: skip
    return Declared("config.json (timm)", preprocess)


def _tolerant(
    read: Callable[[Mapping[str, Any]], Declared | None], document: Mapping[str, Any], path: Path
) -> Declared | None:
    try:
        return read(document)
    except (TypeError, ValueError, KeyError) as error:
        log.warning("%s: what it says about images is not understood (%s); give --preprocess", path, error)
        return None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _height_width(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    return None


def _numbers(values: Any) -> tuple[float, ...]:
    if values is None:
        return ()
    return tuple(float(value) for value in values) if isinstance(values, list | tuple) else (float(values),)
