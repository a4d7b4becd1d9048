"""The state of a training run in a file, from which it resumes as if it had not been stopped."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcop._base.files import DAMAGE, write_atomically
from onnxcop._base.types import Array
from onnxcop.errors import CalibrationError
from onnxcop.training.trainer import TrainingState

_FORMAT = 1


def digest_of(arrays: Mapping[str, Array]) -> str:
    """Digest of arrays by name, for the identity of a run."""
    found = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        found.update(f"{name} {values.dtype} {values.shape} ".encode())
        found.update(np.ascontiguousarray(values).tobytes() if values.dtype.kind != "O" else repr(values).encode())
    return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a run.

    Attributes:
        run: Identity of the run: models, samples and settings.
        state: Weights, moments and the number of steps.
        best: Weights of the best so far, float32 [elements].
        notes: Numbers of the run, as JSON holds them.
    """

    run: str
    state: TrainingState
    best: Array
    notes: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically.

        Raises:
            ModelError: The folder is missing or not writable, or the disk is full.
        """
        buffer = io.BytesIO()
        header = json.dumps({"format": _FORMAT, "run": self.run, "step": self.state.step, "notes": self.notes})
        np.savez(
            buffer, header=np.array(header), weights=self.state.weights, first=self.state.first,
            second=self.state.second, best=self.best,
        )  # fmt: skip
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, run: str) -> Checkpoint | None:
        """Read a checkpoint; None if there is none yet.

        Raises:
            CalibrationError: It is damaged, or belongs to another run.
        """
        if not path.exists():
            return None
        try:
            with np.load(path) as arrays:
                header = json.loads(str(arrays["header"]))
                state = TrainingState(arrays["weights"], arrays["first"], arrays["second"], int(header["step"]))
                checkpoint = cls(header["run"], state, arrays["best"], header["notes"])
        except DAMAGE:
            raise CalibrationError(
                f"{path} is not a checkpoint, or is damaged; delete it or name another file"
            ) from None
        if checkpoint.run != run:
            raise CalibrationError(
                f"{path} is the checkpoint of another run (model, samples or settings differ); delete it or name "
                "another file"
            )
        return checkpoint
