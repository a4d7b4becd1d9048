"""Tasks that a user may name if the outputs of a model do not show its kind."""

from __future__ import annotations

from typing import Literal, get_args

Task = Literal["classify", "detect", "embed", "regress", "sequence"]
TASKS: tuple[str, ...] = get_args(Task)
