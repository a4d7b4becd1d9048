"""`onnxcop sweep` over several models, criteria or seeds, or over one model in independent jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from onnxcop._base.formatting import new_table, terminal
from onnxcop.cli import console
from onnxcop.cli.arguments import (
    COP_PARAMETERS,
    criterion_from,
    default_table,
    inputs_from,
    progress_from,
    prune_options,
    workers_from,
)
from onnxcop.cli.worker_options import MEASURED

if TYPE_CHECKING:
    from rich.table import Table

    from onnxcop.pipeline.family.jobs import JobRecord, Variant

_TABLE = Path("family.sweep.csv")
_FAILED = 1  # exit code if a job failed
_WITHOUT: dict[str, Any] = {"criterion": None} | dict.fromkeys(COP_PARAMETERS)  # what measured sensitivity has none of


def sweep_family(models: Sequence[Path], values: Mapping[str, Any]) -> None:
    """Prune several models to several budgets, and show each result when it is there."""
    from onnxcop.data.input_files import InputFiles
    from onnxcop.pipeline.family.run import FamilyFiles, family_with

    own = inputs_from(values, models[0])
    inputs = InputFiles(models, own.data, own.metric, own.others)
    table = values["output"] or (_TABLE if len(set(models)) > 1 else default_table(models[0]))
    files = FamilyFiles(table, values["plot"], values["save_models"], inputs)
    drawn = not values["quiet"] and not values["as_json"]
    variants = _variants(values)
    jobs, done, failed = len(set(models)) * len(set(values["macs"])) * len(variants), 0, 0
    labels = [" ".join(str(value) for _, value in variant.figures) for variant in variants]
    shown = _shown(models, labels, values["macs"], drawn)
    with workers_from(values) as executor, progress_from(values) as progress, shown as show:
        asked = prune_options(single(values) | {"macs": None, "executor": executor}, progress)
        for record in family_with(models, values["macs"], files, asked, variants):
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


def single(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a command with the first of several criteria and seeds."""
    (name, *_), (seed, *_) = values["criterion"] or (None,), values["seed"]
    return {**values, "criterion": name, "seed": seed} | (_WITHOUT if name == MEASURED else {})


def _variants(values: Mapping[str, Any]) -> list[Variant]:
    from onnxcop.pipeline.family.jobs import variants_of

    names = values["criterion"] or (None,)
    criteria = {name or MEASURED: criterion_from(single({**values, "criterion": (name,)})) for name in names}
    return variants_of(criteria, values["seed"])


@contextmanager
def _shown(
    models: Sequence[Path], labels: Sequence[str], macs: Sequence[float], drawn: bool
) -> Iterator[Callable[[JobRecord, str], None]]:
    """A function that shows a finished job and its line: in a table of all jobs on a terminal, else the line alone."""
    screen = terminal()
    if not drawn or not screen.is_terminal:
        yield lambda record, line: click.echo(line) if drawn else None
        return
    from rich.live import Live

    done: dict[tuple[str, str, float], str] = {}
    budgets = sorted(set(macs), reverse=True)
    with Live(_table(models, labels, budgets, done), console=screen, auto_refresh=False) as live:

        def show(record: JobRecord, line: str) -> None:
            done[record.model, _label(record.row), float(record.row["budget"] or 0)] = _cell(record)
            live.update(_table(models, labels, budgets, done), refresh=True)
            if record.error:
                live.console.print(line, markup=False, highlight=False)

        yield show


def _table(
    models: Sequence[Path], labels: Sequence[str], budgets: Sequence[float],
    done: Mapping[tuple[str, str, float], str],
) -> Table:  # fmt: skip
    """All jobs: a row for each model, criterion and seed, a column for each budget."""
    table = new_table("model", *(f"{budget:g}" for budget in budgets))
    for model, label in product(dict.fromkeys(models), labels):
        cells = (done.get((str(model), label, budget), "…") for budget in budgets)
        table.add_row(Text(f"{model.name} {label}".strip()), *cells)
    return table


def _label(row: Mapping[str, Any]) -> str:
    """Criterion and seed of a row, as far as the jobs differ in them."""
    return " ".join(str(row[name]) for name in ("criterion", "seed") if name in row)


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
    text = "  ".join(filter(None, [Path(model).name, _label(row), f"{row['budget']:g}"]))
    if error:
        return f"{text}  failed: {error}"
    kept = "  ".join(f"{row[name]:.1%} {label}" for name, label in (("macs_kept", "MACs"), ("bytes_kept", "file")))
    quality = [f"{row[name]:.4g} {name}" for name in ("divergence", "agreement") if row.get(name) is not None]
    return "  ".join([text, kept, *quality])
