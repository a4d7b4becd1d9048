"""What a user may say that a model is for, if its outputs do not show it."""

from __future__ import annotations

from typing import Literal, get_args

Task = Literal["classify", "detect", "embed", "regress", "sequence"]
TASKS: tuple[str, ...] = get_args(Task)
