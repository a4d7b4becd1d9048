"""`onnxcop sweep` over several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from onnxcop.cli import console
from onnxcop.cli.arguments import inputs_from, progress_from, prune_options, workers_from

_TABLE = Path("family.sweep.csv")
_FAILED = 1  # exit code if a job failed


def sweep_family(models: Sequence[Path], values: Mapping[str, Any]) -> None:
    """Prune several models to several budgets, and show each result when it is there."""
    from onnxcop.data.input_files import InputFiles
    from onnxcop.pipeline.family.run import FamilyFiles, family_with

    own = inputs_from(values, models[0])
    inputs = InputFiles(models, own.data, own.metric, own.others)
    files = FamilyFiles(values["output"] or _TABLE, values["plot"], values["save_models"], inputs)
    drawn = not values["quiet"] and not values["as_json"]
    jobs, done, failed = len(set(models)) * len(set(values["macs"])), 0, 0
    with workers_from(values) as executor, progress_from(values) as progress:
        asked = prune_options({**values, "macs": None, "executor": executor}, progress)
        for record in family_with(models, values["macs"], files, asked):
            done += 1
            failed += bool(record.error)
            if drawn:
                click.echo(f"{done:>4} of {jobs}  {_line(record.model, record.row, record.error)}")
    if values["as_json"]:
        rows = [{"model": record.model, **record.row, "error": record.error} for record in files.journal.done.values()]
        console.show_json("family", {"models": list(models), "table": files.table, "page": files.page, "points": rows})
    elif drawn:
        click.echo(f"wrote {files.table}, {files.page}" + ("" if files.plot is None else f", {files.plot}"))
    if failed:
        console.say(f"{failed} of {jobs} jobs failed; the table says why, and the same command tries them again")
        click.get_current_context().exit(_FAILED)


def _line(model: str, row: Mapping[str, Any], error: str) -> str:
    """A finished job in a line."""
    text = f"{Path(model).name}  {row['budget']:g}"
    if error:
        return f"{text}  failed: {error}"
    kept = "  ".join(f"{row[name]:.1%} {label}" for name, label in (("macs_kept", "MACs"), ("bytes_kept", "file")))
    quality = [f"{row[name]:.4g} {name}" for name in ("divergence", "agreement") if row.get(name) is not None]
    return "  ".join([text, kept, *quality])
