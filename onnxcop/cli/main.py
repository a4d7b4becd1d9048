"""The command line: `onnxcop MODEL -o OUT` and the subcommands. No logic lives here."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
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
    int8_of,
    progress_from,
    prune_options,
    statistics_arguments,
    target_of,
    workers_from,
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
    figures_option,
    latency_options,
    metric_option,
    output_options,
    plan_options,
    quantize_option,
    recipe_file_option,
    score_options,
    seed_option,
    shape_options,
    stats_options,
    talking,
    task_option,
    verbose_option,
    verify_options,
)
from onnxcop.cli.stopping import stop_cleanly
from onnxcop.cli.study import compare_command, profile_command, sweep_command
from onnxcop.cli.train import finetune_command
from onnxcop.cli.trim_vocab import trim_vocab_command
from onnxcop.cli.types import Output
from onnxcop.cli.worker_options import workers_option

_FILE = click.Path(path_type=Path)


@click.group(
    cls=Program,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="onnxcop", message="%(prog)s %(version)s")
def app() -> None:
    """Prune filters from any ONNX model: smaller, faster, verified.

    The pruned model keeps the inputs and outputs of MODEL. Training code is not needed; a few hundred unlabelled
    samples (--data) keep accuracy much higher. The default budget keeps 70% of the multiply-accumulates (MACs).

    If a model file is named like a command, write ./NAME.
    """


@app.command(
    MAIN,
    cls=MainForm,
    examples=[
        ("onnxcop model.onnx -o small.onnx --data images/", "Keep 70% of the MACs, calibrated on a folder of images:"),
        ("onnxcop model.onnx -o small.onnx --data x.npz --latency 0.6", "Keep 60% of the latency on this machine:"),
        ("onnxcop model.onnx --data x.npz --metric score.py:accuracy --max-drop 0.01", "Lose at most 0.01 accuracy:"),
        ("onnxcop inspect model.onnx", "List what can be pruned, before any run:"),
    ],
)
@click.argument("model", type=ModelFile(path_type=Path))
@output_options
@plan_options
@budget_options
@metric_option
@figures_option
@distill_options
@quantize_option
@workers_option
@choice_options
@verbose_option
@talking
def prune_command(model: Path, output: Output | None, plan_out: Path | None, **values: Any) -> None:
    """Prune a model."""
    from onnxcop.pipeline.prune import prune_with

    target = target_of(output, model)
    int8 = None if values["then_quantize"] is None else int8_of(target)
    others = (int8, plan_out, values["stats_out"], values["checkpoint"], *values["reports"])
    check_outputs(inputs_from(values, model), output, target, *others)
    if values["then_quantize"] == "static" and values["data"] is None:
        raise click.UsageError("--then-quantize static takes ranges from calibration data; give --data, or use dynamic")
    stats = values["stats_out"] is not None  # gathered now, written together with the model
    with workers_from(values) as executor, progress_from(values) as progress:
        result = prune_with(model, prune_options(values | {"stats_out": stats, "executor": executor}, progress))
    if not values["reports"]:
        result = replace(result, evidence=None)  # it holds the original, whose memory is needed for writing
    _write(result, target, plan_out, values, int8, beside=model if output is not None and output.whole else None)


@app.command(
    "inspect",
    cls=SectionCommand,
    examples=[
        ("onnxcop inspect model.onnx", "List groups of filters, their cost, and what is frozen:"),
        ("onnxcop inspect model.onnx --scores --criterion cop", "Rank every filter by COP:"),
    ],
)
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

    Shows which filters must be removed together, how much their removal saves, and which filters are frozen and
    why. Nothing is pruned. With --scores, shows the importance of every filter.
    """
    from onnxcop.analysis.analyze import analyze
    from onnxcop.analysis.inspect import inspect
    from onnxcop.cli.console_inspect import show_inspection, show_scores

    criterion = criterion_to_show(values)
    inputs_from(values, model).check(values["stats_out"])
    analysis = analyze(model, options=engine_from(values), **analysis_arguments(values))
    inspection = inspect(analysis)
    if criterion is None:
        scores = None
    else:
        from onnxcop.criteria.scores import score, statistics

        with progress_from(values) as progress:
            stats = statistics(analysis, progress=progress, **statistics_arguments(values))
        scores = score(analysis, criterion, stats, values["seed"])
    if values["as_json"]:
        console.show_json("inspection", inspection.to_dict() | ({} if scores is None else {"scores": scores.to_dict()}))
    elif scores is not None:
        show_scores(scores, inspection.model, verbose=values["verbose"])
    else:
        show_inspection(inspection, verbose=values["verbose"])


@app.command(
    "apply",
    cls=SectionCommand,
    examples=[
        ("onnxcop apply model.onnx small.plan.json -o small.onnx", "Repeat the cut of a plan, by deletion alone:"),
        ("onnxcop apply model.onnx small.plan.json -o small.onnx --data images/", "Repeat it with recovery:"),
    ],
)
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
    """Apply a pruning plan to the model that it was made for.

    PLAN is the file that a run wrote with --plan-out. If the plan asks for recovery, give --data as well.
    """
    from onnxcop.pipeline.prune import apply_with
    from onnxcop.rewrite.plan import PruningPlan

    target = target_of(output, model)
    check_outputs(inputs_from(values, model, plan), output, target, *values["reports"])
    with progress_from(values) as progress:
        result = apply_with(model, PruningPlan.load(plan), apply_options(values, progress))
    _write(result, target, None, values, beside=model if output is not None and output.whole else None)


@app.command(
    "verify",
    cls=SectionCommand,
    examples=[
        ("onnxcop verify model.onnx small.onnx --plan small.plan.json", "Check a model pruned by deletion:"),
        (
            "onnxcop verify model.onnx small.onnx --plan small.plan.json --structure-only",
            "Check a model whose weights were recovered or trained:",
        ),
    ],
)
@click.argument("original", type=_FILE)
@click.argument("pruned", type=_FILE)
@verify_options
@engine_options
@talking
def verify_command(original: Path, pruned: Path, plan: Path, structure_only: bool, **values: Any) -> None:
    """Check that PRUNED is ORIGINAL with a plan applied.

    If it is not, the error names a difference and the exit code is 1.
    """
    from onnxcop.rewrite.plan import PruningPlan
    from onnxcop.verification.recheck import recheck

    verdict = recheck(
        original,
        pruned,
        PruningPlan.load(plan),
        options=engine_from(values),
        structure_only=structure_only,
    )
    if values["as_json"]:
        console.show_json("verification", {"original": original, "pruned": pruned, **verdict.to_dict()})
    elif not values["quiet"]:
        click.echo(f"verified: {verdict.summary}")
        for note in verdict.notes:
            click.echo(f"  {note}")


@app.command(
    "merge-stats",
    cls=SectionCommand,
    examples=[
        ("onnxcop merge-stats all.npz part1.npz part2.npz", "Merge files that two runs wrote with --stats-out:"),
        ("onnxcop model.onnx -o small.onnx --stats all.npz", "Prune with the merged statistics:"),
    ],
)
@click.argument("output", type=_FILE)
@click.argument("inputs", type=_FILE, nargs=-1, required=True)
@talking
def merge_stats_command(output: Path, inputs: tuple[Path, ...], **values: Any) -> None:
    """Merge calibration statistics of one model into OUTPUT.

    INPUTS are files that runs of one model on different samples wrote with --stats-out. The result equals the
    statistics of one run on all samples.
    """
    from onnxcop.calibration.calibrate import merge
    from onnxcop.calibration.statistics import CalibrationStats

    inputs_from({}, None, *inputs).check(output)
    if len(inputs) < 2:
        raise click.UsageError(f"give OUTPUT and at least two files to merge, not only {inputs[0]}")
    merged = merge([CalibrationStats.load(path) for path in inputs], inputs)
    merged.save(output)
    if values["as_json"]:
        console.show_json("statistics", {"output": output, "samples": merged.samples, "model": merged.model})
    elif not values["quiet"]:
        click.echo(f"wrote {output} with the statistics of {merged.samples} samples")


@app.command(
    "recipe",
    cls=SectionCommand,
    examples=[
        ("onnxcop recipe small.plan.json -o recipe.yaml", "Write the options of a finished run to a file:"),
        ("onnxcop other.onnx -o other.small.onnx --recipe recipe.yaml", "Prune another model with them:"),
    ],
)
@click.argument("plan", type=_FILE)
@recipe_file_option
@talking
def recipe_command(plan: Path, output: Path | None, **values: Any) -> None:
    """Turn a plan into a recipe, for --recipe.

    A recipe holds the budget, the method and the limits of the run that wrote the plan (--plan-out). Use it to
    prune another model, or the same model with other data.
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
    result: Any, target: Path, plan_out: Path | None, values: dict[str, Any], int8: Path | None = None,
    *, beside: Path | None = None,
) -> None:  # fmt: skip
    """Write a finished result and show it; from the folder `beside`, config.json and the tokenizer are copied."""
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
            stage(files, result.int8, int8, external_data=values["external_data"] or None)
        if plan_out is not None:
            files.add(plan_out, result.plan.to_json().encode())
        if values.get("stats_out") is not None:
            files.add(values["stats_out"], result.stats.to_bytes())
        if reports:
            data = result.report_data(click.get_current_context().find_root().obj)
            for path in reports:
                files.add(path, rendered(data, path))
    if values["as_json"]:
        record = _result_record(result, target, plan_out, values)
        console.show_json("result", record | ({} if int8 is None else {"int8_output": int8}))
    elif not values["quiet"]:
        shown = (target, *([] if int8 is None else [int8]), *reports)
        console.show_result(result, shown, verbose=values["verbose"])


def _result_record(result: Any, target: Path, plan_out: Path | None, values: dict[str, Any]) -> dict[str, Any]:
    """The record that `--json` prints for a finished run: files with their hashes, versions, and the figures."""
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
    """Run the program and return its exit code.

    Codes: 0 on success, 1 on errors, 2 on wrong usage, 3 if a gate fails, 130 on Ctrl-C, 143 on SIGTERM.
    """
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
