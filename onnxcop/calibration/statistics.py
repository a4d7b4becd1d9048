"""Second-moment statistics of the inputs of layers: additive, mergeable, tied to their model."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcop._base.documents import table_in, text_in, whole_in
from onnxcop._base.files import DAMAGE, write_atomically
from onnxcop._base.types import FloatArray
from onnxcop.analysis.layers import Layer
from onnxcop.errors import CalibrationError, PlanMismatchError

VERSION = 1


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of C channels.

    Attributes:
        count: Number of observations (samples × positions).
        mean: float64 [C].
        scatter: float64 [C, C], Σ (x - mean)(x - mean)ᵀ.
    """

    count: float
    mean: FloatArray
    scatter: FloatArray

    @property
    def covariance(self) -> FloatArray:
        """Population covariance, float64 [C, C]."""
        return self.scatter / max(self.count, 1.0)

    @property
    def second(self) -> FloatArray:
        """E[x xᵀ], float64 [C, C]."""
        return self.covariance + np.outer(self.mean, self.mean)

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of observations (Chan, Golub, LeVeque 1979)."""
        if self.mean.shape != other.mean.shape:
            raise PlanMismatchError("statistics of different widths cannot be merged")
        count = self.count + other.count
        if count == 0:
            return self
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(gap, gap) * (self.count * other.count / count)
        return Moments(count, mean, scatter)


def tap_key(layer: Layer) -> str:
    """Name of the statistics that a layer needs; layers that read the same channels share them."""
    return f"{layer.tensor}|{layer.axis}|{layer.outer}|{layer.inner}"


@dataclass(frozen=True, slots=True)
class CalibrationStats:
    """Statistics of a calibration run.

    Attributes:
        model: SHA-256 of the model it belongs to.
        samples: Number of samples.
        taps: Moments by tap (see :func:`tap_key`).
    """

    model: str
    samples: int
    taps: Mapping[str, Moments]

    def moments(self, layer: Layer) -> Moments | None:
        """Moments of a layer's input channels; None if there are none."""
        return self.taps.get(tap_key(layer))

    def equals(self, other: CalibrationStats) -> bool:
        """Whether both are statistics of the same samples, to the last bit."""
        return (
            (self.model, self.samples, self.taps.keys()) == (other.model, other.samples, other.taps.keys())
            and all(np.array_equal(moments.mean, other.taps[key].mean) for key, moments in self.taps.items())
            and all(np.array_equal(moments.scatter, other.taps[key].scatter) for key, moments in self.taps.items())
        )

    def merged(self, other: CalibrationStats) -> CalibrationStats:
        """Statistics of the samples of both.

        Raises:
            PlanMismatchError: They belong to different models.
        """
        if self.model != other.model:
            raise PlanMismatchError("the statistics belong to different models and cannot be merged")
        if self.taps.keys() != other.taps.keys():
            raise PlanMismatchError("the statistics were gathered at different tensors and cannot be merged")
        taps = {key: moments.merged(other.taps[key]) for key, moments in self.taps.items()}
        return CalibrationStats(self.model, self.samples + other.samples, taps)

    @classmethod
    def of_model(cls, given: CalibrationStats | str | Path, sha: str) -> CalibrationStats:
        """Statistics of the model with this SHA-256, read from a file if its name is given.

        Raises:
            CalibrationError: The file contains no statistics.
            PlanMismatchError: They belong to another model.
        """
        stats = given if isinstance(given, CalibrationStats) else cls.load(Path(given))
        stats.check(sha, "the statistics" if stats is given else str(given))
        return stats

    def check(self, sha: str, source: str = "the statistics") -> None:
        """Refuse statistics of another model."""
        if self.model != sha:
            raise PlanMismatchError(f"{source}: gathered on another model ({self.model[:12]}…, this is {sha[:12]}…)")

    def save(self, path: str | Path) -> None:
        """Write to a .npz file."""
        write_atomically(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """The contents of a .npz file."""
        head = {"version": VERSION, "model": self.model, "samples": self.samples, "taps": list(self.taps)}
        arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
        for number, moments in enumerate(self.taps.values()):
            arrays[f"{number}.count"] = np.array(moments.count)
            arrays[f"{number}.mean"] = moments.mean
            arrays[f"{number}.scatter"] = moments.scatter
        buffer = io.BytesIO()
        header = np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)
        np.savez_compressed(buffer, header=header, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def load(cls, path: str | Path) -> CalibrationStats:
        """Read what :meth:`save` wrote.

        Raises:
            CalibrationError: The file is missing, or contains no statistics of this version.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                head = table_in(json.loads(bytes(file["header"]).decode()))
                if head.get("version") != VERSION:
                    raise CalibrationError(f"{path}: statistics of version {head.get('version')}, need {VERSION}")
                taps = {str(key): _moments(file, n) for n, key in enumerate(head["taps"])}
            return cls(text_in(head["model"]), whole_in(head["samples"]), taps)
        except FileNotFoundError:
            raise CalibrationError(f"{path} does not exist; gather statistics with --stats-out") from None
        except DAMAGE as error:
            cause = " ".join(str(error).split())
            raise CalibrationError(f"{path} holds no calibration statistics: {cause}") from None


def _moments(file: Mapping[str, np.ndarray[Any, np.dtype[Any]]], number: int) -> Moments:
    """The moments of one tap in a file.

    Raises:
        ValueError: They are not of the right type or shape, or not finite.
    """
    count, mean, scatter = (file[f"{number}.{name}"] for name in ("count", "mean", "scatter"))
    for array, rank, kinds in ((count, 0, "iuf"), (mean, 1, "f"), (scatter, 2, "f")):
        if array.dtype.kind not in kinds or array.ndim != rank or not np.isfinite(array).all():
            raise ValueError(f"tap {number} is not an array of {rank} axes of finite numbers")
    if scatter.shape != (len(mean), len(mean)) or count < 0:
        raise ValueError(f"the moments of tap {number} do not match")
    return Moments(float(count), mean.astype(np.float64), scatter.astype(np.float64))
