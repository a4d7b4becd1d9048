"""What a user may say that a model is for, where its outputs do not tell."""

from __future__ import annotations

from typing import Literal, get_args

Task = Literal["classify", "detect", "embed", "regress", "sequence"]
TASKS: tuple[str, ...] = get_args(Task)
