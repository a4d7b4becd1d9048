"""Where a pruned model comes from, written into the model itself: `metadata_props` that start with `onnxcop.`."""

from __future__ import annotations

import hashlib
import json

import onnx

from onnxcop._version import __version__
from onnxcop.graph.edit import replace_all
from onnxcop.rewrite.plan import PruningPlan

PREFIX = "onnxcop."
CLASSES = f"{PREFIX}classes"


def provenance(plan: PruningPlan) -> dict[str, str]:
    """What is written, by key: the program's version, the budget, SHA-256 of the original and of the plan, and classes.

    The original's is that of the plan (see :func:`onnxcop.graph.io.sha256`); the plan's is that of its file.
    """
    classes = {} if plan.kept is None else {CLASSES: json.dumps(plan.kept.to_dict(), separators=(",", ":"))}
    return classes | {
        f"{PREFIX}version": __version__,
        f"{PREFIX}budget": json.dumps(dict(plan.budget), separators=(",", ":")),
        f"{PREFIX}original_sha256": plan.original,
        f"{PREFIX}plan_sha256": hashlib.sha256(plan.to_json().encode()).hexdigest(),
    }


def stamp(model: onnx.ModelProto, plan: PruningPlan) -> None:
    """Write where a model comes from into it, in place of what an earlier run wrote; other keys stay.

    What an earlier run wrote of classes stays true, and stays, where this one cuts none.
    """
    lasting = {CLASSES} if plan.kept is None else set()
    kept = [entry for entry in model.metadata_props if entry.key in lasting or not entry.key.startswith(PREFIX)]
    replace_all(model.metadata_props, kept)
    for key, value in provenance(plan).items():
        model.metadata_props.add(key=key, value=value)
