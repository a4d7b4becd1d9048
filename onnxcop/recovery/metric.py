"""Scores of a model by a function of the user."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxcop._base.scripts import cause_of, importing_from
from onnxcop.errors import CalibrationError


@dataclass(frozen=True)
class Metric:
    """A function from a model to a number, higher is better, with its value for the original.

    Attributes:
        name: Its name.
        function: The function.
        base: Score of the original.
        folder: Folder of its script, which may import modules beside it.
    """

    name: str
    function: Callable[[onnx.ModelProto], Any]
    base: float
    folder: Path | None = None

    @classmethod
    def of(cls, source: Any, original: onnx.ModelProto) -> Metric:
        """Load `script.py:function` (or take a callable) and score the original.

        Raises:
            CalibrationError: No such script or function, or it fails.
        """
        unscored = cls.known(source, 0.0)
        return cls(unscored.name, unscored.function, unscored(original), unscored.folder)

    @classmethod
    def known(cls, source: Any, base: float) -> Metric:
        """Load `script.py:function` (or take a callable) where the original's score is known.

        Raises:
            CalibrationError: No such script or function.
        """
        function, folder = (source, None) if callable(source) else _load(str(source))
        return cls(str(getattr(function, "__name__", "metric")), function, base, folder)

    def __call__(self, model: onnx.ModelProto) -> float:
        """Score a model."""
        with nullcontext() if self.folder is None else importing_from(self.folder):
            try:
                return float(self.function(model))
            except (Exception, SystemExit) as error:  # the user's code may fail in any way
                raise CalibrationError(f"the metric {self.name!r} failed: {cause_of(error)}") from error


def _load(source: str) -> tuple[Callable[[onnx.ModelProto], Any], Path]:
    """Load the function that `script.py:function` names, and return it with the script's folder."""
    script, _, name = source.rpartition(":")
    if not script or not name:
        raise CalibrationError(f"--metric {source!r} is not of the form script.py:function")
    path = Path(script)
    if not path.is_file():
        raise CalibrationError(f"--metric: {path} does not exist; check the path")
    spec = importlib.util.spec_from_file_location("onnxcop_user_metric", path)
    if spec is None or spec.loader is None:
        raise CalibrationError(f"--metric: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    with importing_from(path.parent):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise CalibrationError(f"--metric: {path} cannot be loaded: {cause_of(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise CalibrationError(f"--metric: {path} has no function {name!r}")
    return function, path.parent
