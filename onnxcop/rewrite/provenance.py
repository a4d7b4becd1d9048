"""Provenance of a pruned model, written into the model itself: `metadata_props` that start with `onnxcop.`."""

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
    """The entries by key: version of the program, budget, SHA-256 of the original and of the plan, and classes.

    The original's hash is that in the plan (see :func:`onnxcop.graph.io.sha256`); the plan's hash is that of its file.
    """
    classes = {} if plan.kept is None else {CLASSES: json.dumps(plan.kept.to_dict(), separators=(",", ":"))}
    return classes | {
        f"{PREFIX}version": __version__,
        f"{PREFIX}budget": json.dumps(dict(plan.budget), separators=(",", ":")),
        f"{PREFIX}original_sha256": plan.original,
        f"{PREFIX}plan_sha256": hashlib.sha256(plan.to_json().encode()).hexdigest(),
    }


def stamp(model: onnx.ModelProto, plan: PruningPlan) -> None:
    """Write the provenance into a model, replacing that of an earlier run; other keys stay.

    An earlier entry about classes remains true, and stays, if this run does not change classes.
    """
    lasting = {CLASSES} if plan.kept is None else set()
    kept = [entry for entry in model.metadata_props if entry.key in lasting or not entry.key.startswith(PREFIX)]
    replace_all(model.metadata_props, kept)
    for key, value in provenance(plan).items():
        model.metadata_props.add(key=key, value=value)
