"""`onnxcop sweep` over several models, or over one in independent jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from onnxcop._base.formatting import new_table, terminal
from onnxcop.cli import console
from onnxcop.cli.arguments import default_table, inputs_from, progress_from, prune_options, workers_from

if TYPE_CHECKING:
    from rich.table import Table

    from onnxcop.pipeline.family.jobs import JobRecord

_TABLE = Path("family.sweep.csv")
_FAILED = 1  # exit code if a job failed


def sweep_family(models: Sequence[Path], values: Mapping[str, Any]) -> None:
    """Prune several models to several budgets, and show each result when it is there."""
    from onnxcop.data.input_files import InputFiles
    from onnxcop.pipeline.family.run import FamilyFiles, family_with

    own = inputs_from(values, models[0])
    inputs = InputFiles(models, own.data, own.metric, own.others)
    table = values["output"] or (_TABLE if len(set(models)) > 1 else default_table(models[0]))
    files = FamilyFiles(table, values["plot"], values["save_models"], inputs)
    drawn = not values["quiet"] and not values["as_json"]
    jobs, done, failed = len(set(models)) * len(set(values["macs"])), 0, 0
    with workers_from(values) as executor, progress_from(values) as progress, _shown(models, values, drawn) as show:
        asked = prune_options({**values, "macs": None, "executor": executor}, progress)
        for record in family_with(models, values["macs"], files, asked):
            done += 1
            failed += bool(record.error)
            show(record, f"{done:>4} of {jobs}  {_line(record.model, record.row, record.error)}")
    if values["as_json"]:
        rows = [{"model": record.model, **record.row, "error": record.error} for record in files.journal.done.values()]
        console.show_json("family", {"models": list(models), "table": files.table, "page": files.page, "points": rows})
    elif drawn:
        click.echo(f"wrote {files.table}, {files.page}" + ("" if files.plot is None else f", {files.plot}"))
    if failed:
        console.say(f"{failed} of {jobs} jobs failed; the table says why, and the same command tries them again")
        click.get_current_context().exit(_FAILED)


@contextmanager
def _shown(
    models: Sequence[Path], values: Mapping[str, Any], drawn: bool
) -> Iterator[Callable[[JobRecord, str], None]]:
    """A function that shows a finished job and its line: in a table of all jobs on a terminal, else the line alone."""
    screen = terminal()
    if not drawn or not screen.is_terminal:
        yield lambda record, line: click.echo(line) if drawn else None
        return
    from rich.live import Live

    done: dict[tuple[str, float], str] = {}
    budgets = sorted(set(values["macs"]), reverse=True)
    with Live(_table(models, budgets, done), console=screen, auto_refresh=False) as live:

        def show(record: JobRecord, line: str) -> None:
            done[record.model, float(record.row["budget"] or 0)] = _cell(record)
            live.update(_table(models, budgets, done), refresh=True)
            if record.error:
                live.console.print(line, markup=False, highlight=False)

        yield show


def _table(models: Sequence[Path], budgets: Sequence[float], done: Mapping[tuple[str, float], str]) -> Table:
    """All jobs: a row for each model, a column for each budget."""
    table = new_table("model", *(f"{budget:g}" for budget in budgets))
    for model in dict.fromkeys(models):
        table.add_row(Text(model.name), *(done.get((str(model), budget), "…") for budget in budgets))
    return table


def _cell(record: JobRecord) -> str:
    """A finished job in a word: how much agrees, or the divergence."""
    agreement, divergence = record.row.get("agreement"), record.row.get("divergence")
    if record.error:
        return "failed"
    if agreement is not None:
        return f"{agreement:.1%}"
    return "done" if divergence is None else f"{divergence:.3g}"


def _line(model: str, row: Mapping[str, Any], error: str) -> str:
    """A finished job in a line."""
    text = f"{Path(model).name}  {row['budget']:g}"
    if error:
        return f"{text}  failed: {error}"
    kept = "  ".join(f"{row[name]:.1%} {label}" for name, label in (("macs_kept", "MACs"), ("bytes_kept", "file")))
    quality = [f"{row[name]:.4g} {name}" for name in ("divergence", "agreement") if row.get(name) is not None]
    return "  ".join([text, kept, *quality])
