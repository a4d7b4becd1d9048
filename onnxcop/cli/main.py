"""The command line: `onnxcop MODEL -o OUT`, and what else it can do. No logic lives here."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from onnxcop._base.scratch import remove_leftovers
from onnxcop._version import __version__
from onnxcop.cli import console
from onnxcop.cli.arguments import (
    analysis_arguments,
    apply_options,
    check_outputs,
    criterion_to_show,
    engine_from,
    inputs_from,
    progress_from,
    prune_options,
    statistics_arguments,
    target_of,
)
from onnxcop.cli.failures import tell_failure
from onnxcop.cli.framework import MAIN, MainForm, ModelFile, Program, SectionCommand
from onnxcop.cli.options import (
    budget_options,
    choice_options,
    criterion_options,
    data_options,
    distill_options,
    engine_options,
    latency_options,
    metric_option,
    output_options,
    plan_options,
    quantize_option,
    score_options,
    seed_option,
    shape_options,
    stats_options,
    talking,
    task_option,
    verbose_option,
)
from onnxcop.cli.quantized import Quantized, int8_path, quantized
from onnxcop.cli.stopping import stop_cleanly
from onnxcop.cli.study import compare_command, profile_command, sweep_command
from onnxcop.cli.train import finetune_command
from onnxcop.cli.trim_vocab import trim_vocab_command
from onnxcop.cli.types import Output

_FILE = click.Path(path_type=Path)


@click.group(
    cls=Program,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="onnxcop", message="%(prog)s %(version)s")
def app() -> None:
    """Prune filters from any ONNX model: smaller, faster, verified.

    Write ./NAME for a model file that is named like a command.
    """


@app.command(MAIN, cls=MainForm)
@click.argument("model", type=ModelFile(path_type=Path))
@output_options
@plan_options
@budget_options
@metric_option
@distill_options
@quantize_option
@choice_options
@verbose_option
@talking
def prune_command(model: Path, output: Output | None, plan_out: Path | None, **values: Any) -> None:
    """Prune a model."""
    from onnxcop.pipeline.prune import prune_with

    target = target_of(output, model)
    int8 = None if values["then_quantize"] is None else int8_path(target)
    check_outputs(inputs_from(values, model), output, target, int8, plan_out, values["stats_out"], *values["reports"])
    if values["then_quantize"] == "static" and values["data"] is None:
        raise click.UsageError("--then-quantize static takes ranges from calibration data; give --data, or use dynamic")
    stats = values["stats_out"] is not None  # gathered now, written together with the model
    with progress_from(values) as progress:
        result = prune_with(model, prune_options(values | {"stats_out": stats}, progress))
    int8_too = quantized(model, result.model, target, values)
    _write(result, target, plan_out, values, int8_too, beside=model if output is not None and output.whole else None)


@app.command("inspect", cls=SectionCommand)
@click.argument("model", type=_FILE)
@score_options
@criterion_options
@shape_options
@data_options
@stats_options
@engine_options
@seed_option
@verbose_option
@talking
def inspect_command(model: Path, **values: Any) -> None:
    """List what can be pruned and what is frozen, with reasons.

    Before any run: which filters are removed together, what removing them saves, what is frozen and why. With
    --scores, what every filter is worth.
    """
    from onnxcop.analysis.analyze import analyze
    from onnxcop.analysis.inspect import inspect
    from onnxcop.cli.console_inspect import show_inspection, show_scores

    criterion = criterion_to_show(values)
    inputs_from(values, model).check(values["stats_out"])
    analysis = analyze(model, options=engine_from(values), **analysis_arguments(values))
    found = inspect(analysis)
    if criterion is None:
        scores = None
    else:
        from onnxcop.criteria.scores import score, statistics

        with progress_from(values) as progress:
            stats = statistics(analysis, progress=progress, **statistics_arguments(values))
        scores = score(analysis, criterion, stats, values["seed"])
    if values["as_json"]:
        console.show_json("inspection", found.to_dict() | ({} if scores is None else {"scores": scores.to_dict()}))
    elif scores is not None:
        show_scores(scores, found.model, verbose=values["verbose"])
    else:
        show_inspection(found, verbose=values["verbose"])


@app.command("apply", cls=SectionCommand)
@click.argument("model", type=_FILE)
@click.argument("plan", type=_FILE)
@output_options
@data_options
@task_option
@engine_options
@latency_options
@seed_option
@verbose_option
@talking
def apply_command(model: Path, plan: Path, output: Output | None, **values: Any) -> None:
    """Apply a pruning plan to the model that it was made for."""
    from onnxcop.pipeline.prune import apply_with
    from onnxcop.rewrite.plan import PruningPlan

    target = target_of(output, model)
    check_outputs(inputs_from(values, model, plan), output, target, *values["reports"])
    with progress_from(values) as progress:
        result = apply_with(model, PruningPlan.load(plan), apply_options(values, progress))
    _write(result, target, None, values, beside=model if output is not None and output.whole else None)


@app.command("verify", cls=SectionCommand)
@click.argument("original", type=_FILE)
@click.argument("pruned", type=_FILE)
@click.option("--plan", type=_FILE, required=True, help="The plan that produced PRUNED.")
@click.option("--structure-only", is_flag=True, help="Check the structure only; weights may have changed.")
@engine_options
@talking
def verify_command(original: Path, pruned: Path, plan: Path, structure_only: bool, **values: Any) -> None:
    """Check that PRUNED is the result of applying a plan to ORIGINAL."""
    from onnxcop.rewrite.plan import PruningPlan
    from onnxcop.verification.recheck import recheck

    found = recheck(
        original,
        pruned,
        PruningPlan.load(plan),
        options=engine_from(values),
        structure_only=structure_only,
    )
    if values["as_json"]:
        console.show_json("verification", {"original": original, "pruned": pruned, **found.to_dict()})
    elif not values["quiet"]:
        click.echo(f"verified: {found.summary}")
        for note in found.notes:
            click.echo(f"  {note}")


@app.command("merge-stats", cls=SectionCommand)
@click.argument("output", type=_FILE)
@click.argument("inputs", type=_FILE, nargs=-1, required=True)
@talking
def merge_stats_command(output: Path, inputs: tuple[Path, ...], **values: Any) -> None:
    """Merge calibration statistics of one model into OUTPUT."""
    from onnxcop.calibration.calibrate import merge
    from onnxcop.calibration.statistics import CalibrationStats

    inputs_from({}, None, *inputs).check(output)
    if len(inputs) < 2:
        raise click.UsageError(f"give OUTPUT and then two files or more; {inputs[0]} alone is nothing to merge")
    merged = merge([CalibrationStats.load(path) for path in inputs], inputs)
    merged.save(output)
    if values["as_json"]:
        console.show_json("statistics", {"output": output, "samples": merged.samples, "model": merged.model})
    elif not values["quiet"]:
        click.echo(f"wrote {output} with the statistics of {merged.samples} samples")


@app.command("recipe", cls=SectionCommand)
@click.argument("plan", type=_FILE)
@click.option("-o", "--output", type=_FILE, metavar="FILE", help="A .yaml or .json file. [default: standard output]")
@talking
def recipe_command(plan: Path, output: Path | None, **values: Any) -> None:
    """Turn a plan into a recipe, for --recipe.

    The budget, the method and the limits that the plan was made with, for another model or other data.
    """
    from onnxcop._base.files import write_atomically
    from onnxcop.cli.recipe import recipe_of, written_recipe
    from onnxcop.data.input_files import InputFiles
    from onnxcop.rewrite.plan import PruningPlan

    recipe = recipe_of(json.loads(PruningPlan.load(plan).to_json()))
    if values["as_json"]:
        console.show_json("recipe", {"recipe": recipe})
    elif output is None:
        click.echo(written_recipe(recipe, Path("recipe.yaml")), nl=False)
    if output is not None:
        InputFiles([plan]).check(output)
        write_atomically(output, written_recipe(recipe, output).encode())


app.add_command(compare_command)
app.add_command(finetune_command)
app.add_command(profile_command)
app.add_command(sweep_command)
app.add_command(trim_vocab_command)


def _write(
    result: Any, target: Path, plan_out: Path | None, values: dict[str, Any], int8: Quantized | None = None,
    *, beside: Path | None = None,
) -> None:  # fmt: skip
    """Write a finished result and show it; with what stands beside a model in its folder."""
    from onnxcop._base.files import Writing
    from onnxcop.graph.io import stage
    from onnxcop.report.formats import rendered

    reports: tuple[Path, ...] = values["reports"]
    with Writing() as files:
        if beside is not None:
            from onnxcop.integrations.huggingface import stage_companions

            stage_companions(files, beside, target, result)
        stage(files, result.model, target, external_data=values["external_data"] or None)
        if int8 is not None:
            stage(files, int8.model, int8.path, external_data=values["external_data"] or None)
        if plan_out is not None:
            files.add(plan_out, result.plan.to_json().encode())
        if values.get("stats_out") is not None:
            files.add(values["stats_out"], result.stats.to_bytes())
        if reports:
            data = result.report_data(click.get_current_context().find_root().obj)
            for path in reports:
                files.add(path, rendered(data, path))
    if values["as_json"]:
        quantized_too = {} if int8 is None else {"quantized": int8.record()}
        console.show_json("result", _result_record(result, target, plan_out, values) | quantized_too)
    elif not values["quiet"]:
        console.show_result(result, (target, *reports), verbose=values["verbose"])
        if int8 is not None:
            click.echo(f"{int8.line()}\nwrote {int8.path}")


def _result_record(result: Any, target: Path, plan_out: Path | None, values: dict[str, Any]) -> dict[str, Any]:
    """What `--json` writes of a finished run: the files with their hashes, versions, and the numbers."""
    from onnxcop._base.records import file_record
    from onnxcop.report.document import versions

    paths = {"model": Path(result.report.model), "output": target}
    if values["data"] is not None:
        script, colon, _ = str(values["data"]).rpartition(".py:")
        paths["data"] = Path(f"{script}.py" if colon else values["data"])
    files = {name: file_record(path) for name, path in paths.items() if path.exists()}
    written = {"output": target, "plan": plan_out, "reports": values["reports"]}
    identity = {"model_sha256": result.plan.original, "budget": dict(result.plan.budget)}
    return {**written, "files": files, "versions": versions(), **identity, **result.report.to_dict()}


def run(args: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, 1 on errors, 2 on misuse, 130 on Ctrl-C, 143 on SIGTERM."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        code = app.main(arguments, prog_name="onnxcop", standalone_mode=False, obj=shlex.join(["onnxcop", *arguments]))
        return code if isinstance(code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        return tell_failure(error, debug="--debug" in arguments, as_json="--json" in arguments)


def main() -> None:
    """The console script."""
    console.write_anything()
    stop_cleanly()
    remove_leftovers()
    sys.exit(run())
