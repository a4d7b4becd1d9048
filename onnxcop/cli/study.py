"""Commands that measure models: `onnxcop compare`, `onnxcop sweep` and `onnxcop profile`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from onnxcop.cli import console
from onnxcop.cli.arguments import (
    data_arguments,
    default_table,
    engine_from,
    inputs_from,
    progress_from,
    prune_options,
    workers_from,
)
from onnxcop.cli.framework import SectionCommand
from onnxcop.cli.options import (
    choice_options,
    classes_option,
    curve_options,
    data_options,
    engine_options,
    gate_option,
    input_shape_option,
    latency_options,
    policy_option,
    profile_options,
    seed_option,
    sweep_options,
    talking,
    task_option,
    verbose_option,
)
from onnxcop.cli.worker_options import independent_option, several, timing_workers_option, workers_option
from onnxcop.errors import OnnxcopError

_FILE = click.Path(path_type=Path)
GATE_FAILED = 3  # exit code


@click.command(
    "compare",
    cls=SectionCommand,
    examples=[
        ("onnxcop compare model.onnx small.onnx --data images/", "Compare cost, latency and outputs on images:"),
        ("onnxcop compare a.onnx b.onnx --data x.npz --gate 'agreement>=.97, time<=.8'", "Fail a CI job if b is bad:"),
    ],
)
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
@gate_option
@data_options
@task_option
@input_shape_option
@engine_options
@latency_options
@seed_option
@workers_option
@verbose_option
@talking
def compare_command(a: Path, b: Path, **values: Any) -> None:
    """Compare cost, latency and outputs of two models.

    Shows MACs, parameters, file size and latency of both, and how closely the outputs of B agree with those of A.
    Without --data, outputs are compared on synthetic inputs. The exit code is 3 if a condition of --gate fails.
    """
    from onnxcop.cli.console_study import show_comparison, show_verdicts, verdict_text
    from onnxcop.pipeline.compare import compare
    from onnxcop.pipeline.gate import check_gate, read_gate

    try:
        conditions = read_gate(values["gate"]) if values["gate"] else ()
    except OnnxcopError as error:
        raise click.UsageError(f"--gate: {error}") from None
    with workers_from(values) as executor, progress_from(values) as progress:
        comparison = compare(
            a, b, input_shapes=dict(values["input_shape"]) or None, options=engine_from(values),
            latency_seconds=values["latency_seconds"], task=values["task"], progress=progress,
            executor=executor, **data_arguments(values),
        )  # fmt: skip
    verdicts = check_gate(conditions, comparison)
    if values["as_json"]:
        console.show_json(
            "comparison", comparison.to_dict() | ({"gate": [asdict(one) for one in verdicts]} if verdicts else {})
        )
    elif not values["quiet"]:
        show_comparison(comparison, verbose=values["verbose"])
        show_verdicts(verdicts)
    failed = [verdict for verdict in verdicts if not verdict.holds]
    for verdict in failed:
        console.say(f"gate: {verdict.condition} does not hold: {verdict_text(verdict)}")
    if failed:
        click.get_current_context().exit(GATE_FAILED)


@click.command(
    "sweep",
    cls=SectionCommand,
    examples=[
        ("onnxcop sweep model.onnx --data images/", "Prune to 90, 80, 70, 60 and 50% of the MACs:"),
        ("onnxcop sweep model.onnx --data x.npz --macs 0.8,0.6 --save-models out/", "Keep the models:"),
        ("onnxcop sweep a.onnx b.onnx --data x.npz --workers 4 -o all.csv", "Prune a family, and go on if stopped:"),
        ("onnxcop sweep model.onnx --data x.npz --criterion measured,cop,l2 --seed 0,1,2", "Compare criteria:"),
    ],
)
@click.argument("models", type=_FILE, nargs=-1, required=True, metavar="MODEL...")
@curve_options
@sweep_options
@workers_option
@independent_option
@several
@choice_options
@talking
def sweep_command(models: tuple[Path, ...], **values: Any) -> None:
    """Prune to several budgets and report the trade-off.

    Writes a table (CSV) of size, latency and quality for every budget. The model is calibrated once. The table is
    updated after every point, so an interrupted run keeps the points that are finished.

    Several models, criteria or seeds (separated by commas), or one model with --independent, are pruned to every budget
    in jobs that do not depend on one another. A journal beside the table notes what is done: the same command continues
    a run that was stopped. A page beside the table (.html) shows all results.
    """
    from onnxcop.cli.family import single, sweep_family

    if len(models) * len(values["criterion"] or (None,)) * len(values["seed"]) > 1 or values["independent"]:
        sweep_family(models, values)
        return
    (model,), values = models, single(values)
    from onnxcop.cli.console_study import curve_head, curve_line
    from onnxcop.pipeline.sweep import Record, sweep_with

    table = values["output"] or default_table(model)
    inputs = inputs_from(values, model)
    inputs.check(table, values["plot"], values["stats_out"])
    record = Record(model, table, values["plot"], values["save_models"], inputs=inputs)
    drawn = not values["quiet"] and not values["as_json"]
    with workers_from(values) as executor, progress_from(values) as progress:
        asked = prune_options(values | {"macs": None, "executor": executor}, progress)
        for point in sweep_with(model, values["macs"], asked):
            progress.pause()
            row = record.add(point)
            if drawn and len(record.rows) == 2:
                click.echo("\n".join([*point.result.report.choices, curve_head(row), curve_line(record.rows[0], row)]))
            if drawn:
                click.echo(curve_line(row, record.rows[1]))
    if values["as_json"]:
        console.show_json("sweep", {"model": model, "table": table, "plot": values["plot"], "points": record.rows})
    elif drawn:
        click.echo(f"wrote {table}" + "".join(f", {path}" for path in (values["plot"], values["save_models"]) if path))


@click.command(
    "profile",
    cls=SectionCommand,
    examples=[
        ("onnxcop profile model.onnx -o phone.json", "Time the layers on this machine:"),
        ("onnxcop profile model.onnx --script time_it.py", "Write a script that times them on a device:"),
        ("onnxcop model.onnx -o small.onnx --latency 0.6 --latency-table phone.json", "Prune for that device:"),
    ],
)
@click.argument("model", type=_FILE)
@profile_options
@classes_option
@input_shape_option
@policy_option
@engine_options
@timing_workers_option
@talking
def profile_command(model: Path, output: Path | None, script: Path | None, **values: Any) -> None:
    """Time a model's layers at many widths on a device.

    Run this command on the device that will run the model. If onnxcop is not installed there, write a script for
    the device with --script. The resulting table works with --latency-table on any machine.
    """
    from onnxcop._base.files import write_atomically
    from onnxcop.pipeline.profile import profile, profile_script

    if script is not None and output is not None:
        raise click.UsageError("--script times nothing, so there is no table; give the script -o TABLE.json instead")
    if script is not None and values["workers"] is not None:
        raise click.UsageError("--script times nothing, so there is nothing for --workers")
    table = output or model.with_name(f"{model.name.removesuffix('.onnx')}.times.json")
    inputs_from(values, model).check(script or table)
    settings = {
        "options": engine_from(values), "policy": values["policy"], "target": values["target"],
        "classes": values["classes"], "keep_initializer_inputs": values["keep_initializer_inputs"],
        "input_shapes": dict(values["input_shape"]) or None,
    }  # fmt: skip
    if script is not None:
        write_atomically(script, profile_script(model, **settings).encode())
        if values["as_json"]:
            console.show_json("profile", {"model": model, "script": script})
        elif not values["quiet"]:
            click.echo(f"wrote {script}; on the device: python {script.name} -o {table.name}")
        return
    with workers_from(values) as executor, progress_from(values) as progress:
        measured = profile(model, table, seconds=values["seconds"], progress=progress, executor=executor, **settings)
    if values["as_json"]:
        console.show_json("profile", {"model": model, "table": table, **measured.summary()})
    elif not values["quiet"]:
        click.echo(f"{measured.described}\nwrote {table}")
